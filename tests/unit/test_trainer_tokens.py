"""Tokens of a text are made once on a node, by one of all who want them."""

import fcntl
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from tests.texts import GivenUpError, Patience
from trainer.data import open_tokens
from trainer.tokenizer import open_tokenizer
from trainer.tokens import Tokens

TOKENIZER = open_tokenizer(None, 1280)


def open_in(folder: Path, data: str) -> Tokens:
    return open_tokens(data, TOKENIZER, str(folder), lambda: None)


def test_tokens_are_documents_with_their_borders_and_the_same_from_cache(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("def f(): pass\n")

    first, again = (open_in(tmp_path / "cache", str(tmp_path)) for _ in range(2))
    uncached = open_tokens(str(tmp_path), TOKENIZER, "", lambda: None)

    document = [TOKENIZER.bos, *TOKENIZER.encode("def f(): pass\n"), TOKENIZER.eos]
    assert first.ids.tolist() == document * 2
    assert first.digest == again.digest == uncached.digest
    assert np.array_equal(first.ids, again.ids)


def test_a_changed_text_is_tokenised_anew_and_has_another_digest(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = open_in(tmp_path / "cache", str(path))
    path.write_text("another")

    assert open_in(tmp_path / "cache", str(path)).digest != first.digest


def test_what_a_killed_process_left_of_a_cache_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    cache = tmp_path / "cache"
    expected = open_in(cache, str(tmp_path / "a.txt"))
    (made,) = cache.glob("tokens-" + "?" * 32)
    made.unlink()
    made.with_suffix(".tmp").write_bytes(b"half" * 1000)

    assert np.array_equal(open_in(cache, str(tmp_path / "a.txt")).ids, expected.ids)


@pytest.mark.parametrize("cached", [True, False])
def test_tokenising_can_be_given_up_within_a_document_and_leaves_neither_lock_nor_file(
    tmp_path: Path, *, cached: bool
) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("word " * 200_000)
    cache, data = tmp_path / "cache", str(tmp_path / "*.txt")

    # The first document is one piece, the second is three.
    with pytest.raises(GivenUpError):
        open_tokens(data, TOKENIZER, str(cache) if cached else "", Patience(4))

    assert [path.suffix for path in cache.glob("*")] == ([".lock"] if cached else [])
    tokens = open_tokens(data, TOKENIZER, str(cache), Patience(5))
    assert tokens.ids[-1] == TOKENIZER.eos
    assert len(tokens.ids) == len(TOKENIZER.encode("one")) + len(
        TOKENIZER.encode("word " * 200_000)
    ) + 2 * len([TOKENIZER.bos, TOKENIZER.eos])


def test_many_processes_that_race_for_a_cache_all_get_the_same_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 20_000)
    fork = multiprocessing.get_context("fork")
    with fork.Pool(4) as pool:
        args = [(tmp_path / "cache", str(tmp_path / "a.txt"))] * 8
        digests = pool.starmap(_digest, args)

    assert len(set(digests)) == 1
    assert len(list((tmp_path / "cache").glob("*.tmp"))) == 0


def _digest(folder: Path, data: str) -> str:
    return open_in(folder, data).digest


def test_waiting_for_another_process_to_tokenise_can_be_given_up(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    cache = tmp_path / "cache"
    open_in(cache, str(tmp_path / "a.txt"))
    (made,) = cache.glob("tokens-" + "?" * 32)
    made.unlink()
    child = os.fork()
    if child == 0:
        import time  # noqa: PLC0415

        with made.with_suffix(".lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            (tmp_path / "held").touch()
            time.sleep(60)
    while not (tmp_path / "held").exists():
        pass

    try:
        with pytest.raises(GivenUpError):
            open_tokens(str(tmp_path / "a.txt"), TOKENIZER, str(cache), Patience(1))
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    # And the lock of the dead is nobody's.
    assert open_in(cache, str(tmp_path / "a.txt")).ids[0] == TOKENIZER.bos
