"""Finds the text that a run trains on, and reads it document by document.

Sources are files, folders or globs, local or behind any fsspec address. A .txt, .py or .md file is
one document, and so is each line of a .jsonl file and each row of a .parquet file (their `text`).
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import msgspec

from orchestrator.worker import MisconfiguredError

SUFFIXES = (".txt", ".py", ".md", ".jsonl", ".parquet")
DEMO_CHARS = 1 << 21
"""The demo's text ends here, so that it is tokenised in about a second."""
DOCUMENT_BYTES_MAX = 1 << 30
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
    fingerprint: str
    """Changes when the file does, as far as its file system can tell without reading it."""


class Text:
    """What a run trains on. Finding it reads no document yet."""

    def __init__(self, data: tuple[str, ...] | str | None) -> None:
        """Find the sources.

        Raises:
            MisconfiguredError: if an address leads nowhere, or to nothing that can be read.
        """
        self.demo = data is None
        addresses = (data,) if isinstance(data, str) else data
        if addresses is None:
            addresses = (f"{sysconfig.get_paths()['stdlib']}/*.py",)
        # An empty address would mean the current folder, of whatever process happens to ask.
        if not all(addresses) or not addresses:
            raise MisconfiguredError(f"{_WHERE} names nothing", hint=_HINT)
        self.sources = [source for address in addresses for source in _find(address)]

    @property
    def fingerprint(self) -> str:
        """Sixty-four hex digits that change when any source does."""
        # As bytes: a name on a Linux disk need not be UTF-8, and stands for surrogates here then.
        parts = [[s.path.encode(errors="surrogatepass"), s.fingerprint] for s in self.sources]
        return hashlib.sha256(msgspec.json.encode([self.demo, parts])).hexdigest()

    def documents(self) -> Iterator[str]:
        """Yield the documents in order of their addresses, files sorted by name.

        Raises:
            MisconfiguredError: if a source is not what its name says, or an address has no text.
        """
        left = DEMO_CHARS
        for address, sources in itertools.groupby(self.sources, lambda source: source.address):
            found = False
            for document in filter(str.strip, itertools.chain.from_iterable(map(_read, sources))):
                found = True
                if self.demo:
                    document = document[:left]  # noqa: PLW2901 - the demo's last one is cut
                    left -= len(document)
                yield document
                if left == 0:
                    return
            if not found:
                raise MisconfiguredError(
                    f"{_WHERE}: no text, expected at least one document: {address}", hint=_HINT
                )


def _find(address: str) -> list[Source]:
    try:
        files, path = fsspec.core.url_to_fs(address)
        infos = _listed(files, path)
        others = [p for p, info in infos.items() if _is_other(files, p, info)]
    except (OSError, ValueError, ImportError) as error:
        raise MisconfiguredError(f"{_WHERE}: {error}: {address}", hint=_HINT) from error
    except Exception as error:
        # fsspec knows some thirty schemes; what one makes of a bad address is its own affair.
        why = f"{type(error).__name__}: {error}"
        raise MisconfiguredError(f"{_WHERE}: {why}: {address}", hint=_HINT) from error
    if list(infos) == [path]:
        _require_text(path, is_file=not others)
    sources = [
        Source(address, files, p, str(sorted((str(k), str(v)) for k, v in infos[p].items())))
        for p in sorted(infos.keys() - others)
        if p.endswith(SUFFIXES)
    ]
    if not sources:
        raise MisconfiguredError(
            f"{_WHERE}: nothing there, expected text ({', '.join(SUFFIXES)}): {address}",
            hint="the address is looked up on every node; a relative path may differ there",
        )
    return sources


def _listed(files: Any, path: str) -> dict[str, Any]:  # noqa: ANN401 - as fsspec made it
    """Return what fsspec knows of all that is meant by a path, by its own path."""
    if files.isfile(path):
        return {path: files.info(path)}
    if files.isdir(path):
        # What begins with a dot is not meant to be seen: .git and the like.
        found = files.find(path, detail=True)
        return {p: info for p, info in found.items() if "/." not in p[len(path) :]}
    return dict(files.glob(path, detail=True))


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


def _require_text(path: str, *, is_file: bool) -> None:
    if not is_file:
        raise MisconfiguredError(f"{_WHERE}: neither file nor folder: {_shown(path)}", hint=_HINT)
    if not path.endswith(SUFFIXES):
        raise MisconfiguredError(
            f"{_WHERE}: ends in {Path(path).suffix or 'nothing'!r}, expected one of "
            f"{', '.join(SUFFIXES)}: {_shown(path)}",
            hint=_HINT,
        )


