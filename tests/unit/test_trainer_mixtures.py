"""Sources that are mixed: whose samples come when, what is held back, and what each one keeps."""

import fcntl
from pathlib import Path

import msgspec
import numpy as np
import pytest

from orchestrator.protocol import runfile
from orchestrator.worker import JobAhead, MisconfiguredError
from tests import texts
from tests.texts import GivenUpError, Patience
from trainer.data import Samples, open_data, open_tokens
from trainer.feed import changes
from trainer.tokenizer import open_tokenizer
from trainer.tokens import Tokens, account_of
from trainer.train import prepare

TOKENIZER = open_tokenizer(None, 1280)


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
    assert all(stop - start == 16 for _, ((start, stop),) in places)
    few, many = ([spans[0][0] // 16 for source, spans in places if source == at] for at in (0, 1))
    count = found.counts[0]
    assert sorted(few[:count]) == list(range(count))
    assert few[:count] != few[count : 2 * count]
    assert len(set(many)) == 100
    assert many != sorted(many)


def test_without_shuffling_samples_come_as_they_lie(tmp_path: Path) -> None:
    data = sources_of(tmp_path, shuffle=False)
    found = Samples(opened(data), runfile.Trainer(seq_len=16, global_batch=8, data=data))

    many = [spans for source, spans in map(found.place, range(400)) if source == 1]

    assert many == [[(at, at + 16)] for at in range(0, 1600, 16)]


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
