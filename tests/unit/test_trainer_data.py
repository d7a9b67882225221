import fcntl
import multiprocessing
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.protocol import runfile
from orchestrator.worker import JobAhead, MisconfiguredError
from tests import texts
from trainer.data import Samples, open_data, open_tokens, shuffled
from trainer.feed import changes
from trainer.joined import Joined
from trainer.tokenizer import open_tokenizer
from trainer.tokens import Tokens, account_of
from trainer.train import prepare

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
    seen = [
        data.batch(step, range(1)).inputs.tobytes() for step in range(1, 2 * data.counts[0] + 1)
    ]

    assert data.counts == [62]
    assert len(set(seen[:62])) == 62
    assert set(seen[:62]) == set(seen[62:])
    assert seen[:62] != seen[62:]


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


def opened(data: runfile.Data, folder: Path | str = "") -> list[Tokens]:
    return open_data(data, TOKENIZER, str(folder), lambda: None)


def sources_of(folder: Path, **settings: object) -> runfile.Data:
    return texts.mixed(folder, **settings)


def split(ids: np.ndarray) -> set[bytes]:
    """Return the documents that some tokens are made of."""
    begins = np.flatnonzero(ids == TOKENIZER.bos)
    return {part.tobytes() for part in np.split(ids, begins[1:])} if len(ids) else set()


def test_one_source_in_a_section_is_what_it_is_in_the_short_form(tmp_path: Path) -> None:
    address = texts.jsonl(tmp_path / "a.jsonl", texts.documents(40))
    section = runfile.Data(sources=(runfile.DataSource(uri=address, weight=7),))
    settings = {"seq_len": 16, "global_batch": 4, "seed": 3}

    (tokens,) = opened(section)
    short = open_tokens(address, TOKENIZER, "", lambda: None)

    assert tokens.digest == short.digest
    of_section = Samples([tokens], runfile.Trainer(data=section, **settings))  # type: ignore[arg-type]
    of_short = Samples(short, runfile.Trainer(data=address, **settings))  # type: ignore[arg-type]
    assert of_section.mark == of_short.mark
    for step in (1, 40):
        rows = [s.batch(step, range(4)).inputs.tolist() for s in (of_section, of_short)]
        assert rows[0] == rows[1]


def test_samples_come_from_sources_by_weight_and_each_source_has_an_order_of_its_own(
    tmp_path: Path,
) -> None:
    data = sources_of(tmp_path)
    job = runfile.Trainer(seq_len=16, global_batch=8, data=data)
    found = Samples(opened(data), job)

    places = [found.place(sample) for sample in range(400)]

    assert [sum(source == at for source, _ in places) for at in (0, 1)] == [300, 100]
    few = [row for source, row in places if source == 0]
    many = [row for source, row in places if source == 1]
    count = found.counts[0]
    assert sorted(few[:count]) == list(range(count))
    assert few[:count] != few[count : 2 * count]
    assert len(set(many)) == 100
    assert many != sorted(many)


def test_without_shuffling_samples_come_as_they_lie(tmp_path: Path) -> None:
    data = sources_of(tmp_path, shuffle=False)
    found = Samples(opened(data), runfile.Trainer(seq_len=16, global_batch=8, data=data))

    many = [row for source, row in map(found.place, range(400)) if source == 1]

    assert many == list(range(100))


def test_what_is_held_back_stays_so_when_sources_grow_move_and_change_their_form(
    tmp_path: Path,
) -> None:
    documents = texts.documents(200)
    first = runfile.Data(
        sources=(runfile.DataSource(uri=texts.jsonl(tmp_path / "a.jsonl", documents[:100])),),
        validation=0.2,
    )
    grown = runfile.Data(
        sources=(
            runfile.DataSource(uri=texts.table(tmp_path / "b.parquet", documents[100:])),
            runfile.DataSource(uri=texts.table(tmp_path / "a.parquet", documents[::-1])),
        ),
        validation=0.2,
    )

    (before,), (more, all_) = opened(first), opened(grown)

    held, trained = split(before.held), split(before.ids)
    assert 10 <= len(held) <= 30
    assert len(held) + len(trained) == 100
    assert held <= split(all_.held)
    assert trained <= split(all_.ids)
    assert split(more.held) == split(all_.held) - held
    assert before.account.held == len(held)
    more_held = msgspec.structs.replace(first, validation=0.4)
    assert held < split(opened(more_held)[0].held)


