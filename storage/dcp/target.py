"""Says which store, step and epoch a save or a load is about."""

import os
import re
from typing import TypeAlias

import torch.distributed as dist

from storage.address import open_store
from storage.blob import BlobStore
from storage.commit import newest_epoch
from storage.manifest import STEP_MAX
from storage.wrappers import RetryingStore

Address: TypeAlias = str | os.PathLike[str] | BlobStore
"""Of a store, as `storage.address` has it; or the store itself."""

_STEP = re.compile(r"(?:.*?step[-_=]?)?(?P<step>\d{1,16})(?:\.[a-z]+)?", re.IGNORECASE)

# The epoch of this process in each store, so that a writer for every save is one incarnation.
_epochs: dict[str, int] = {}


def opened(address: Address) -> BlobStore:
    """Return the store; what may succeed later is repeated a few times."""
    if isinstance(address, str | os.PathLike):
        return RetryingStore(open_store(os.fspath(address)))
    return address


def step_of(checkpoint_id: str | os.PathLike[str]) -> int:
    """Return the step that torch's `checkpoint_id` means.

    Only the last part of what may look like a path counts, and only its number: which store it is
    in, the address says.

    Raises:
        ValueError: if it is none of N, step-N, step_N, ...step=N.ckpt.

    >>> step_of("outputs/checkpoint/step-1000")
    1000
    >>> step_of("epoch=3-step=250.ckpt")
    250
    """
    last = os.fspath(checkpoint_id).rstrip("/").rpartition("/")[2]
    match = _STEP.fullmatch(last)
    if match is None or int(match["step"]) > STEP_MAX:
        raise ValueError(f"checkpoint_id is {last!r}, expected a step, such as 1000 or step-1000")
    return int(match["step"])


def names_step(checkpoint_id: str | os.PathLike[str]) -> bool:
    """Return whether an id has a step in it."""
    try:
        step_of(checkpoint_id)
    except ValueError:
        return False
    return True


def claimed_epoch(address: Address) -> int:
    """Return this process's epoch in a store, above every other if it has none yet.

    Other ranks have to be told. Two processes that ask at the same moment get the same one; the
    second to put a shard finds the key taken.
    """
    if not isinstance(address, str | os.PathLike):
        return newest_epoch(address) + 1
    key = os.fspath(address)
    if key not in _epochs:
        _epochs[key] = newest_epoch(opened(address)) + 1
    return _epochs[key]


def agree_epoch(address: Address, group: dist.ProcessGroup | None = None) -> int:
    """Return an epoch above every other in the store, the same on all ranks.

    A collective: call it once, when training begins or begins anew, on all ranks of the group. It
    fences: whoever writes with an older epoch can not commit once this one has.
    """
    told: list[object] = [None]
    if not dist.is_initialized():
        return newest_epoch(opened(address)) + 1
    if dist.get_rank(group) == 0:
        told = [newest_epoch(opened(address)) + 1]
    dist.broadcast_object_list(told, group=group, group_src=0)
    (epoch,) = told
    assert isinstance(epoch, int)
    return epoch
