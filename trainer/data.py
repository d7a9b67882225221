"""Turns text into the samples of a run, so that they do not depend on how many ranks read them.

A sample is `seqLen` inputs and the tokens that follow them. Which source the sample with a number
comes from is a formula (mixing.py); where it lies there is one of (seed, epoch, offset), by a
permutation per epoch that is computed, not stored (windows.py). So the whole state of the data is
the number of samples consumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from orchestrator.protocol import runfile
from orchestrator.protocol.ramp import Ramp
from orchestrator.worker import MisconfiguredError
from trainer.joined import Ids
from trainer.kept import Memory
from trainer.mixing import Mixture
from trainer.retrying import ATTEMPTS, ATTEMPTS_KNOWN, SourceUnavailableError
from trainer.text import Text
from trainer.tokenizer import Tokenizer
from trainer.tokens import PART_BYTES, Room, TokenFile, Tokens, join
from trainer.windows import Span, Windows

_POLL_S = 0.01
_SOURCE_SHIFT = 48
"""Above the bits of any seed: each source has permutations of its own."""
Wanted = runfile.Data | tuple[str, ...] | str | None


class Batch(NamedTuple):
    """Some samples of a global batch. B samples, L sequence length."""

    inputs: npt.NDArray[np.int64]
    """Shape [B, L]."""
    targets: npt.NDArray[np.int64]
    """The tokens that follow, shape [B, L]."""
    cuts: list[list[int]]
    """Per sample, the borders of its documents, from 0 to L (Llama.forward)."""


class Batches(Protocol):
    """Who has the samples of a step; `Samples` does, and whatever reads them ahead."""

    @property
    def mark(self) -> float:
        """A number that differs if the data does."""

    def batch(self, step: int, indices: range) -> Batch:
        """Return the samples at these indices of the global batch of `step` (1-based)."""


class Samples:
    """The samples of a run in their order.

    Args:
        tokens: the text, or that of each source.
        job: `spec.trainer`; its seed, batch and sequence length count, and whether to shuffle.

    Raises:
        MisconfiguredError: if a source is too short for a single sample.
    """

    def __init__(self, tokens: Tokens | Sequence[Tokens], job: runfile.Trainer) -> None:
        self.sources = [tokens] if isinstance(tokens, Tokens) else list(tokens)
        self.mixture = Mixture([source.weight for source in self.sources])
        self.counts = [(len(source.ids) - 1) // job.seq_len for source in self.sources]
        """Samples of an epoch of each source, of the length that they begin with."""
        self.digest = digest(self.sources)
        self._ramp = Ramp.of(job)
        longest = max(length for _, length in self._ramp.lengths)
        for source in self.sources:
            if len(source.ids) <= longest:
                where = f"spec.trainer.data{f', source {source.name}' if source.name else ''}"
                raise MisconfiguredError(
                    f"{where} has {len(source.ids)} tokens, "
                    f"expected more than spec.trainer.seqLen = {longest}",
                    hint="add text, or shorten the sequences",
                )
        shuffle = settings(job.data).shuffle
        starts = [self.mixture.offsets(sample) for sample, _ in self._ramp.lengths]
        self._windows = [
            Windows(
                len(source.ids) - 1,
                [
                    (start[at], length)
                    for start, (_, length) in zip(starts, self._ramp.lengths, strict=True)
                ],
                job.seed ^ at << _SOURCE_SHIFT if shuffle else None,
            )
            for at, source in enumerate(self.sources)
        ]

    @property
    def mark(self) -> float:
        """The first 48 bits of the digest, which a float64 holds exactly."""
        return float(int(self.digest[:12], 16))

    def batch(self, step: int, indices: range) -> Batch:
        """Return the samples at these indices of the global batch of `step` (1-based)."""
        first = self._ramp.consumed(step - 1)
        places = [self.place(first + index) for index in indices]
        rows = [(self.sources[at].ids, spans) for at, spans in places]
        return cut(rows, self.sources[0].bos)

    def place(self, sample: int) -> tuple[int, list[Span]]:
        """Return the source of a sample of the run, and which of the source's tokens it has."""
        source, offset = self.mixture.place(sample)
        return source, self._windows[source](offset)

    def epochs(self, samples: int) -> tuple[int, ...]:
        """Return how often each source has been gone through after so many samples, in full."""
        offsets = self.mixture.offsets(samples)
        return tuple(own.epoch(o) for o, own in zip(offsets, self._windows, strict=True))