def _shown(path: str) -> str:
    """Return a path as it can be printed, and sent: not every name is text."""
    return path if path.isprintable() else ascii(path)


def _read(source: Source) -> Iterator[str]:
    where = _shown(source.path)
    reader = {".jsonl": _lines, ".parquet": _rows}.get(Path(source.path).suffix, _whole)
    try:
        with source.files.open(source.path, "rb") as file:
            yield from reader(file)
    except MisconfiguredError as error:
        raise MisconfiguredError(f"{_WHERE}: {error}: {where}", hint=error.hint) from None
    except OSError as error:
        raise MisconfiguredError(f"{_WHERE}: {error}: {where}", hint=_HINT) from error


def _whole(file: Any) -> Iterator[str]:  # noqa: ANN401 - whatever fsspec opened
    content = file.read(DOCUMENT_BYTES_MAX + 1)
    if len(content) > DOCUMENT_BYTES_MAX:
        raise _too_long("write it as .jsonl or .parquet, with a document per line or row")
    yield _decoded(content)


def _lines(file: Any) -> Iterator[str]:  # noqa: ANN401 - the same
    for number, line in enumerate(_cut(file), 1):
        if not line.strip():
            continue
        try:
            text = msgspec.json.decode(line, type=_Document).text
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise MisconfiguredError(
                f"line {number}: {_what_is_wrong(line, error)}",
                hint='each line is an object: {"text": "..."}',
            ) from None
        yield text


def _cut(file: Any) -> Iterator[bytes]:  # noqa: ANN401 - the same
    """Yield lines; the files of fsspec's remote file systems would read one without a bound."""
    buffered = io.BufferedReader(file)
    try:
        while line := buffered.readline(DOCUMENT_BYTES_MAX + 1):
            if len(line) > DOCUMENT_BYTES_MAX:
                raise _too_long("cut the line into several")
            yield line
    finally:
        buffered.detach()  # whoever opened the file closes it


def _what_is_wrong(line: bytes, error: Exception) -> str:
    """Return why a line is no JSON; msgspec takes half a surrogate pair for a line that was cut."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    try:
        json.dumps(json.loads(line), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "half a surrogate pair, which stands for no character"
    except (ValueError, RecursionError):
        pass  # no JSON to this reader either, and the first one's words say where
    return str(error)


def _rows(file: Any) -> Iterator[str]:  # noqa: ANN401 - the same
    # Imported only where it is needed: it is large, and starts threads.
    import pyarrow as pa  # noqa: PLC0415
    from pyarrow import parquet  # noqa: PLC0415

    hint = "a Parquet source has a column `text` of strings"
    try:
        table = parquet.ParquetFile(file)
        if "text" not in table.schema_arrow.names:
            columns = ", ".join(table.schema_arrow.names)
            raise MisconfiguredError(f"columns are {columns}, expected `text`", hint=hint)
        for batch in table.iter_batches(1024, columns=["text"]):
            for value in batch.column(0).to_pylist():
                if not isinstance(value, str | None):
                    raise MisconfiguredError(
                        f"`text` holds {type(value).__name__}, expected strings", hint=hint
                    )
                if value and _bytes_of(value) > DOCUMENT_BYTES_MAX:
                    raise _too_long("cut it into several rows")
                yield value or ""
    except UnicodeDecodeError as error:
        # A column's type is what its writer said of it; nobody checked.
        raise MisconfiguredError(f"not UTF-8 text: {error.reason}", hint=hint) from error
    except pa.ArrowException as error:
        raise MisconfiguredError(f"not Parquet: {error}", hint=hint) from error


def _bytes_of(text: str) -> int:
    """Return the length in UTF-8, for a text that may be too long; a lower bound for others."""
    return len(text.encode()) if len(text) * 4 > DOCUMENT_BYTES_MAX else len(text)


def _too_long(hint: str) -> MisconfiguredError:
    return MisconfiguredError(
        f"one document of more than {DOCUMENT_BYTES_MAX >> 30} GiB", hint=hint
    )


class _Document(msgspec.Struct):
    text: str


def _decoded(content: bytes) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise MisconfiguredError(
            f"not UTF-8 text at byte {error.start}", hint="convert it, or name other files"
        ) from None
    if "\0" in text:
        raise MisconfiguredError(
            f"zero byte at character {text.index(chr(0))}, expected text",
            hint="is it a binary file with the name of a text?",
        )
    return text
