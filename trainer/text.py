"""Finds the text that a run trains on, and reads it document by document.

Sources are files, folders or globs, local or behind any fsspec address. A .txt, .py or .md file is
one document, and so is each line of a .jsonl file and each row of a .parquet file.
"""

from __future__ import annotations

import copy
import glob
import hashlib
import itertools
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import msgspec
import xxhash

from orchestrator.worker import Aborted, MisconfiguredError
from trainer.records import Bad, Reader, Record, reader
from trainer.retrying import SourceUnavailableError, is_of_source, may_pass, patiently, words

FORMATS = {".txt": "text", ".py": "text", ".md": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
SUFFIXES = tuple(FORMATS)
DEMO_CHARS = 1 << 21
"""The demo's text ends here, so that it is tokenised in about a second."""
BAD_SHOWN = 3
"""Of the records that are skipped, so many are told with what is wrong with them."""
_CONTENT = ("ETag", "etag", "md5Hash", "checksum")
_TIMES = ("mtime", "created", "LastModified", "last_modified")
_WHERE = "spec.trainer.data"
_HINT = f"name files, folders or globs of {', '.join(SUFFIXES)}; fsspec addresses work too"


@dataclass(frozen=True, slots=True)
class Source:
    """One file with text."""

    address: str
    """What the run file names; several sources may come from one address."""
    files: Any
    """The fsspec file system that it is on."""
    path: str
    info: dict[str, Any]
    """What its file system knows of it without reading it."""

    @property
    def fingerprint(self) -> str:
        """Changes when the file does, as far as that can be told."""
        return str(sorted((str(key), str(value)) for key, value in self.info.items()))

    @property
    def version(self) -> str:
        """The same in few words, and equal when asked for again."""
        return _version(self.info)

    @property
    def size(self) -> int:
        """In bytes; 0 if its file system does not say."""
        return self.info.get("size") or 0


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
    ) -> None:
        self.demo = data is None
        self._form, self._field, self._skip, self._check = form, field, skip, check
        addresses = (data,) if isinstance(data, str) else data
        if addresses is None:
            addresses = (f"{sysconfig.get_paths()['stdlib']}/*.py",)
        # An empty address would mean the current folder, of whatever process happens to ask.
        if not all(addresses) or not addresses:
            raise MisconfiguredError(f"{_WHERE} names nothing", hint=_HINT)
        self.sources = [source for address in addresses for source in self._find(address)]
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
                path=_shown(source.path),
                digest=digest.hexdigest(),
                documents=documents,
                empty=empty,
                bad=bad,
            )
        )

    def _refuse(self, record: Bad, source: Source) -> None:
        if not self._skip:
            raise MisconfiguredError(
                f"{_WHERE}: {record.what}: {_shown(source.path)}", hint=record.hint
            )
        if len(self.bad_shown) < BAD_SHOWN:
            self.bad_shown.append(f"{record.what}: {_shown(source.path)}")

    def _records(self, source: Source) -> Iterator[Record]:
        """Yield what a file has, from where it broke off if it did, and see that it is one file."""
        where = _shown(source.path)
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
                    yield Bad(_words(error), _HINT)
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
        if (found := _version(info)) != source.version:
            raise MisconfiguredError(
                f"{_WHERE}: changed while it was read, expected {source.version}, "
                f"found {found}: {where}",
                hint="let whatever writes it finish first",
            )

    def _find(self, address: str) -> list[Source]:
        try:
            files, path = fsspec.core.url_to_fs(address)
            infos = patiently(partial(_listed, files, path), self._check, address)
            others = [p for p, info in infos.items() if _is_other(files, p, info)]
        except SourceUnavailableError as error:
            raise SourceUnavailableError(f"{_WHERE}: {error}", error.hint) from error
        except (OSError, ValueError, ImportError) as error:
            raise MisconfiguredError(f"{_WHERE}: {error}: {address}", hint=_HINT) from error
        except Aborted:
            raise
        except Exception as error:
            # fsspec knows some thirty schemes; what one makes of a bad address is its own affair.
            why = f"{type(error).__name__}: {error}"
            raise MisconfiguredError(f"{_WHERE}: {why}: {address}", hint=_HINT) from error
        if list(infos) == [path]:
            _require_text(path, is_file=not others, any_end=self._form is not None)
        sources = [
            Source(address, files, p, infos[p])
            for p in sorted(infos.keys() - others)
            if p.endswith(SUFFIXES) or (self._form is not None and list(infos) == [path])
        ]
        if not sources:
            raise MisconfiguredError(
                f"{_WHERE}: nothing there, expected text ({', '.join(SUFFIXES)}): {address}",
                hint="the address is looked up on every node; a relative path may differ there",
            )
        return sources


