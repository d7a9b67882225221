"""Finds the text that a run trains on, and reads it document by document.

Sources are files, folders or globs, local or behind any fsspec address. A .txt, .py or .md file is
one document, and so is each line of a .jsonl file and each row of a .parquet file.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import xxhash

from orchestrator.worker import MisconfiguredError
from trainer.finding import FORMATS, HINT, WHERE, Source, find, shown, version_of
from trainer.records import Bad, Reader, Record, reader
from trainer.retrying import (
    ATTEMPTS,
    is_of_source,
    may_pass,
    patiently,
    words,
)

DEMO_CHARS = 1 << 21
"""The demo's text ends here, so that it is tokenised in about a second."""
BAD_SHOWN = 3
"""Of the records that are skipped, so many are told with what is wrong with them."""


class FileAccount(msgspec.Struct, frozen=True, kw_only=True):
    """What one file came to."""

    path: str
    """As it can be printed."""
    digest: str
    """Of its documents, whatever their form."""
    documents: int
    empty: int
    """Documents of nothing but white space, which are left out."""
    bad: int
    """Records that are no documents, and were skipped."""


class Text:
    """What a run trains on. Finding it reads no document yet.

    Args:
        data: addresses; None for the demo's text.
        form: `text`, `jsonl` or `parquet`; None to go by the ends of the names.
        field: the field or column that holds the text.
        skip: leave out what can not be read, and count it, instead of stopping.
        check: called a few times per 0.1 s while a source does not answer; may raise.
        attempts: how often a source is asked whether it is there.

    Raises:
        MisconfiguredError: if an address leads nowhere, or to nothing that can be read.
        SourceUnavailableError: if one does not answer.
    """

    def __init__(
        self,
        data: tuple[str, ...] | str | None,
        *,
        form: str | None = None,
        field: str = "text",
        skip: bool = False,
        check: Callable[[], None] = lambda: None,
        attempts: int = ATTEMPTS,
    ) -> None:
        self.demo = data is None
        self._form, self._field, self._skip, self._check = form, field, skip, check
        addresses = (data,) if isinstance(data, str) else data
        if addresses is None:
            addresses = (f"{sysconfig.get_paths()['stdlib']}/*.py",)
        # An empty address would mean the current folder, of whatever process happens to ask.
        if not all(addresses) or not addresses:
            raise MisconfiguredError(f"{WHERE} names nothing", hint=HINT)
        self.sources = [
            source for address in addresses for source in find(address, form, check, attempts)
        ]
        self.is_part = False
        """Whether it is some files of a text: then nothing to read in them is no reason to stop."""
        self.accounts: list[FileAccount] = []
        """Of the files that were read to their ends, in order."""
        self.bad_shown: list[str] = []
        """The first records that were skipped: where, and what is wrong with them."""

    @property
    def fingerprint(self) -> str:
        """Sixty-four hex digits that change when any source does, or how it is read."""
        # As bytes: a name on a Linux disk need not be UTF-8, and stands for surrogates here then.
        parts = [[s.path.encode(errors="surrogatepass"), s.fingerprint] for s in self.sources]
        how = [self.demo, self._form, self._field, self._skip]
        return hashlib.sha256(msgspec.json.encode([how, parts])).hexdigest()

    @property
    def bytes(self) -> int:
        """How long the files are together, as far as their file systems say."""
        known = sum(source.size for source in self.sources)
        return min(known, DEMO_CHARS) if self.demo else known

    def parts(self, size: int) -> list[Text]:
        """Cut it between files into parts of at least `size` bytes, but for the last; in order."""
        parts: list[list[Source]] = [[]]
        room = size
        for source in self.sources:
            if room <= 0:
                parts.append([])
                room = size
            parts[-1].append(source)
            room -= source.size
        if self.demo or len(parts) == 1:
            return [self]
        return [self._part(sources) for sources in parts]

    def _part(self, sources: list[Source]) -> Text:
        part = copy.copy(self)
        part.sources, part.is_part = sources, True
        part.accounts, part.bad_shown = [], []
        return part

    def documents(self) -> Iterator[str]:
        """Yield the documents in order of their addresses, files sorted by name.

        Raises:
            MisconfiguredError: if a source is not what its name says, or an address has no text.
            SourceUnavailableError: if one does not answer.
        """
        self.accounts.clear()
        self.bad_shown.clear()
        left = DEMO_CHARS
        for address, sources in itertools.groupby(self.sources, lambda source: source.address):
            found = False
            for document in itertools.chain.from_iterable(map(self._read, sources)):
                found = True
                if self.demo:
                    document = document[:left]  # noqa: PLW2901 - the demo's last one is cut
                    left -= len(document)
                yield document
                if left == 0:
                    return
            if not found and not self.is_part:
                raise no_text(address)

    def _read(self, source: Source) -> Iterator[str]:
        """Yield the documents of a file, and account for it."""
        digest = xxhash.xxh3_64()
        documents = empty = bad = 0
        for record in self._records(source):
            if isinstance(record, Bad):
                self._refuse(record, source)
                bad += 1
            elif not record.strip():
                empty += 1
            else:
                digest.update(record.encode())
                digest.update(b"\0")
                documents += 1
                yield record
        self.accounts.append(
            FileAccount(
                path=shown(source.path),
                digest=digest.hexdigest(),
                documents=documents,
                empty=empty,
                bad=bad,
            )
        )

    def _refuse(self, record: Bad, source: Source) -> None:
        if not self._skip:
            raise MisconfiguredError(
                f"{WHERE}: {record.what}: {shown(source.path)}", hint=record.hint
            )
        if len(self.bad_shown) < BAD_SHOWN:
            self.bad_shown.append(f"{record.what}: {shown(source.path)}")

    def _records(self, source: Source) -> Iterator[Record]:
        """Yield what a file has, from where it broke off if it did, and see that it is one file."""
        where = shown(source.path)
        read = reader(self._form or FORMATS[Path(source.path).suffix], self._field)
        opened, done = _opened(source, read, 0), 0
        while True:
            try:
                record = next(opened, None)
            except Exception as error:
                if may_pass(error):
                    print(  # noqa: T201 - the rank's log
                        f"data: broke off after {done} records, {words(error)}: {where}",
                        file=sys.stderr,
                    )
                    record, opened = patiently(
                        partial(_reopened, source, read, done), self._check, where
                    )
                elif is_of_source(error):
                    yield Bad(_words(error), HINT)
                    return
                else:
                    raise
            if record is None:
                break
            done += 1
            yield record
        self._require_unchanged(source, where)

    def _require_unchanged(self, source: Source, where: str) -> None:
        source.files.invalidate_cache()
        info = patiently(partial(source.files.info, source.path), self._check, where)
        if (found := version_of(info)) != source.version:
            raise MisconfiguredError(
                f"{WHERE}: changed while it was read, expected {source.version}, "
                f"found {found}: {where}",
                hint="let whatever writes it finish first",
            )


def no_text(address: str) -> MisconfiguredError:
    """Return what is wrong with an address where nothing was found to train on."""
    return MisconfiguredError(
        f"{WHERE}: no text, expected at least one document: {address}", hint=HINT
    )


def _opened(source: Source, read: Reader, skip: int) -> Iterator[Record]:
    """Yield the records of a file from the one after the first `skip`."""
    with source.files.open(source.path, "rb") as file:
        yield from itertools.islice(read(file), skip, None)


def _reopened(source: Source, read: Reader, skip: int) -> tuple[Record | None, Iterator[Record]]:
    """Return the record after the first `skip`, and those that follow it."""
    opened = _opened(source, read, skip)
    return next(opened, None), opened


def _words(error: BaseException) -> str:
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
