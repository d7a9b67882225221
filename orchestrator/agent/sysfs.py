"""Reads what the Linux kernel counts of memory, network ports, disks and processors, in files.

Its log tells of the same, but needs a right that containers seldom have; these files need none.
A machine that lacks some of them has no such devices, or a kernel that does not count there.

Source of the files: Linux, Documentation/ABI: testing/sysfs-devices-edac, stable/
sysfs-class-infiniband, testing/sysfs-class-net, testing/sysfs-devices-system-cpu and -fs-ext4.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

from orchestrator.agent.signals import OFTEN_S, Look, NoDevicesError, Reading

SYS = Path("/sys")
NUMBER_MAX_BYTES = 256
COUNTS = 2**64
_RATE = re.compile(r"^([0-9]+(?:\.[0-9]+)?) Gb/sec")
_STATE = re.compile(r"^([0-9]+): ")
ACTIVE = 4
"""State of an InfiniBand port: it carries data."""
Gauges = dict[str, Callable[[], float]]
"""How to read each gauge of a device, by name."""
NVME_WELL = frozenset({"live", "new", "resetting", "connecting"})
"""States of a controller that are not its end. Source: Linux, nvme_sysfs_show_state."""


class Sysfs:
    """One machine's.

    Args:
        disks: of the node; those of others are of no interest.
        root: where the files are.
    """

    name = "sysfs"
    every_s = OFTEN_S

    def __init__(self, disks: Collection[str], root: Path = SYS) -> None:
        self._disks, self._root = disks, root
        self._best: dict[tuple[str, str], float] = {}
        """The most that was read of a gauge of a port: only what was there can go missing."""
        self._seen: set[tuple[str, str]] = set()

    def look(self) -> Look:
        """See `Probe.look`."""
        found = [*self._memory(), *self._ports(), *self._links(), *self._drives(), *self._cpus()]
        readings = [reading for reading in found if reading.values or reading.missing]
        here = {(reading.kind, reading.device) for reading in readings}
        for kind, device in sorted(self._seen - here):
            gone = {f"{kind}_gone": "it was here, and is not any more"}
            readings.append(Reading(kind, device, {f"{kind}_gone": 1.0}, gone))
        self._seen |= here
        if not readings:
            raise NoDevicesError(f"nothing is counted in {self._root}")
        unread = [
            f"{reading.device}: no {gauge}: {why}"
            for reading in readings
            for gauge, why in sorted(reading.missing.items())
        ]
        return Look(tuple(readings), "; ".join(unread))

    # Kinds of devices -----------------------------------------------------------------------------

    def _memory(self) -> Iterator[Reading]:
        for folder in self._folders("devices/system/edac/mc", "mc*"):
            gauges: Gauges = {
                "memory_uncorrected": partial(_whole, folder / "ue_count"),
                "memory_corrected": partial(_whole, folder / "ce_count"),
            }
            yield _reading("memory", folder.name, gauges)

    def _ports(self) -> Iterator[Reading]:
        for folder in self._folders("class/infiniband", "*/ports/*"):
            name, counters = f"{folder.parent.parent.name}/{folder.name}", folder / "counters"
            gauges: Gauges = {
                "link_down": partial(self._down, name, partial(_active, folder)),
                "rate_missing_gbps": partial(self._slower, name, folder),
                "link_losses": partial(_whole, counters / "link_downed"),
                "link_recoveries": partial(_whole, counters / "link_error_recovery"),
                "symbol_errors": partial(_whole, counters / "symbol_error"),
            }
            yield _reading("nic", name, gauges)

    def _links(self) -> Iterator[Reading]:
        """Read network interfaces that are devices; bridges and the like are none."""
        for folder in self._folders("class/net", "*"):
            if (folder / "device").exists():
                gauges: Gauges = {
                    "link_down": partial(self._down, folder.name, partial(_up, folder)),
                    "link_losses": partial(_whole, folder / "carrier_down_count"),
                }
                yield _reading("nic", folder.name, gauges)

    def _drives(self) -> Iterator[Reading]:
        for disk in sorted(self._disks):
            device = self._root / "block" / disk / "device"
            gauges: Gauges = {"disk_errors": partial(_whole, device / "ioerr_cnt", 16)}
            if disk.startswith("nvme"):
                gauges["disk_dead"] = partial(_dead, device)
            if counted := self._folders("fs/ext4", f"{disk}*/errors_count"):
                gauges["filesystem_errors"] = partial(_sum, counted)
            yield _reading("disk", disk, gauges)

    def _cpus(self) -> Iterator[Reading]:
        """Read how often each package was throttled: all its processors say the same."""
        seen = set()
        for folder in self._folders("devices/system/cpu", "cpu[0-9]*"):
            counted = folder / "thermal_throttle" / "package_throttle_count"
            if not counted.exists():
                return  # no processor of this kind counts that
            package = _text(folder / "topology" / "physical_package_id")
            if package not in seen:
                seen.add(package)
                gauges: Gauges = {"cpu_throttles": partial(_whole, counted)}
                yield _reading("cpu", f"package{package}", gauges)

    # Gauges ---------------------------------------------------------------------------------------

    def _folders(self, under: str, pattern: str) -> list[Path]:
        return sorted((self._root / under).glob(pattern))

    def _less(self, device: str, gauge: str, value: float) -> float:
        """Return by how much a gauge is below the most that it ever was."""
        best = self._best[device, gauge] = max(self._best.get((device, gauge), value), value)
        return best - value

    def _down(self, name: str, up: Callable[[], bool]) -> float:
        """Return whether a link is down that was up: a port without a cable is no loss."""
        return self._less(name, "up", float(up()))

    def _slower(self, name: str, folder: Path) -> float:
        """Return how much slower a port is than it was; one that is down has no speed to tell."""
        if not _active(folder):
            return 0.0
        text = _text(folder / "rate")
        found = _RATE.match(text)
        if found is None:
            raise ValueError(f"{text!r:.60} is no rate: {folder / 'rate'}")
        return self._less(name, "rate", float(found[1]))


def _reading(kind: str, device: str, gauges: Gauges) -> Reading:
    """Read gauges; of those that can not be read say why, if they are there."""
    values: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, read in gauges.items():
        try:
            values[name] = read()
        except FileNotFoundError:
            pass  # this kernel, or this driver, does not count it
        except OSError as error:
            missing[name] = error.strerror or str(error)
        except ValueError as error:
            missing[name] = str(error)
    return Reading(kind, device, values, missing)


def _active(folder: Path) -> bool:
    text = _text(folder / "state")
    found = _STATE.match(text)
    if found is None:
        raise ValueError(f"{text!r:.60} is no state of a port: {folder / 'state'}")
    return int(found[1]) == ACTIVE


def _up(folder: Path) -> bool:
    return _text(folder / "operstate") == "up"


def _dead(device: Path) -> float:
    return float(_text(device / "state") not in NVME_WELL)


def _sum(paths: list[Path]) -> float:
    return sum(map(_whole, paths))


def _text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(NUMBER_MAX_BYTES).decode("utf-8", "replace").strip()


def _whole(path: Path, base: int = 10) -> float:
    text = _text(path)
    try:
        value = int(text, base)
    except ValueError:
        raise ValueError(f"{text!r:.60} is no number: {path}") from None
    if not 0 <= value < COUNTS:
        raise ValueError(f"{text!r:.60} is no count: {path}")
    return float(value)
