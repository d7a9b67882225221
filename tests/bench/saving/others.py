"""What the benchmark of checkpoints compares with: the machine's own copies, and torch's DCP."""

from __future__ import annotations

import mmap
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import AsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from tests.bench.saving.computation import Computation

State = dict[str, Tensor]
BLOCK_BYTES = 16 << 20
PAGE_BYTES = 4096


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds that a call took, and those on a core of this process."""
    core_s, begun = time.process_time(), time.perf_counter()
    call()
    return time.perf_counter() - begun, time.process_time() - core_s


def evict(*files: Path) -> None:
    """Take files out of the page cache; they were synced."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


class Raw:
    """The same bytes, copied, written and read by nobody for nobody, without a digest.

    Args:
        state: whose bytes.
        folder: where to write them.
    """

    def __init__(self, state: State, folder: Path) -> None:
        self._sources = [tensor.view(torch.uint8).numpy().data for tensor in state.values()]
        size = sum(map(len, self._sources))
        self._memory = memoryview(mmap.mmap(-1, -(-size // PAGE_BYTES) * PAGE_BYTES))
        folder.mkdir()
        self.file = folder / "raw"

    def copy(self) -> None:
        """Copy every tensor into memory that is there already."""
        at = 0
        # Not by torch, whose own copy takes longer.
        for source in self._sources:
            self._memory[at : at + len(source)] = source
            at += len(source)

    def write(self) -> None:
        """Write them to a new file, and sync it."""
        self.file.unlink(missing_ok=True)
        self._write(os.O_WRONLY)

    def write_past_the_cache(self) -> None:
        """The same without the page cache: from memory that is there already, in whole blocks."""
        self.file.unlink(missing_ok=True)
        self._write(os.O_WRONLY | os.O_DIRECT)

    def read(self) -> None:
        """Read them from the file into memory that is there already."""
        self._read(os.O_RDONLY)

    def read_past_the_cache(self) -> None:
        """The same without the page cache."""
        self._read(os.O_RDONLY | os.O_DIRECT)

    def read_into_new_memory(self) -> None:
        """Read them into memory that nobody has touched yet, as a process has that begins anew."""
        self._read(os.O_RDONLY, memoryview(mmap.mmap(-1, len(self._memory))))

    def _read(self, flags: int, memory: memoryview | None = None) -> None:
        memory = self._memory if memory is None else memory
        descriptor = os.open(self.file, flags)
        try:
            done = 0
            while done < len(memory):
                piece = memory[done : done + BLOCK_BYTES]
                # Past the cache only whole blocks are read, and the file ends with one.
                done += os.preadv(descriptor, [piece], done)
        finally:
            os.close(descriptor)

    def _write(self, flags: int) -> None:
        descriptor = os.open(self.file, flags | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            done = 0
            while done < len(self._memory):
                done += os.write(descriptor, self._memory[done : done + BLOCK_BYTES])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Dcp:
    """`torch.distributed.checkpoint` with its FileSystemWriter and FileSystemReader, as they come.

    Args:
        state: what it saves.
        folder: where to.
    """

    def __init__(self, state: State, folder: Path) -> None:
        self._state, self._folder = state, folder

    def save(self) -> None:
        """Save, and wait for it; it syncs its files."""
        self._clear()
        dcp.save(self._state, storage_writer=dcp.FileSystemWriter(self._folder))

    def save_beside(
        self, step: Computation, kind: AsyncCheckpointerType, stager: AsyncStager | None = None
    ) -> tuple[float, float]:
        """Save in the background, beside a step.

        Args:
            step: what is computed beside it.
            kind: whether a thread writes or a process.
            stager: of its own, if there is one; kept from save to save, as its docs advise.

        Returns:
            Seconds that training waits before the step and right before the next update, and that
            the step took to compute.
        """
        self._clear()
        writer = dcp.FileSystemWriter(self._folder)
        begun = time.perf_counter()
        saving: Any = dcp.async_save(
            self._state, storage_writer=writer, async_checkpointer_type=kind, async_stager=stager
        )
        stall_s = time.perf_counter() - begun
        computed_s = step.compute()
        if isinstance(saving, AsyncSaveResponse):
            begun = time.perf_counter()
            saving.staging_completion.result()
            stall_s += time.perf_counter() - begun
            saving = saving.upload_completion
        saving.result()
        return stall_s, computed_s

    def load(self) -> None:
        """Load in place."""
        dcp.load(self._state, storage_reader=dcp.FileSystemReader(self._folder))

    @property
    def files(self) -> list[Path]:
        """What it has written."""
        return [path for path in self._folder.iterdir() if path.is_file()]

    def _clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def overlapping_stager(*, shared: bool) -> DefaultStager:
    """Return DCP's stager with what it has for state in host memory: it copies in a thread.

    Args:
        shared: into shared memory, for a process that writes.
    """
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=shared,
            use_async_staging=True,
            use_non_blocking_copy=False,
        )
    )
