"""The run's clock: seconds since the run began, never backwards, whoever reads it next."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from orchestrator.protocol.ids import Seconds

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class _Zero(msgspec.Struct, frozen=True):
    """When the run began, on the clock of one boot; that clock counts on while nobody reads it."""

    boot: str
    at_s: float


class RunClock:
    """Goes on counting while no controller lives; after a reboot from what the journal reached.

    Args:
        file: keeps the run's beginning; made if it is not there.
        reached: seconds on the run's clock at the last event on record.
    """

    def __init__(self, file: Path, *, reached: Seconds) -> None:
        boot = _BOOT_ID.read_text(encoding="ascii").strip()
        zero = _read(file)
        now_s = _boot_s()
        if zero is None or zero.boot != boot or now_s - zero.at_s < reached:
            zero = _Zero(boot, now_s - reached)
            temporary = file.with_name(f".{file.name}")
            temporary.write_bytes(msgspec.json.encode(zero))
            temporary.replace(file)
        self._zero_s = zero.at_s

    def __call__(self) -> Seconds:
        """Return the seconds since the run began. Any thread."""
        return Seconds(_boot_s() - self._zero_s)


def _boot_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _read(file: Path) -> _Zero | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Zero)
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        return None
