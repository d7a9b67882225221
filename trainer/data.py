"""Turns text into the samples of a run, so that they do not depend on how many ranks read them.

The text is tokenised once per node into a file of 32-bit ids, which every rank maps. A sample is
`seqLen` inputs and the tokens that follow them. Which sample stands where in which global batch is
a function of (seed, step, index), by a permutation per epoch that is computed, not stored: the
whole state of the data is the number of samples consumed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from orchestrator.protocol import runfile
from orchestrator.worker import MisconfiguredError
from trainer.text import Text
from trainer.tokenizer import PIECE_CHARS_MAX, Tokenizer

_HEAD = struct.Struct("<8sQ16s")
_MAGIC = b"HFTOK\x00\x00\x01"
_HEAD_BYTES = 64
_POLL_S = 0.01


class Tokens(NamedTuple):
    """All tokens of the text, one document after the other, each begun by `bos`."""

    ids: npt.NDArray[np.uint32]
    digest: str
    """Of the ids; equal texts have equal digests, wherever they come from."""
    bos: int


class Batch(NamedTuple):
    """Some samples of a global batch. B samples, L sequence length."""

    inputs: npt.NDArray[np.int64]
    """Shape [B, L]."""
    targets: npt.NDArray[np.int64]
    """The tokens that follow, shape [B, L]."""
    cuts: list[list[int]]
    """Per sample, the borders of its documents, from 0 to L (Llama.forward)."""


class Samples:
    """The samples of a run in their order.

    Args:
        tokens: the text.
        job: `spec.trainer`; its seed, batch and sequence length count.

    Raises:
        MisconfiguredError: if the text is too short for a single sample.
    """

    def __init__(self, tokens: Tokens, job: runfile.Trainer) -> None:
        self.tokens, self._job = tokens, job
        self.count = (len(tokens.ids) - 1) // job.seq_len
        if self.count < 1:
            raise MisconfiguredError(
                f"spec.trainer.data has {len(tokens.ids)} tokens, "
                f"expected more than spec.trainer.seqLen = {job.seq_len}",
                hint="add text, or shorten the sequences",
            )

    @property
    def mark(self) -> float:
        """The first 48 bits of the digest, which a float64 holds exactly."""
        return float(int(self.tokens.digest[:12], 16))

    def batch(self, step: int, indices: range) -> Batch:
        """Return the samples at these indices of the global batch of `step` (1-based)."""
        L = self._job.seq_len
        first = (step - 1) * self._job.global_batch
        rows = [self._place(first + index) for index in indices]
        pieces = [self.tokens.ids[row * L : (row + 1) * L + 1] for row in rows]
        ids = np.stack(pieces).astype(np.int64)
        return Batch(ids[:, :-1], ids[:, 1:], [self._cuts(row) for row in ids[:, :-1]])

    def _place(self, consumed: int) -> int:
        epoch, position = divmod(consumed, self.count)
        return shuffled(position, self.count, (self._job.seed, epoch))

    def _cuts(self, inputs_L: npt.NDArray[np.int64]) -> list[int]:
        begins = np.flatnonzero(inputs_L == self.tokens.bos)
        return [0, *(int(at) for at in begins if at > 0), len(inputs_L)]


def shuffled(position: int, size: int, key: tuple[int, int]) -> int:
    """Return where `position` lands in a permutation of `range(size)`, one for each key.

    A Feistel network permutes the next power of four; whoever lands beyond `size` goes through it
    again. That needs no memory, however many samples there are.

    >>> sorted(shuffled(i, 10, (1, 0)) for i in range(10)) == list(range(10))
    True
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for turn in range(6):
            word = struct.pack("<QQQQ", *key, turn, right)
            left, right = right, left ^ (xxhash.xxh3_64_intdigest(word) & mask)
        position = left << half | right
        if position < size:
            return position


def open_tokens(
    data: tuple[str, ...] | str | None,
    tokenizer: Tokenizer,
    cache_dir: str,
    check: Callable[[], None],
) -> Tokens:
    """Return the tokens of the text; on each node only the first to ask tokenises.

    Args:
        data: `spec.trainer.data`.
        tokenizer: what cuts the text.
        cache_dir: where this node keeps token files; "" keeps none.
        check: called a few times per 0.1 s while this process tokenises, or another one does;
            may raise. What was tokenised by then is lost.

    Raises:
        MisconfiguredError: if the text is missing, empty, or not text.
    """
    text = Text(data)
    if not cache_dir:
        with tempfile.TemporaryFile() as file:
            _write(file, text, tokenizer, check)
            return _map(file, tokenizer.bos)
    parts = [_MAGIC.hex(), tokenizer.digest, text.fingerprint]
    key = hashlib.sha256(msgspec.json.encode(parts)).hexdigest()
    path = Path(cache_dir) / f"tokens-{key[:32]}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_suffix(".lock"), check):
            if not path.exists():
                _make(path, text, tokenizer, check)
    with path.open("rb") as file:
        return _map(file, tokenizer.bos)


@contextlib.contextmanager
def _lock(path: Path, check: Callable[[], None]) -> Iterator[None]:
    # The kernel drops the lock of a process that is killed, so nobody waits for the dead.
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                check()
                time.sleep(_POLL_S)
        yield


def _make(path: Path, text: Text, tokenizer: Tokenizer, check: Callable[[], None]) -> None:
    # One name for all attempts: only the holder of the lock writes, over what a killed one left.
    unfinished = path.with_suffix(".tmp")
    try:
        with unfinished.open("w+b") as file:
            _write(file, text, tokenizer, check)
            os.fsync(file.fileno())
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    unfinished.rename(path)


def _write(file: IO[bytes], text: Text, tokenizer: Tokenizer, check: Callable[[], None]) -> None:
    digest = xxhash.xxh3_128(tokenizer.digest.encode())
    count = 0
    file.seek(_HEAD_BYTES)
    for document in text.documents():
        pieces = []
        # A piece takes some 50 ms; the tokens are those of the whole, which is cut there anyway.
        for at in range(0, len(document), PIECE_CHARS_MAX):
            check()
            pieces.append(tokenizer.encode(document[at : at + PIECE_CHARS_MAX]))
        ids = np.concatenate(([tokenizer.bos], *pieces, [tokenizer.eos]))
        content = ids.astype("<u4").tobytes()
        digest.update(content)
        file.write(content)
        count += len(ids)
    file.seek(0)
    file.write(_HEAD.pack(_MAGIC, count, digest.digest()))
    file.flush()


def _map(file: IO[bytes], bos: int) -> Tokens:
    file.seek(0)
    head = file.read(_HEAD.size)
    size = file.seek(0, os.SEEK_END)
    magic, count, digest = _HEAD.unpack(head) if len(head) == _HEAD.size else (b"", 0, b"")
    if magic != _MAGIC or size != _HEAD_BYTES + 4 * count:
        raise OSError(f"not a token file of this version, {size} bytes: {file.name}")
    ids = np.memmap(file, "<u4", "r", offset=_HEAD_BYTES, shape=(count,))
    return Tokens(ids, digest.hex(), bos)
