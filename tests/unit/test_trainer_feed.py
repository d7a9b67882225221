"""What is told of the data, and that a run does not go on with other text than it began with."""

from pathlib import Path

import msgspec
import pytest

from orchestrator.protocol import runfile
from orchestrator.protocol.ids import Generation, NodeId, Rank
from orchestrator.protocol.steps import EVALUATIONS_FILE, EvaluationLine
from orchestrator.worker import MisconfiguredError, Seat
from storage.shard import Chunk, ShardIndex, ShardMeta, plan, seal
from tests import texts
from trainer import parallel
from trainer.feed import Feed, cursor_of
from trainer.job import Job, read_job
from trainer.reporter import Unheard
from trainer.step import Training

LAYOUT = plan([Chunk(fqn="w", state="p", dtype="F32", shape=(8,), global_shape=(8,), offset=(0,))])


def job_of(data: runfile.Data | str) -> Job:
    trainer = runfile.Trainer(seq_len=16, global_batch=4, data=data)
    return read_job({"trainer": msgspec.to_builtins(trainer)}, 1)


def feed_of(job: Job, cache: Path | str = "") -> Feed:
    return Feed(job, str(cache), lambda: None)


def saved(feed: Feed, job: Job) -> ShardIndex:
    """Return the index of a shard that was saved after 6 steps."""
    meta = ShardMeta(
        run_id="run",
        model="m",
        step=6,
        epoch=1,
        shard=0,
        shards=1,
        extra=msgspec.to_builtins(cursor_of(feed.samples, job.trainer).after(6)),
    )
    return seal(LAYOUT, bytearray(LAYOUT.size), meta)


def test_a_file_that_changed_since_a_checkpoint_is_named_with_what_was_expected_and_found(
    tmp_path: Path,
) -> None:
    cache = tmp_path / "cache"
    folder = tmp_path / "texts"
    texts.jsonl(folder / "a.jsonl", texts.documents(20, seed=1))
    texts.jsonl(folder / "b.jsonl", texts.documents(20, seed=2))
    few = texts.mixed(tmp_path).sources[0]
    job = job_of(runfile.Data(sources=(few, runfile.DataSource(uri=str(folder)))))
    before = feed_of(job, cache)
    index = saved(before, job)
    before.require_same(index)
    texts.jsonl(folder / "b.jsonl", texts.documents(21, seed=2))

    with pytest.raises(MisconfiguredError) as caught:
        feed_of(job, cache).require_same(index)

    words = str(caught.value)
    assert f"source {folder} has changed since " in words
    assert "step 6" in words
    assert f"{folder}/b.jsonl: 21 documents with digest " in words
    assert ", expected 20 documents with digest " in words
    assert "a.jsonl" not in words
    assert caught.value.hint


def test_a_file_that_is_gone_since_a_checkpoint_is_named(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name in "ab":
        texts.jsonl(tmp_path / f"{name}.jsonl", texts.documents(20))
    job = job_of(f"{tmp_path}/*.jsonl")
    index = saved(feed_of(job, cache), job)
    (tmp_path / "b.jsonl").unlink()

    with pytest.raises(MisconfiguredError, match=r"b\.jsonl: no file, expected 20 documents"):
        feed_of(job, cache).require_same(index)


def test_a_node_that_never_read_what_changed_names_the_source(tmp_path: Path) -> None:
    job = job_of(texts.mixed(tmp_path))
    index = saved(feed_of(job), job)
    texts.jsonl(tmp_path / "few.jsonl", texts.documents(7, seed=1))

    with pytest.raises(MisconfiguredError, match=r"source .*few\.jsonl has changed since"):
        feed_of(job).require_same(index)


def test_a_checkpoint_says_where_each_source_stands(tmp_path: Path) -> None:
    job = job_of(texts.mixed(tmp_path))
    feed = feed_of(job)

    cursor = cursor_of(feed.samples, job.trainer).after(6)

    assert cursor.offsets == [18, 6]
    assert cursor.digests == [source.digest for source in feed.samples.sources]
    assert cursor.data == feed.samples.digest
    single = job_of(texts.mixed(tmp_path).sources[0].uri)
    assert cursor_of(feed_of(single).samples, single.trainer).after(6).offsets == []


def test_an_evaluation_that_is_due_is_noted_beside_the_log_and_others_are_not_done(
    tmp_path: Path,
) -> None:
    sizes = {"dim": 16, "layers": 1, "heads": 2, "kvHeads": 1, "ffnDim": 16, "vocab": 1280}
    trainer = {
        "model": sizes,
        "seqLen": 16,
        "globalBatch": 2,
        "data": msgspec.to_builtins(texts.mixed(tmp_path, validation=0.3)),
        "evalEverySteps": 4,
        "evalSamples": 8,
    }
    job = read_job({"trainer": trainer}, 1)
    feed = feed_of(job)
    seat = Seat(
        generation=Generation(3),
        rank=Rank(0),
        world_size=1,
        local_rank=0,
        node=NodeId("node-0"),
        run_id="run",
        job={},
        log=str(tmp_path / "rank-00000.log"),
    )

    with parallel.alone() as world:
        training = Training(job.trainer, job.config, feed.samples, world)
        for step in range(1, 9):
            feed.after(step, training, Seated(seat))  # type: ignore[arg-type]

    lines = (tmp_path / EVALUATIONS_FILE).read_bytes().splitlines()
    told = [msgspec.json.decode(line, type=EvaluationLine) for line in lines]
    assert [(line.generation, line.step) for line in told] == [(3, 4), (3, 8)]
    assert told[0].loss == told[1].loss
    assert set(told[0].sources) == {source["uri"] for source in trainer["data"]["sources"]}


class Seated(Unheard):
    """Who a rank reports to, and the seat that it has."""

    def __init__(self, seat: Seat) -> None:
        self.seat = seat


def test_what_each_source_came_to_is_told_and_nothing_is_skipped_in_silence(
    tmp_path: Path,
) -> None:
    data = texts.mixed(tmp_path, on_bad_record="skip", validation=0.3)
    few = tmp_path / "few.jsonl"
    few.write_text(few.read_text() + 'no JSON\n{"text": " "}\n')

    words = "\n".join(feed_of(job_of(data)).words())

    assert f"data, source {few}: 6 documents of 1 file," in words
    assert "1 empty, 1 bad and skipped" in words
    assert " held back" in words
    assert "data: skipped line 7: JSON is malformed: " in words