def cut(rows: Sequence[tuple[Ids, Sequence[Span]]], bos: int) -> Batch:
    """Return samples, each of some pieces of all tokens of its source; all are equally long.

    Pieces are documents by themselves, as far as attention goes.
    """
    pieces = [[ids[start : stop + 1] for start, stop in spans] for ids, spans in rows]
    inputs, targets = (
        np.stack([np.concatenate([piece[part] for piece in row]) for row in pieces])
        for part in (slice(None, -1), slice(1, None))
    )
    cuts = []
    for row, tokens in zip(pieces, inputs, strict=True):
        begins = tokens == bos
        begins[np.cumsum([len(piece) - 1 for piece in row[:-1]], dtype=np.int64)] = True
        begins[0] = False
        cuts.append([0, *np.flatnonzero(begins).tolist(), len(tokens)])
    return Batch(inputs.astype(np.int64), targets.astype(np.int64), cuts)


def digest(sources: Sequence[Tokens]) -> str:
    """Return a digest of all text and how it is mixed; that of the only source is its own."""
    if len(sources) == 1:
        return sources[0].digest
    parts = "\n".join(f"{source.digest} {source.weight!r}" for source in sources)
    return xxhash.xxh3_128_hexdigest(parts.encode())


def settings(data: Wanted) -> runfile.Data:
    """Return how data is to be handled, which the short forms leave at its defaults."""
    return data if isinstance(data, runfile.Data) else runfile.Data(sources=())


def open_data(
    data: Wanted, tokenizer: Tokenizer, cache_dir: str, check: Callable[[], None]
) -> list[Tokens]:
    """Return the tokens of every source; addresses in a short form are one source together.

    Args:
        data: `spec.trainer.data`.
        tokenizer: what cuts the text.
        cache_dir: where this node keeps token files; "" keeps none.
        check: called a few times per 0.1 s while this process tokenises, or another one does;
            may raise. What was tokenised by then is lost.

    Raises:
        MisconfiguredError: if a source is missing, empty, not text, or too much for the disk.
        SourceUnavailableError: if one does not answer, and this node does not have its tokens.
    """
    how = settings(data)
    size = how.cache_gib_max * (1 << 30) if how.cache_gib_max is not None else None
    room = Room(Path(cache_dir) if cache_dir else None, size)
    named = list(data.sources) if isinstance(data, runfile.Data) else [None]
    found = [_find(data, source, tokenizer, room, check) for source in named]
    files = [file for each in found for file in each.files]
    room.require(sum(file.missing_bytes for file in files), at_least=True)
    # Whoever finds one in the hands of another process takes the next.
    waiting = [file for file in files if not file.make(check)]
    while waiting:
        check()
        time.sleep(_POLL_S)
        waiting = [file for file in waiting if not file.make(check)]
    return [each.open(room, check) for each in found]


class _Found(NamedTuple):
    """A source as this node found it, or remembers it."""

    source: runfile.DataSource | None
    """None for all addresses of a short form."""
    memory: Memory
    files: list[TokenFile]
    recalled: list[Tokens]
    """Instead of files: what this node has, of a source that does not answer."""

    def open(self, room: Room, check: Callable[[], None]) -> Tokens:
        """Return its tokens, which are made."""
        parts = self.recalled or [file.open(check) for file in self.files]
        if self.files:
            self.memory.keep(self.files)
        source = self.source
        tokens = join(parts, room.folder, source.uri if source else "all addresses")
        return tokens._replace(name=source.uri, weight=source.weight) if source else tokens


def _find(
    data: Wanted,
    source: runfile.DataSource | None,
    tokenizer: Tokenizer,
    room: Room,
    check: Callable[[], None],
) -> _Found:
    how = settings(data)
    what = data if source is None else [source.uri, source.format, source.field]
    memory = Memory(room, [what, tokenizer.digest, how.validation, how.on_bad_record])
    try:
        text = _text(data, source, check, ATTEMPTS_KNOWN if memory.files else ATTEMPTS)
    except SourceUnavailableError as error:
        return _Found(source, memory, [], memory.recall(tokenizer.bos, error))
    parts = text.parts(PART_BYTES)
    files = [TokenFile(part, tokenizer, room, held=how.validation) for part in parts]
    return _Found(source, memory, files, [])


def open_tokens(
    data: tuple[str, ...] | str | None,
    tokenizer: Tokenizer,
    cache_dir: str,
    check: Callable[[], None],
) -> Tokens:
    """Return the tokens of the only source; see `open_data`."""
    (tokens,) = open_data(data, tokenizer, cache_dir, check)
    return tokens


def _text(
    data: Wanted, source: runfile.DataSource | None, check: Callable[[], None], attempts: int
) -> Text:
    skip = settings(data).on_bad_record == "skip"
    if source is None:
        assert not isinstance(data, runfile.Data)
        return Text(data, skip=skip, check=check, attempts=attempts)
    return Text(
        source.uri,
        form=source.format,
        field=source.field,
        skip=skip,
        check=check,
        attempts=attempts,
    )
