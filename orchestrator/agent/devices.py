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
from typing import NamedTuple

log = logging.getLogger(__name__)
GPUS = Path("/proc/driver/nvidia/gpus")
"""A folder per GPU that the driver shows here. Source: the driver's README, /proc interface."""
BLOCKS = Path("/sys/dev/block")
"""A link per block device, by number. Source: Linux, Documentation/ABI/testing/sysfs-dev."""
_UUID = re.compile(r"^GPU UUID:\s*(GPU-[0-9a-f-]+)\s*$", re.MULTILINE)
"""Of a GPU that nobody has opened since the driver was loaded there are question marks instead."""
_MODEL = re.compile(r"^Model:\s*(\S.*?)\s*$", re.MULTILINE)


class Gpu(NamedTuple):
    """One GPU, as the driver shows it."""

    address: str
    """On PCI, without function: 0000:3b:00."""
    uuid: str
    """Stays with the board wherever it is plugged; "" if the driver does not say it."""
    model: str
    number: str = ""
    """Its maker's serial number, which is printed on the board; "" if nobody said."""


class Gpus(NamedTuple):
    """The GPUs of a node's ranks."""

    own: tuple[Gpu, ...] = ()
    ordered: bool = False
    """Whether they are in the order of the ranks that compute on them."""
    problem: str = ""
    """Why they are not known though there are some; "" if they are, or there are none."""


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


def own_devices(gpus: Gpus, folders: Iterable[str]) -> Devices:
    """Return a node's devices: the GPUs of its ranks, and the disks that hold its folders."""
    if gpus.problem:
        log.warning("what the kernel says of GPUs is only noted: %s", gpus.problem)
    addresses = frozenset(gpu.address for gpu in gpus.own)
    return Devices(addresses, disks_of(Path(folder) for folder in folders))


def gpus_of(
    ranks: int, environ: Mapping[str, str], root: Path = GPUS, boards: Iterable[Gpu] = ()
) -> Gpus:
    """Return the GPUs that a node's ranks use, one each.

    Where CUDA goes by numbers in an order of its own, which of several they are can not be told
    from outside: then none is.

    Args:
        ranks: how many the node has.
        environ: what they are started with.
        root: where the driver shows its GPUs.
        boards: GPUs as its library tells of them, which knows more.
    """
    shown = {gpu.address: gpu for gpu in _shown(root)}
    there = [gpu for _, gpu in sorted((shown | {gpu.address: gpu for gpu in boards}).items())]
    if not there:
        return Gpus()
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    by_place = environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len(there) == 1
    if visible is None and len(there) <= ranks:
        return Gpus(tuple(there), ordered=by_place)
    names = [str(n) for n in range(len(there))] if visible is None else visible.split(",")
    own: list[Gpu] = []
    for name in (name.strip() for name in names[:ranks]):
        if name.isdecimal() and by_place:
            own += there[int(name) : int(name) + 1]
        elif name.startswith("GPU-"):
            own += [gpu for gpu in there if gpu.uuid.startswith(name)]
    if own or not there:
        return Gpus(tuple(dict.fromkeys(own)), ordered=True)
    return Gpus(
        problem=f"which of {len(there)} GPUs are this node's is not known; hint: set "
        "CUDA_DEVICE_ORDER=PCI_BUS_ID, or CUDA_VISIBLE_DEVICES by UUID"
    )


def _shown(root: Path) -> list[Gpu]:
    try:
        folders = sorted(root.iterdir())
        texts = [(folder / "information").read_text("utf-8", "replace") for folder in folders]
    except OSError:
        return []  # no driver of NVIDIA's, so no GPU that it could tell of
    return [_gpu(pci_address(f.name), text) for f, text in zip(folders, texts, strict=True)]


def _gpu(address: str, text: str) -> Gpu:
    uuid, model = _UUID.search(text), _MODEL.search(text)
    return Gpu(address, uuid[1] if uuid else "", model[1] if model else "")


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
