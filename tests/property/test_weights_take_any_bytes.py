"""Files of weights from anywhere are read, or refused in one line; memory is taken for neither."""

import io
import pickle
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.worker import MisconfiguredError
from tests.weights import loaded, written
from trainer.config import ModelConfig
from trainer.weights.machine import tensors_of
from trainer.weights.sources import open_weights

torch.set_num_threads(1)
SMALL = ModelConfig(dim=8, layers=1, heads=2, kv_heads=1, ffn_dim=8, vocab=260)
SLOWEST_S, MOST_BYTES = 1.0, 8 << 20
MANY = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    written(folder / "hf", config=SMALL, file_bytes=10_000)
    written(folder / "meta", "meta", SMALL)
    return folder


def refusal(reading: Callable[[], object]) -> MisconfiguredError | None:
    """Return how it is refused, None if it is not; anything else that is raised is raised."""
    try:
        reading()
    except MisconfiguredError as caught:
        error = caught
    else:
        return None
    assert error.hint
    assert len(str(error)) < 1500
    return error


def read(path: Path) -> Exception | None:
    """Read it all; anything but our refusal is raised."""
    began = time.process_time()
    error = refusal(lambda: loaded(open_weights(str(path))))
    assert time.process_time() - began < SLOWEST_S
    assert error is None or str(path) in str(error)
    return error


@st.composite
def spoilt(draw: Callable[[Any], Any], content: bytes) -> bytes:
    """A file that was right until pieces were put in, cut out, doubled, or bytes changed."""
    data = bytearray(content)
    # Most of a file is numbers; what says how to read it is at its two ends.
    at = st.integers(0, len(data)) | st.integers(0, 600) | st.integers(len(data) - 600, len(data))
    for _ in range(draw(st.integers(1, 3))):
        start = min(max(draw(at), 0), len(data))
        change = draw(st.sampled_from(["set", "cut", "double", "number", "end"]))
        if change == "set":
            data[start : start + 1] = draw(st.binary(min_size=1, max_size=3))
        elif change == "number":
            number = draw(st.sampled_from([0, 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1]))
            data[start : start + 8] = struct.pack("<Q", number)
        elif change == "end":
            del data[start:]
        else:
            piece = data[start : start + draw(st.integers(1, 40))]
            data[start : start + len(piece)] = b"" if change == "cut" else piece * 2
    return bytes(data)


def pieces(folder: Path, files: str) -> list[Path]:
    return sorted(folder.glob(files))


@MANY
@given(data=st.data())
@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_a_folder_with_a_spoilt_file_is_read_or_refused(
    folder: Path, layout: str, data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from(pieces(folder, f"{layout}/*")))
    sound = path.read_bytes()
    try:
        path.write_bytes(data.draw(spoilt(sound) | st.binary(max_size=200)))
        read(folder / layout)
    finally:
        path.write_bytes(sound)


def program() -> bytes:
    saved = io.BytesIO()
    torch.save({f"x{n}": torch.ones(2, 3) for n in range(3)}, saved)
    with zipfile.ZipFile(saved) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return archive.read(name)


PROGRAM = program()


@MANY
@given(spoilt(PROGRAM) | st.binary(max_size=300))
def test_any_pickle_is_read_or_refused(content: bytes) -> None:
    error = refusal(lambda: tensors_of(content, "x.pth"))

    assert error is None or "x.pth" in str(error)


TWICE = b"\x80\x02K\x01" + b"q\x00h\x00\x86" * 60
"""A tuple that has a tuple twice, that has a tuple twice, ... sixty times."""


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x80\x02X\xff\xff\xff\xffab.", "it ends at byte 10"),
        (b"\x80\x02\x8e" + b"\xff" * 8 + b"ab.", "instruction b'\\x8e' at byte 2"),
        (b"\x80\x04\x95" + b"\xff" * 8 + b"}.", "instruction b'\\x95' at byte 2"),
        (b"\x80\x02" + b"(" * 5000 + b"t" * 5000 + b".", "a tuple of 1, expected a dictionary"),
        (b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".", "a list of 1, expected a dictionary"),
        (b"\x80\x02}" + TWICE[2:] + b"K\x01s.", "a key that is a tuple of 2"),
        (b"\x80\x02}X\x01\x00\x00\x00x" + TWICE[2:] + b"s.", "'x' is a tuple of 2"),
        (TWICE + b"Q.", "a tuple of 2 beside the pickle"),
        (TWICE + b"K\x01R.", "a call of a tuple of 2 with 1"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00xh\x00s.", "'x' is a dict of 1"),
        (pickle.dumps({"x": 10**300}, 2), "'x' is 1000"),
        (b"", "it ends at byte 0"),
        (b"\x80", "it ends at byte 1"),
        (b"\x80\x09}.", "protocol 9"),
        (b".", "pop from empty list"),
    ],
    ids=lambda given: repr(given[:14]),
)
def test_a_pickle_that_announces_much_is_given_no_memory(content: bytes, says: str) -> None:
    tracemalloc.start()
    began = time.process_time()
    try:
        error = refusal(lambda: tensors_of(content, "x.pth"))
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
        assert time.process_time() - began < SLOWEST_S
    finally:
        tracemalloc.stop()
    assert says in str(error)


@pytest.mark.parametrize("content", [b"\x80\x02}r\xff\xff\xff\x7f.", b"\x80\x02}}b."])
def test_a_pickle_of_nothing_is_read_however_it_puts_it(content: bytes) -> None:
    assert tensors_of(content, "x.pth") == {}


@pytest.mark.parametrize(
    "table",
    [
        b'{"x": {"dtype": "F32", "shape": [4611686018427387904], "data_offsets": [0, 8]}}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 18446744073709551616]}}',
        b'{"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}',
        b'{"x": ' + b"[" * 50_000,
        b"[]",
        b"{}",
        b'{"x": {"dtype": "F32", "shape": ' + b"[1]" * 3000 + b', "data_offsets": [0, 8]}}',
    ],
    ids=lambda table: repr(table[:70]),
)
def test_a_table_that_announces_much_is_given_no_memory(table: bytes, tmp_path: Path) -> None:
    written(tmp_path / "out", config=SMALL)
    path = tmp_path / "out/model.safetensors"
    path.write_bytes(struct.pack("<Q", len(table)) + table + bytes(8))
    tracemalloc.start()
    try:
        assert read(tmp_path / "out") is not None
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
