"""Copies a state dict to host memory for `torch.distributed.checkpoint.async_save`.

Training waits for one copy of the state, into buffers that are used again: the first save pays for
new memory, the others do not.
"""

import copy
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import AsyncStager as TorchAsyncStager
from torch.distributed.tensor import DTensor

from storage.dcp.items import tensor_over
from storage.errors import StorageUnavailableError, UnstorableError

State: TypeAlias = dict[str, Any]

ALIGNMENT = 64
POLL_S = 0.01


@dataclass(slots=True)
class _Slot:
    """A buffer, and who uses it: staged tensors keep the view of it alive."""

    memory: np.ndarray[Any, np.dtype[np.uint8]]
    lease: weakref.ref[object] | None = None

    @property
    def is_free(self) -> bool:
        return self.lease is None or self.lease() is None


class AsyncStager(TorchAsyncStager):
    """Stages into buffers of its own, of which a save has one until it is over.

    Copies from an accelerator go to pinned memory on a stream of their own, and `async_save` then
    returns an `AsyncSaveResponse`: wait for its `staging_completion` before the optimizer's step.
    Copies of what is in host memory are done when `async_save` returns, unless they are to overlap
    with what is computed next: then they are made in a thread, and it is the same with them.

    Args:
        slots: buffers, each as large as the state, so many saves can be under way.
        wait_s: how long `stage` may hold training up if none is free; then the save fails, instead
            of taking more memory.
        overlap: copy what is in host memory in a thread. If an optimizer's step does not wait for
            `staging_completion`, what is saved is of two steps, and nothing will show it.
    """

    _synchronize_after_execute = False

    def __init__(self, *, slots: int = 2, wait_s: float = 60.0, overlap: bool = False) -> None:
        if slots < 1 or wait_s < 0:
            raise ValueError(f"slots is {slots} and wait_s {wait_s}, expected 1 and 0, or more")
        self._slots_max, self._wait_s, self._overlap = slots, wait_s, overlap
        self._slots: list[_Slot] = []
        self._thread: ThreadPoolExecutor | None = None
        self._stream: torch.Stream | None = None

    def stage(self, state_dict: State) -> Future[State] | State:
        """Return a copy of the state dict in host memory; of tensors only this rank's part.

        Raises:
            StorageUnavailableError: if no buffer came free in time.
            UnstorableError: if a tensor is of a kind that it can not copy.
        """
        # One that is there twice is copied once.
        tensors = list({id(tensor): tensor for tensor in _tensors(state_dict)}.values())
        local = {id(tensor): _local(tensor) for tensor in tensors}
        on_device = any(part.device.type != "cpu" for part in local.values())
        view = self._free(sum(map(_room, local.values())), pinned=on_device)
        copies: dict[int, Tensor] = {}
        pairs: list[tuple[Tensor, Tensor]] = []
        at = 0
        for tensor in tensors:
            part = local[id(tensor)]
            end = at + part.numel() * part.element_size()
            copied = tensor_over(view[at:end], part.dtype, tuple(part.shape))
            pairs.append((copied, part))
            copies[id(tensor)] = _like(tensor, copied)
            at += _room(part)
        staged: State = _replaced(state_dict, copies)
        if on_device:
            with self._own_stream() as stream:
                _copy(pairs, non_blocking=True)
            return self._in_thread.submit(_after, stream.record_event(), staged, state_dict)
        if self._overlap:
            return self._in_thread.submit(_copied, pairs, staged)
        _copy(pairs)
        return staged

    def synchronize_staging(self) -> None:
        """Do nothing: host memory is staged at once, and the rest has a future."""

    def close(self) -> None:
        """Give the buffers back once the saves that use them are over."""
        self._slots.clear()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _free(self, size: int, *, pinned: bool) -> memoryview:
        """Return a view of a buffer that nobody uses; it is in use for as long as the view is."""
        slot = self._slot()
        if slot.memory.nbytes < size:
            slot.memory = _memory(size, pinned=pinned)
        # An array of its own for each save: every tensor over a part of it keeps it alive.
        lease = slot.memory[:size]
        slot.lease = weakref.ref(lease)
        return lease.data

    def _slot(self) -> _Slot:
        until = time.monotonic() + self._wait_s
        while True:
            for slot in self._slots:
                if slot.is_free:
                    return slot
            if len(self._slots) < self._slots_max:
                self._slots.append(_Slot(np.empty(0, np.uint8)))
                return self._slots[-1]
            if time.monotonic() > until:
                raise StorageUnavailableError(
                    f"{len(self._slots)} saves are still under way after {self._wait_s:g} s, "
                    "expected one of them to be over"
                )
            time.sleep(POLL_S)

    @property
    def _in_thread(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="holdfast-stage")
        return self._thread

    @contextmanager
    def _own_stream(self) -> Iterator[torch.Stream]:
        if self._stream is None:
            self._stream = torch.Stream()
        # What is copied was computed on the stream that training is on.
        self._stream.wait_stream(torch.accelerator.current_stream())
        with self._stream:
            yield self._stream


def _copy(pairs: list[tuple[Tensor, Tensor]], *, non_blocking: bool = False) -> None:
    for copied, part in pairs:
        copied.copy_(part, non_blocking=non_blocking)


def _copied(pairs: list[tuple[Tensor, Tensor]], staged: State) -> State:
    """Return what was staged once it is copied. For a thread, which records no gradients."""
    with torch.no_grad():
        _copy(pairs)
    return staged


def _after(arrived: torch.Event, staged: State, _source: State) -> State:
    """Return what was staged once it is there; the source is held until then."""
    arrived.synchronize()
    return staged


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors in a nested state dict, in order; one that is there twice comes twice."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _replaced(value: Any, copies: dict[int, Tensor]) -> Any:  # noqa: ANN401 - any nested state
    """Return a nested state dict with a copy of everything in it."""
    if isinstance(value, Tensor):
        return copies[id(value)]
    if isinstance(value, dict):
        items = ((key, _replaced(item, copies)) for key, item in value.items())
        return OrderedDict(items) if isinstance(value, OrderedDict) else dict(items)
    if type(value) in (list, tuple):
        return type(value)(_replaced(item, copies) for item in value)
    return copy.deepcopy(value)


def _local(tensor: Tensor) -> Tensor:
    """Return what this rank has of a tensor.

    Raises:
        UnstorableError: if that can not be told.
    """
    if isinstance(tensor, DTensor):
        return tensor.to_local().detach()
    if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise UnstorableError(
            f"tensor is a {type(tensor).__name__}, expected a plain tensor or a DTensor to stage"
        )
    return tensor.detach()


def _room(tensor: Tensor) -> int:
    """Return the bytes that a tensor takes in a buffer, with what the next one needs to align."""
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


def _like(tensor: Tensor, local: Tensor) -> Tensor:
    """Return a copy of this rank's part as the kind of tensor that the original is."""
    if not isinstance(tensor, DTensor):
        return local
    return DTensor.from_local(
        local,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def _memory(size: int, *, pinned: bool) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if not pinned:
        return np.empty(size, np.uint8)
    return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
