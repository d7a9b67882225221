"""Whatever lies in a file, its reader makes documents of it, or says what is wrong, and ends."""

import io
import json

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from trainer.records import Bad, reader

TEXTS = ["one", "zwei, über drei", "", "x" * 300]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def written() -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.table({"text": TEXTS, "id": [1, 2, 3, 4]}), file)
    return file.getvalue()


TABLE = written()


def read(form: str, content: bytes) -> None:
    for record in reader(form, "text")(io.BytesIO(content)):
        if isinstance(record, Bad):
            assert record.what
            assert record.hint
            assert "\n" not in record.what
        else:
            record.encode()  # text that can be tokenised, and written as JSON


def test_what_the_mutations_start_from_is_read() -> None:
    assert list(reader("jsonl", "text")(io.BytesIO(LINES))) == TEXTS
    assert list(reader("parquet", "text")(io.BytesIO(TABLE))) == TEXTS


@given(st.binary(max_size=200), st.sampled_from(["text", "jsonl", "parquet"]))
def test_any_bytes_are_read_or_refused(content: bytes, form: str) -> None:
    read(form, content)


@settings(max_examples=120)
@given(
    st.sampled_from([("jsonl", LINES), ("parquet", TABLE), ("text", LINES)]),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=8)), max_size=4),
    st.integers(0, 1 << 16),
)
def test_a_file_that_was_whole_once_is_read_or_refused(
    whole: tuple[str, bytes], changes: list[tuple[int, bytes]], cut: int
) -> None:
    form, content = whole
    spoilt = bytearray(content)
    for at, piece in changes:
        at %= len(spoilt)  # noqa: PLW2901 - a place in it
        spoilt[at : at + len(piece)] = piece
    read(form, bytes(spoilt[: cut % (len(spoilt) + 1)]))
    read(form, bytes(spoilt))
