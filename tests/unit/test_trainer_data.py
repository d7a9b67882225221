import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.protocol import runfile
from orchestrator.worker import MisconfiguredError
from trainer.data import Samples, Tokens, open_tokens, shuffled
from trainer.tokenizer import open_tokenizer

TOKENIZER = open_tokenizer(None, 1280)
IDS = np.random.default_rng(1).integers(0, 1000, 1000).astype(np.uint32)


def samples(seed: int = 0, batch: int = 8) -> Samples:
    job = runfile.Trainer(seq_len=16, global_batch=batch, seed=seed)
    return Samples(Tokens(IDS, "d16e57000000", 1024), job)


@given(st.integers(1, 300), st.integers(0, 1 << 40), st.integers(0, 1 << 20))
def test_an_epoch_is_a_permutation_whatever_its_size(size: int, seed: int, epoch: int) -> None:
    assert sorted(shuffled(i, size, (seed, epoch)) for i in range(size)) == list(range(size))


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = {
        tuple(shuffled(i, 50, key) for i in range(50)) for key in ((0, 0), (0, 1), (1, 0), (1, 1))
    }
    assert len(orders) == 4


def test_a_sample_does_not_depend_on_how_many_ranks_share_the_batch() -> None:
    data = samples()

    whole = data.batch(5, range(8))

    for ranks in (1, 2, 4, 8):
        share = 8 // ranks
        parts = [data.batch(5, range(r * share, (r + 1) * share)) for r in range(ranks)]
        assert np.array_equal(np.concatenate([part.inputs for part in parts]), whole.inputs)
        assert [cut for part in parts for cut in part.cuts] == whole.cuts


def test_every_sample_is_seen_once_per_epoch() -> None:
    data = samples(batch=1)
    seen = [data.batch(step, range(1)).inputs.tobytes() for step in range(1, 2 * data.count + 1)]

    assert data.count == 62
    assert len(set(seen[: data.count])) == data.count
    assert set(seen[: data.count]) == set(seen[data.count :])
    assert seen[: data.count] != seen[data.count :]


def test_targets_are_the_tokens_that_follow() -> None:
    batch = samples().batch(1, range(8))

    assert np.array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])


def test_documents_are_cut_where_one_begins() -> None:
    ids = np.zeros(33, np.uint32)
    ids[[0, 5, 16, 31]] = 1024
    data = Samples(Tokens(ids, "0", 1024), runfile.Trainer(seq_len=16, global_batch=2))

    cuts = data.batch(1, range(2)).cuts

    assert sorted(cuts) == [[0, 5, 16], [0, 15, 16]]


def test_a_text_shorter_than_one_sequence_is_refused() -> None:
    with pytest.raises(MisconfiguredError, match="has 16 tokens, expected more than"):
        Samples(Tokens(IDS[:16], "0", 1024), runfile.Trainer(seq_len=16))


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


class GivenUpError(Exception):
    pass


class Patience:
    """Gives up at the given call."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise GivenUpError


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
        import fcntl  # noqa: PLC0415 - in the child only
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
