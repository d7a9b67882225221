import argparse
import base64
import inspect
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.worker import MisconfiguredError
from trainer.config import PRESETS
from trainer.tokenizer import SPECIAL_TOKENS, Tokenizer, open_tokenizer

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
