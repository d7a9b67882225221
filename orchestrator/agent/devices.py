"""Which devices of the machine are this node's own.

A kernel's log tells of every device of its machine, and in a container often of its host's. What it
says of one that the node does not use is no reason to do without the node.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)
GPUS = Path("/proc/driver/nvidia/gpus")
"""A folder per GPU that the driver shows here. Source: the driver's README, /proc interface."""
BLOCKS = Path("/sys/dev/block")
"""A link per block device, by number. Source: Linux, Documentation/ABI/testing/sysfs-dev."""
_UUID = re.compile(r"^GPU UUID:\s*(\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Devices:
    """The node's own, as a kernel's log names them."""

    gpus: frozenset[str] = frozenset()
    """PCI addresses without function: 0000:3b:00."""
    disks: frozenset[str] = frozenset()
    """Whole disks: nvme1n1."""

    def own(self, kind: str, device: str) -> bool:
        """Whether a device of a kind ("gpu", "disk") is the node's; any is of a kind of none."""
        match kind:
            case "gpu":
                return pci_address(device) in self.gpus
            case "disk":
                return device in self.disks
        return True


def pci_address(text: str) -> str:
    """Return a PCI address in the one form to compare: 0000:3b:00, whatever its function."""
    return text.lower().partition(".")[0]


def own_devices(ranks: int, folders: Iterable[str]) -> Devices:
    """Find a node's devices: the GPUs of so many ranks, and the disks that hold its folders."""
    return Devices(gpus_of(ranks, os.environ), disks_of(Path(folder) for folder in folders))


def gpus_of(ranks: int, environ: Mapping[str, str], root: Path = GPUS) -> frozenset[str]:
    """Return the PCI addresses of the GPUs that a node's ranks use, one each.

    Where CUDA goes by numbers in an order of its own, which of several they are can not be told
    from outside: then none is.
    """
    try:
        folders = sorted(root.iterdir())
        texts = [(folder / "information").read_text("utf-8", "replace") for folder in folders]
    except OSError:
        return frozenset()  # no driver of NVIDIA's, so no GPU that it could tell of
    addresses = [pci_address(folder.name) for folder in folders]
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None and len(addresses) <= ranks:
        return frozenset(addresses)
    by_uuid = [(m[1], a) for t, a in zip(texts, addresses, strict=True) if (m := _UUID.search(t))]
    names = [str(n) for n in range(len(addresses))] if visible is None else visible.split(",")
    own = set()
    for name in (name.strip() for name in names[:ranks]):
        if name.isdecimal() and environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
            own.update(addresses[int(name) : int(name) + 1])
        elif name.startswith("GPU-"):
            own.update(address for uuid, address in by_uuid if uuid.startswith(name))
    if not own:
        log.warning(
            "which of %d GPUs are this node's is not known, so what the kernel says of them is only"
            " noted; hint: set CUDA_DEVICE_ORDER=PCI_BUS_ID, or CUDA_VISIBLE_DEVICES by UUID",
            len(addresses),
        )
    return frozenset(own)


def disks_of(folders: Iterable[Path], blocks: Path = BLOCKS) -> frozenset[str]:
    """Return the names of the disks that hold folders, and of the disks that those are made of."""
    names: set[str] = set()
    for folder in folders:
        try:
            number = folder.stat().st_dev
            names.update(_disks(blocks / f"{os.major(number)}:{os.minor(number)}"))
        except OSError as error:
            # Memory, a network's or a container's file system has no block device to its number.
            log.info("no disk is known to hold %s: %s", folder, error.strerror)
    return frozenset(names)


def _disks(entry: Path) -> Iterator[str]:
    disk = entry.resolve(strict=True)
    if (disk / "partition").exists():
        disk = disk.parent
    yield disk.name
    parts = disk / "slaves"
    for part in parts.iterdir() if parts.is_dir() else ():
        yield from _disks(part)