def no_text(address: str) -> MisconfiguredError:
    """Return what is wrong with an address where nothing was found to train on."""
    return MisconfiguredError(
        f"{_WHERE}: no text, expected at least one document: {address}", hint=_HINT
    )


def _version(info: dict[str, Any]) -> str:
    """Return what tells one version of a file from another, however fsspec came to know of it.

    What a listing says of a file has other fields than what is said of the file alone.
    """
    kept = [name for name in _CONTENT if info.get(name) is not None]
    kept = kept[:1] or [name for name in _TIMES if info.get(name) is not None][:1]
    return ", ".join([f"{info.get('size')} bytes", *(f"{name} {info[name]}" for name in kept)])


def _opened(source: Source, read: Reader, skip: int) -> Iterator[Record]:
    """Yield the records of a file from the one after the first `skip`."""
    with source.files.open(source.path, "rb") as file:
        yield from itertools.islice(read(file), skip, None)


def _reopened(source: Source, read: Reader, skip: int) -> tuple[Record | None, Iterator[Record]]:
    """Return the record after the first `skip`, and those that follow it."""
    opened = _opened(source, read, skip)
    return next(opened, None), opened


def _listed(files: Any, path: str) -> dict[str, Any]:  # noqa: ANN401 - as fsspec made it
    """Return what fsspec knows of all that is meant by a path, by its own path."""
    if glob.has_magic(path):
        return dict(files.glob(path, detail=True))
    try:
        # Unlike `isfile`, it does not take a server that is busy for one that has no such file.
        info = files.info(path)
    except FileNotFoundError as error:
        if may_pass(error):
            raise
        return {}
    if info.get("type") == "directory":
        # What begins with a dot is not meant to be seen: .git and the like.
        found = files.find(path, detail=True)
        return {p: info for p, info in found.items() if "/." not in p[len(path) :]}
    return {path: info}


def _is_other(files: Any, path: str, info: dict[str, Any]) -> bool:  # noqa: ANN401 - the same
    """Whether it is no file; a link that leads nowhere is kept: reading it says so."""
    match info.get("type"):
        case "file" | "link":
            return False
        case "directory":
            return True
    # In a local folder links are of type `other`, wherever they lead.
    return is_no_file(files, path)


def is_no_file(files: Any, path: str) -> bool:  # noqa: ANN401 - the same
    """Whether something else than a file is there, a pipe say, that a read might wait on for ever.

    Args:
        files: the fsspec file system.
        path: on it.
    """
    return bool(files.exists(path)) and not files.isfile(path)


def _require_text(path: str, *, is_file: bool, any_end: bool) -> None:
    if not is_file:
        raise MisconfiguredError(f"{_WHERE}: neither file nor folder: {_shown(path)}", hint=_HINT)
    if not any_end and not path.endswith(SUFFIXES):
        raise MisconfiguredError(
            f"{_WHERE}: ends in {Path(path).suffix or 'nothing'!r}, expected one of "
            f"{', '.join(SUFFIXES)}: {_shown(path)}",
            hint=f"{_HINT}, or say which `format` it is",
        )


def _shown(path: str) -> str:
    """Return a path as it can be printed, and sent: not every name is text."""
    return path if path.isprintable() else ascii(path)


def _words(error: BaseException) -> str:
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