def test_every_setting_that_decides_what_is_trained_on_changes_the_digest(tmp_path: Path) -> None:
    def digest_of(**changes: object) -> str:
        data = sources_of(tmp_path, **changes)
        return Samples(opened(data), runfile.Trainer(seq_len=16, data=data)).digest

    plain = digest_of()
    few, many = sources_of(tmp_path).sources
    digests = [
        plain,
        digest_of(validation=0.1),
        digest_of(validation=0.2),
        Samples(
            opened(runfile.Data(sources=(few, msgspec.structs.replace(many, weight=2)))),
            runfile.Trainer(seq_len=16),
        ).digest,
        Samples(opened(runfile.Data(sources=(many, few))), runfile.Trainer(seq_len=16)).digest,
    ]

    assert len(set(digests)) == len(digests)
    assert digest_of(on_bad_record="skip", prefetch=0) == plain


def test_a_source_that_is_added_leaves_the_tokens_of_the_others(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    data = sources_of(tmp_path)
    opened(runfile.Data(sources=data.sources[:1]), cache)
    (made,) = cache.glob("tokens-" + "?" * 32)
    before = made.stat().st_mtime_ns

    opened(data, cache)

    assert made.stat().st_mtime_ns == before
    assert len(list(cache.glob("tokens-" + "?" * 32))) == 2


def test_whoever_finds_a_source_in_other_hands_takes_the_next(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    data = sources_of(tmp_path)
    (few, many) = (runfile.Data(sources=(source,)) for source in data.sources)
    (first,) = _names_of(cache, few)
    opened(many, cache)
    second = _made(cache) - {first}
    (cache / second.pop()).unlink()
    with (cache / f"{first}.lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        with pytest.raises(GivenUpError):
            open_data(data, TOKENIZER, str(cache), Patience(61))

    assert first not in _made(cache)
    assert len(_made(cache)) == 1


def _names_of(cache: Path, data: runfile.Data) -> set[str]:
    opened(data, cache)
    names = _made(cache)
    for name in names:
        (cache / name).unlink()
    return names


def _made(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("tokens-" + "?" * 32)}


def test_a_node_without_room_for_the_tokens_says_so_before_it_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    data = sources_of(tmp_path, cache_gib_max=1e-7)

    with pytest.raises(MisconfiguredError, match=r"at least .* GiB of tokens to write") as caught:
        opened(data, cache)
    assert "cacheGibMax" in caught.value.hint
    assert list(cache.iterdir()) == []

    class Full:
        free = 100

    monkeypatch.setattr("shutil.disk_usage", lambda _: Full)
    with pytest.raises(MisconfiguredError, match=r"of tokens to write, 9\.31e-08 GiB free"):
        opened(sources_of(tmp_path), cache)


def test_a_limit_that_is_met_while_tokens_are_written_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.tokens._CHUNK_BYTES", 256)
    cache = tmp_path / "cache"
    whole = opened(sources_of(tmp_path), cache)
    size = sum(4 * len(tokens.ids) for tokens in whole)
    for name in _made(cache):
        (cache / name).unlink()

    with pytest.raises(MisconfiguredError, match=r"GiB of tokens to write beside .*, limit"):
        opened(sources_of(tmp_path, cache_gib_max=size * 0.9 / (1 << 30)), cache)

    assert list(cache.glob("*.tmp")) == []
    assert len(_made(cache)) == 1
    opened(sources_of(tmp_path, cache_gib_max=size * 1.2 / (1 << 30)), cache)


def test_a_source_too_short_for_a_sample_is_named(tmp_path: Path) -> None:
    data = sources_of(tmp_path)

    with pytest.raises(MisconfiguredError, match=r"source .*few\.jsonl has \d+ tokens, expected"):
        Samples(opened(data), runfile.Trainer(seq_len=1000, data=data))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 12), st.integers(0, 12))
def test_arrays_that_are_joined_are_sliced_like_one(
    sizes: list[int], start: int, stop: int
) -> None:
    ids = np.arange(sum(sizes), dtype=np.uint32)
    joined = Joined(np.split(ids, np.cumsum(sizes)[:-1]))

    assert len(joined) == len(ids)
    assert joined[start:stop].tolist() == ids[start:stop].tolist()
    assert joined[start:].tolist() == ids[start:].tolist()


@pytest.fixture
def folder_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nine files of a kilobyte or so, of which three have nothing in them; parts of two each."""
    monkeypatch.setattr("trainer.data.PART_BYTES", 1500)
    for at in range(9):
        name = tmp_path / "texts" / f"{at}.jsonl"
        texts.jsonl(name, texts.documents(6, seed=at) if at not in (3, 4, 5) else [" " * 900] * 2)
    return tmp_path / "texts"


def test_a_source_in_parts_has_the_samples_of_one_in_a_piece(
    folder_of_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = runfile.Data(sources=(runfile.DataSource(uri=str(folder_of_files)),), validation=0.2)
    job = runfile.Trainer(seq_len=16, global_batch=8, data=data)
    cache = tmp_path / "cache"

    (parted,) = opened(data, cache)
    (again,) = opened(data)
    files = _made(cache)
    monkeypatch.setattr("trainer.data.PART_BYTES", 1 << 30)
    (whole,) = opened(data)

    assert len(files) >= 4
    assert parted.digest == again.digest
    assert parted.account == again.account == whole.account
    assert parted.held[0:].tolist() == whole.held.tolist()  # type: ignore[attr-defined]
    for step in (1, 7, 100):
        rows = [Samples(each, job).batch(step, range(8)).inputs for each in (parted, whole)]
        assert np.array_equal(*rows)


def test_a_part_that_is_done_stays_done_if_the_process_is_ended_at_the_next(
    folder_of_files: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(GivenUpError):
        open_data(str(folder_of_files), TOKENIZER, str(cache), Patience(15))
    done = _made(cache)

    open_data(str(folder_of_files), TOKENIZER, str(cache), lambda: None)

    assert len(done) == 1
    assert done < _made(cache)


def test_a_changed_file_costs_its_own_part_and_is_named(
    folder_of_files: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    before = open_tokens(str(folder_of_files), TOKENIZER, str(cache), lambda: None)
    made = _made(cache)
    texts.jsonl(folder_of_files / "0.jsonl", texts.documents(6, seed=10))

    after = open_tokens(str(folder_of_files), TOKENIZER, str(cache), lambda: None)

    assert len(_made(cache) - made) == 1
    assert after.digest != before.digest
    kept = account_of(cache, before.digest)
    assert kept == before.account
    assert [words.partition(":")[0] for words in changes(kept, after.account)] == [
        f"{folder_of_files}/0.jsonl"
    ]


def test_a_source_in_parts_without_any_text_is_refused(
    folder_of_files: Path, tmp_path: Path
) -> None:
    for path in folder_of_files.iterdir():
        path.write_text("\n" * 2000)

    with pytest.raises(MisconfiguredError, match="no text, expected at least one document"):
        open_data(str(folder_of_files), TOKENIZER, str(tmp_path / "cache"), lambda: None)


def test_a_parked_process_gets_every_source_ready(tmp_path: Path) -> None:
    data = sources_of(tmp_path)
    trainer = {"data": msgspec.to_builtins(data)}
    cache = tmp_path / "cache"

    prepare(JobAhead(job={"trainer": trainer}, cache_dir=str(cache)), lambda: None)

    assert len(_made(cache)) == 2
