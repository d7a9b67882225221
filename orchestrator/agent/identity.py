"""Who this node is, for longer than a run: the serials of its machine and of its GPUs.

A machine is what whoever starts the agent states; else the id that its system was given when it was
installed, which anybody may read, so that the answer does not depend on who asks; else the serial
number that its maker put into the firmware, which only root may read. An image that was copied with
an id in it makes many machines one: then somebody has to state who they are.

Where several nodes are one machine, as in a local run, what a verdict is about is that machine, and
yet one of its nodes can not stand for the others: each is the machine under its own name.

A GPU is its UUID, which the driver tells and which stays with the board. Its maker's serial number
is told beside it, where the driver's library knows one: several GPUs may be on one board. What can
not be found out is left out, with the reason: an identity is never guessed.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from orchestrator.agent.devices import Gpus, pci_address
from orchestrator.protocol.agent import AgentConfig
from orchestrator.protocol.devices import Device, is_serial
from orchestrator.protocol.ids import Serial

MACHINE_ID = Path("/etc/machine-id")
DMI_SERIAL = Path("/sys/class/dmi/id/product_serial")
DMI_MODEL = Path("/sys/class/dmi/id/product_name")
_ID = re.compile(r"[0-9a-f]{32}")
_PURPOSE = b"holdfast device ledger"
"""The id itself is not to be shown to others: what is derived from it with a key of one's own is.
Source: machine-id(5)."""
_DIGEST_BYTES = 8
_NO_SERIALS = frozenset(
    {
        "",
        "0",
        "none",
        "default string",
        "not specified",
        "system serial number",
        "to be filled by o.e.m.",
    }
)
"""What makers leave in the firmware who put no number there."""


class Identity(NamedTuple):
    """What a node is made of."""

    devices: tuple[Device, ...]
    unknown: str = ""
    """Why that is not all; "" if it is."""


def identity(
    config: AgentConfig,
    gpus: Gpus,
    *,
    machine_id: Path = MACHINE_ID,
    dmi_serial: Path = DMI_SERIAL,
    dmi_model: Path = DMI_MODEL,
) -> Identity:
    """Find out who a node is.

    Args:
        config: of its agent.
        gpus: of its ranks.
        machine_id: file with the id of the installed system.
        dmi_serial: file with the number that the machine's maker gave it.
        dmi_model: file with its maker's name for it.
    """
    problems = []
    devices = []
    serial, source = _stated(config) or _installed(machine_id) or _made(dmi_serial) or ("", "")
    if serial and config.kernel_shared and source != "stated":
        serial = f"{config.node}@{serial}"
    if is_serial(serial):
        devices.append(Device(Serial(serial), "machine", source, _line(dmi_model)))
    else:
        problems.append(
            f"the machine's serial is not known: no id in {machine_id}, none in {dmi_serial}; "
            "hint: state it, spec.nodes.serials"
        )
    for place, gpu in enumerate(gpus.own):
        if gpu.uuid:
            local_rank = place if gpus.ordered else -1
            model = f"{gpu.model}, board {gpu.number}" if gpu.number else gpu.model
            devices.append(Device(Serial(gpu.uuid), "gpu", "driver", model, local_rank))
        else:
            problems.append(f"the driver tells no UUID of GPU {gpu.address}")
    if gpus.problem:
        problems.append(gpus.problem)
    return Identity(tuple(devices), "; ".join(problems))


def blamed(found: Identity, gpus: Gpus, kind: str, device: str) -> Serial:
    """Return the serial of what the kernel's log blames; "" if it has none that is known.

    Args:
        found: who the node is.
        gpus: of its ranks.
        kind: of what is blamed: gpu, disk, or "" for what has no name there, such as memory.
        device: its name in the log; of a GPU its PCI address.
    """
    if kind == "gpu":
        address = pci_address(device)
        return next((Serial(gpu.uuid) for gpu in gpus.own if gpu.address == address), Serial(""))
    return next((d.serial for d in found.devices if d.kind == "machine"), Serial(""))


def _stated(config: AgentConfig) -> tuple[str, str] | None:
    return (config.serial, "stated") if config.serial else None


def _installed(path: Path) -> tuple[str, str] | None:
    text = _line(path)
    if not _ID.fullmatch(text):
        return None  # empty, or "uninitialized", in an image that has not been started yet
    made = hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES, key=_PURPOSE)
    return f"machine-{made.hexdigest()}", "machine-id"


def _made(path: Path) -> tuple[str, str] | None:
    text = _line(path)
    if text.lower() in _NO_SERIALS:
        return None
    return "dmi-" + "-".join(text.split()), "dmi"


def _line(path: Path) -> str:
    """Return the first line of a file; "" if it can not be read, as only root may read some."""
    try:
        text = path.read_text("utf-8", "replace")
    except OSError:
        return ""
    return text.partition("\n")[0].strip()
