import argparse
import base64
import inspect
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.worker import MisconfiguredError
from trainer.config import PRESETS
from trainer.tokenizer import SPECIAL_TOKENS, Tokenizer, open_tokenizer
from trainer.vocabulary import main as learn

SMALL = open_tokenizer(None, PRESETS["debug"].vocab)


def test_the_small_tokenizer_fills_the_debug_vocabulary_exactly() -> None:
    assert SMALL.size == PRESETS["debug"].vocab
    assert (SMALL.bos, SMALL.eos) == (1024, 1025)


def test_there_are_256_special_tokens_of_different_names() -> None:
    assert len(SPECIAL_TOKENS) == len(set(SPECIAL_TOKENS)) == 256
    # Known ids of Llama 3: 128,000 + 1 ends a text, + 9 ends a turn.
    assert SPECIAL_TOKENS.index("<|end_of_text|>") == 1
    assert SPECIAL_TOKENS.index("<|eot_id|>") == 9
    assert SPECIAL_TOKENS[-1] == "<|reserved_special_token_250|>"


@given(st.text(max_size=200))
def test_every_text_comes_back(text: str) -> None:
    assert SMALL.decode(SMALL.encode(text)) == text


@given(st.binary(max_size=200))
def test_all_bytes_come_back(content: bytes) -> None:
    ids = SMALL.encode_bytes(content)

    assert SMALL.decode_bytes(ids) == content
    assert ids.dtype == np.uint32
    assert all(ids < SMALL.bos)


@given(st.text(max_size=60))
def test_bytes_of_a_text_have_the_ids_of_the_text(text: str) -> None:
    assert SMALL.encode_bytes(text.encode()).tolist() == SMALL.encode(text).tolist()


@given(st.lists(st.integers(0, SMALL.size - 1), max_size=20))
def test_any_ids_have_a_text(ids: list[int]) -> None:
    assert isinstance(SMALL.decode(np.array(ids, np.uint32)), str)


def test_an_id_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="id is 1280, expected less than 1280"):
        SMALL.decode_bytes(np.array([1280], np.uint32))


def test_a_file_of_the_released_size_has_the_released_ids() -> None:
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    triples = [pair + b"x" for pair in pairs]
    released = Tokenizer(tiktoken_file([*BYTES, *pairs, *triples][:128_000]))

    assert (released.size, released.bos, released.eos) == (128_256, 128_000, 128_001)
    named = {
        128_000: "<|begin_of_text|>",
        128_001: "<|end_of_text|>",
        128_006: "<|start_header_id|>",
        128_007: "<|end_header_id|>",
        128_009: "<|eot_id|>",
        128_255: "<|reserved_special_token_250|>",
    }
    for token, name in named.items():
        assert released.decode(np.array([token], np.uint32)) == name
    text = "Grüße, 世界! \n\t 12345"
    assert released.decode(released.encode(text)) == text
    assert len(released.encode(text)) < len(text.encode())


def test_source_text_is_packed_into_far_fewer_tokens_than_bytes() -> None:
    text = inspect.getsource(argparse)

    assert len(SMALL.encode(text)) < 0.45 * len(text)


def test_what_looks_like_a_special_token_is_text() -> None:
    ids = SMALL.encode("<|end_of_text|>")

    assert SMALL.eos not in ids
    assert ids.max() < SMALL.bos


def test_a_text_without_a_single_space_is_encoded_in_pieces() -> None:
    assert SMALL.decode(SMALL.encode("a" * 900_000)) == "a" * 900_000


def test_a_tokenizer_that_does_not_fit_the_vocabulary_is_refused_with_both_sizes() -> None:
    with pytest.raises(MisconfiguredError, match="1280 ids, the model's vocabulary 1000") as caught:
        open_tokenizer(None, 1000)

    assert "vocab: 1280" in caught.value.hint


def tiktoken_file(tokens: list[bytes]) -> bytes:
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    return b"".join(lines)


BYTES = [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"not a tokenizer\n", "line 1 is"),
        (b"!!! 0\n", "line 1 is"),
        (tiktoken_file(BYTES[:-1]), "not every single byte"),
        (tiktoken_file([*BYTES, b"ab"]).replace(b" 256\n", b" 300\n"), "ranks are not"),
        (tiktoken_file([*BYTES, b"a"]), "ranks are not"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_when_it_is_used(content: bytes, says: str) -> None:
    with pytest.raises(MisconfiguredError, match=says) as caught:
        Tokenizer(content, "x.tiktoken").encode("x")

    assert "x.tiktoken" in str(caught.value)
    assert caught.value.hint


def test_a_file_that_is_missing_or_empty_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()

    for name in ("missing", "empty"):
        with pytest.raises(MisconfiguredError, match=name):
            open_tokenizer(str(tmp_path / name), 1280)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("tar://x.tiktoken::{here}/text", "ReadError"),
        ("zip://x.tiktoken::{here}/text", "BadZipFile"),
        ("reference://x", ""),
        ("generic://x", ""),
        ("github://x", ""),
        ("a\0b", "null byte"),
        ("{here}", ""),
        ("{here}/pipe", "no file"),
    ],
)
def test_an_address_that_leads_to_no_file_is_refused_and_not_waited_on(
    tmp_path: Path, address: str, says: str
) -> None:
    (tmp_path / "text").write_text("no archive\n" * 100)
    os.mkfifo(tmp_path / "pipe")
    address = address.format(here=tmp_path)

    with pytest.raises(MisconfiguredError, match=re.escape(f"is {address!r}, expected")) as caught:
        open_tokenizer(address, 1280)

    assert says in str(caught.value)
    assert caught.value.hint


# Learning -------------------------------------------------------------------------------------


def test_a_tokenizer_is_learnt_and_is_the_same_bytes_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "text.txt"
    source.write_text(inspect.getsource(argparse) * 2 + "世界.\n" * 400)

    for name in ("one", "two"):
        assert learn([str(source), "--ranks", "600", "--out", str(tmp_path / name)]) == 0

    assert "BOS 600, EOS 601" in capsys.readouterr().out
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    learnt = open_tokenizer(str(tmp_path / "one"), 856)
    text = source.read_text()
    assert learnt.decode(learnt.encode(text)) == text
    assert len(learnt.encode(text)) < 0.45 * len(text)
    assert "世界".encode() in [learnt.decode_bytes(np.array([i], np.uint32)) for i in range(600)]


def test_a_text_that_is_too_short_to_learn_from_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "text.txt"
    source.write_text("abcabc")

    assert learn([str(source), "--ranks", "600", "--out", str(tmp_path / "out")]) == 2
    assert learn([str(tmp_path / "nowhere.txt"), "--out", str(tmp_path / "out")]) == 2
    source.write_text(inspect.getsource(argparse))
    assert learn([str(source), "--out", str(tmp_path / "no" / "out")]) == 2

    said = capsys.readouterr().err
    assert "tokens, expected 600" in said
    assert said.count("hint: ") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("out", ["", "/", "."])
def test_a_tokenizer_is_not_written_in_place_of_a_folder(out: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world " * 50)

    assert learn([str(tmp_path / "a.txt"), "--out", out, "--ranks", "260"]) == 2


@pytest.mark.parametrize("out", ["a.txt/b", "nowhere/b", "b" * 254, "lost/b"])
def test_a_place_where_no_tokenizer_can_be_written_is_refused_with_a_hint(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("hello world " * 50)
    (tmp_path / "lost").symlink_to("nowhere")

    where = str(tmp_path / out)
    assert learn([str(tmp_path / "a.txt"), "--out", where, "--ranks", "260"]) == 2

    assert "hint: " in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "lost"}
