"""Which device is which, for longer than a run: what a ledger of verdicts goes by.

A node's name, its place in a rack and a rank's number all go to another device sooner or later; a
serial number does not. `agent/identity.py` finds it out.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from orchestrator.protocol.ids import Serial

SERIAL_MAX = 128
"""Characters: those that can be printed, and no space among them."""


class Device(msgspec.Struct, frozen=True, array_like=True):
    """A device of a node."""

    serial: Serial
    kind: Literal["machine", "gpu"]
    """machine: all of a node but its GPUs, that is processors, memory and disks."""
    source: str
    """Whence the serial is: stated, machine-id, dmi, driver."""
    model: str = ""
    """What it is, in its maker's words; "" if nobody said."""
    local_rank: int = -1
    """Which of its node's ranks computes on it; -1 if all of them do, or it is not known."""


def is_serial(text: str) -> bool:
    """Whether a text can name a device: in a table, on a command line, in a journal."""
    return 0 < len(text) <= SERIAL_MAX and text.isprintable() and " " not in text
