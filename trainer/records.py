"""Reads the documents of one file, and says of each that is none what is wrong with it."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import msgspec

DOCUMENT_BYTES_MAX = 1 << 30
_SKIPPED_BYTES = 1 << 20


class Bad(NamedTuple):
    """What stands where a document should."""

    what: str
    """What was found and what was expected, with the line or row."""
    hint: str


Record = str | Bad
Reader = Callable[[Any], Iterator[Record]]
"""Gets a file that is open for reading bytes, whatever fsspec made of it."""


def reader(form: str, field: str) -> Reader:
    """Return what reads files of a form.

    Args:
        form: `text`, `jsonl` or `parquet`.
        field: the field or column that holds the text.

    Returns:
        A function that yields a document, or what is wrong with it, for the file, for each line
        that is not blank, or for each row. What it can not read further ends it with a `Bad`.
    """
    match form:
        case "jsonl":
            return partial(_lines, field=field)
        case "parquet":
            return partial(_rows, field=field)
    return _whole


def _whole(file: Any) -> Iterator[Record]:  # noqa: ANN401 - whatever fsspec opened
    content = file.read(DOCUMENT_BYTES_MAX + 1)
    if len(content) > DOCUMENT_BYTES_MAX:
        yield _too_long("write it as .jsonl or .parquet, with a document per line or row")
        return
    yield _decoded(content)


def _decoded(content: bytes) -> Record:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        return Bad(f"not UTF-8 text at byte {error.start}", "convert it, or name other files")
    if "\0" in text:
        return Bad(
            f"zero byte at character {text.index(chr(0))}, expected text",
            "is it a binary file with the name of a text?",
        )
    return text


def _lines(file: Any, *, field: str) -> Iterator[Record]:  # noqa: ANN401 - the same
    document = msgspec.defstruct("Document", [("text", str)], rename={"text": field})
    decode = msgspec.json.Decoder(document).decode
    hint = f'each line is an object: {{"{field}": "..."}}'
    for number, line in enumerate(_cut(file), 1):
        if line is None:
            yield _too_long("cut the line into several", f"line {number}: ")
        elif line.strip():
            try:
                text: str = decode(line).text  # type: ignore[attr-defined]
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                yield Bad(f"line {number}: {_what_is_wrong(line, error)}", hint)
            else:
                yield text


def _cut(file: Any) -> Iterator[bytes | None]:  # noqa: ANN401 - the same
    """Yield lines, None for one that is too long to be held.

    The files of fsspec's remote file systems would read one without a bound.
    """
    buffered = io.BufferedReader(file)
    try:
        while line := buffered.readline(DOCUMENT_BYTES_MAX + 1):
            if len(line) <= DOCUMENT_BYTES_MAX:
                yield line
                continue
            yield None
            while line and not line.endswith(b"\n"):
                line = buffered.readline(_SKIPPED_BYTES)
    finally:
        buffered.detach()  # whoever opened the file closes it


def _what_is_wrong(line: bytes, error: Exception) -> str:
    """Return why a line is no JSON; msgspec takes half a surrogate pair for a line that was cut."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if line.startswith(codecs.BOM_UTF8):
        return "begins with a byte order mark (BOM), expected UTF-8 without one"
    try:
        json.dumps(json.loads(line), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "half a surrogate pair, which stands for no character"
    except (ValueError, RecursionError):
        pass  # no JSON to this reader either, and the first one's words say where
    return str(error)


def _rows(file: Any, *, field: str) -> Iterator[Record]:  # noqa: ANN401 - the same
    # Imported only where it is needed: it is large, and starts threads.
    import pyarrow as pa  # noqa: PLC0415
    from pyarrow import parquet  # noqa: PLC0415

    hint = f"a Parquet source has a column `{field}` of strings"
    try:
        table = parquet.ParquetFile(file)
        if field not in table.schema_arrow.names:
            columns = ", ".join(table.schema_arrow.names)
            yield Bad(f"columns are {columns}, expected `{field}`", hint)
            return
        number = 0
        for batch in table.iter_batches(1024, columns=[field]):
            for value in batch.column(0):
                number += 1
                yield _row(value, f"row {number}: ", field, hint)
    except pa.ArrowException as error:
        yield _not_parquet(error, hint)
    except OSError as error:
        if type(error) is not OSError or error.errno is not None:
            raise
        yield _not_parquet(error, hint)  # Arrow's own word for bytes that make no sense


def _not_parquet(error: Exception, hint: str) -> Bad:
    return Bad(f"not Parquet: {' '.join(str(error).split())}", hint)


def _row(value: Any, where: str, field: str, hint: str) -> Record:  # noqa: ANN401 - an Arrow scalar
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        # A column's type is what its writer said of it; nobody checked.
        return Bad(f"{where}not UTF-8 text: {error.reason}", hint)
    if not isinstance(text, str | None):
        return Bad(f"{where}`{field}` holds {type(text).__name__}, expected strings", hint)
    if text and _bytes_of(text) > DOCUMENT_BYTES_MAX:
        return _too_long("cut it into several rows", where)
    return text or ""


def _bytes_of(text: str) -> int:
    """Return the length in UTF-8, for a text that may be too long; a lower bound for others."""
    return len(text.encode()) if len(text) * 4 > DOCUMENT_BYTES_MAX else len(text)


def _too_long(hint: str, where: str = "") -> Bad:
    return Bad(f"{where}one document of more than {DOCUMENT_BYTES_MAX >> 30} GiB", hint)
