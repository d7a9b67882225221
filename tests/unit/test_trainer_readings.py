"""What is read of other ranks keeps neither a step nor a world for long, and looks like no hang."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from orchestrator.detect import hang
from orchestrator.protocol import runfile
from orchestrator.worker import Aborted, RankPhase
from trainer import parallel, readings
from trainer.config import ModelConfig
from trainer.data import Batch, Samples, Tokens
from trainer.guard import Guard
from trainer.prefetch import DataStalledError
from trainer.readings import Readings
from trainer.reporter import Unheard
from trainer.ring import Ring
from trainer.step import Training

CONFIG = ModelConfig(dim=16, layers=1, heads=2, kv_heads=1, ffn_dim=16, vocab=16)
IDS = np.random.default_rng(5).integers(0, 16, 512).astype(np.uint32)
TOKENS = Tokens(IDS, "d16e57000000", 15)
SIGNS = 4


class Source:
    """Answers once it is let."""

    mark = 0.0

    def __init__(self, samples: Samples) -> None:
        self._samples, self.let = samples, threading.Event()

    def batch(self, step: int, indices: range) -> Batch:
        assert self.let.wait(10)
        return self._samples.batch(step, indices)


class Waits(Unheard):
    """Hears what a rank does while it waits, and calls something the fourth time."""

    def __init__(self, then: object) -> None:
        self.phases: list[RankPhase] = []
        self._then = then

    def phase(self, phase: RankPhase, *, micro_batch: int = 0) -> None:
        self.phases.append(phase)
        if len(self.phases) == SIGNS and callable(self._then):
            self._then()


@pytest.fixture
def world() -> Iterator[parallel.World]:
    with parallel.alone() as world:
        yield world


def ring_of(world: parallel.World, wait_max: str = "10s") -> tuple[Ring, Training, Source]:
    data = runfile.Data(sources=(), wait_max=wait_max)
    job = runfile.Trainer(steps=5, seq_len=8, global_batch=4, warmup_steps=1, data=data)
    samples = Samples(TOKENS, job)
    training, source = Training(job, CONFIG, samples, world), Source(samples)
    return Ring(training, source), training, source


def test_a_step_waits_for_what_is_read_beside_it_no_longer_than_a_hang_has_room_for() -> None:
    assert readings.WITHIN_S <= hang.STARVED_APART_S / 2


def test_who_waits_for_samples_of_another_rank_says_so_as_long_as_it_takes(
    world: parallel.World,
) -> None:
    ring, training, source = ring_of(world)
    waits, guard = Waits(source.let.set), Guard("replays")
    own = training.micro(source._samples.batch(1, range(2)))

    micro = ring.read(guard, 2, range(2), own, waits)

    assert waits.phases == [RankPhase.DATA] * len(waits.phases)
    assert len(waits.phases) >= SIGNS
    assert not torch.equal(micro.inputs, own.inputs)
    assert not guard.off


def test_a_step_that_is_computed_again_waits_for_its_samples_with_signs_of_life(
    world: parallel.World,
) -> None:
    _, training, source = ring_of(world)
    steps = Waits(None)
    training.step(1, steps)
    training._samples_anew, training._anew = source, True
    waits = Waits(source.let.set)
    batches = len(training.share.micro_batches)

    micro = training._micro(2, batches - 1, waits)

    assert waits.phases == [RankPhase.DATA] * len(waits.phases)
    assert len(waits.phases) >= SIGNS
    read = training.micro(training.samples.batch(2, training.share.micro_batches[-1]))
    assert torch.equal(micro.inputs, read.inputs)


def test_samples_of_a_step_that_is_computed_again_are_waited_for_as_long_as_any(
    world: parallel.World,
) -> None:
    _, training, source = ring_of(world, wait_max="0.2s")
    training._samples_anew, training._anew = source, True

    with pytest.raises(DataStalledError):
        training._micro(1, 0, Waits(None))
    source.let.set()


def test_samples_that_are_compared_once_more_are_waited_for_with_signs_of_life(
    world: parallel.World,
) -> None:
    ring, _, source = ring_of(world)
    waits, looks = Waits(source.let.set), readings.Readings(ring)

    found = looks._read_again(1, 0, waits)

    assert waits.phases == [*[RankPhase.DATA] * (len(waits.phases) - 1), RankPhase.OPTIMIZER]
    assert len(waits.phases) > SIGNS
    assert int(found) != 0


def test_who_waits_for_them_leaves_when_its_generation_is_over(world: parallel.World) -> None:
    def over() -> None:
        raise Aborted("generation 1 is over")

    ring, training, source = ring_of(world)
    own = training.micro(source._samples.batch(1, range(2)))

    with pytest.raises(Aborted):
        ring.read(Guard("replays"), 2, range(2), own, Waits(over))
    source.let.set()


def test_samples_that_do_not_come_for_longest_are_gone_without(world: parallel.World) -> None:
    ring, training, source = ring_of(world, wait_max="0.2s")
    guard = Guard("replays")
    own = training.micro(source._samples.batch(1, range(2)))

    micro = ring.read(guard, 2, range(2), own, Waits(None))
    source.let.set()

    assert micro is own
    assert "DataStalledError" in guard.reason


class Counted:
    """Counts what was read of each step, and waits where it is told to."""

    mark = 0.0

    def __init__(self, samples: Samples, slow: int | None = None) -> None:
        self._samples, self._slow, self.let = samples, slow, threading.Event()
        self.read: list[int] = []

    def batch(self, step: int, indices: range) -> Batch:
        if step == self._slow:
            assert self.let.wait(10)
        self.read.append(step)
        return self._samples.batch(step, indices)


def readings_of(
    world: parallel.World, monkeypatch: pytest.MonkeyPatch, slow: int | None = None
) -> tuple[Readings, Counted]:
    """Return what reads the samples of the only rank there is."""
    ring, _, source = ring_of(world)
    counted = Counted(source._samples, slow)
    ring.samples = counted
    monkeypatch.setattr(Readings, "_shift", lambda *_: 0)
    return Readings(ring), counted


def told(readings_: Readings, source: Counted, step: int) -> tuple[float, ...]:
    """Take a step on the samples that there are, and return what is said of them."""
    readings_.begin(step)
    readings_.read(source._samples.batch(step, range(2)))
    readings_.read(source._samples.batch(step, range(2, 4)))
    return readings_.words(step, lambda: None)


def test_samples_of_some_steps_are_asked_for_at_once_and_each_is_compared_in_its_own(
    world: parallel.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, source = readings_of(world, monkeypatch)
    said = []
    for step in range(1, 2 * readings.AT_ONCE + 1):
        looks.begin(step)
        waiting = looks._ring.aside._orders.qsize() + len(source.read)
        assert waiting <= readings.AT_ONCE * -(-step // readings.AT_ONCE)
        said.append(told(looks, source, step))

    assert source.read == list(range(1, 2 * readings.AT_ONCE + 1))
    assert all(words[:2] == words[2:] for words in said), "it reads what it was handed"
    assert len(set(said)) == len(said)


def test_what_was_asked_for_before_a_restore_or_another_length_is_read_anew(
    world: parallel.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, source = readings_of(world, monkeypatch)
    told(looks, source, 1)
    told(looks, source, 1)
    assert source.read.count(1) == 1, "begun anew is none of the two"

    looks.forget()
    told(looks, source, 1)

    assert source.read.count(1) == 2


def test_a_source_that_has_stopped_keeps_one_step_waiting_and_is_asked_no_more(
    world: parallel.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readings, "WITHIN_S", 0.05)
    looks, source = readings_of(world, monkeypatch, slow=2)
    first = told(looks, source, 1)
    assert first[:2] == first[2:]

    begun = time.monotonic()
    late = [told(looks, source, step) for step in range(2, 40)]
    assert late == [(readings.LATE,) * readings.WORDS] * len(late)
    assert time.monotonic() - begun < 1.0, "one of them waits"

    source.let.set()
    monkeypatch.setattr(readings, "WITHIN_S", 10.0)
    said = [told(looks, source, step) for step in range(40, 60)]
    assert all(words[:2] == words[2:] for words in said[1:])
    assert not set(range(3, 39)) & set(source.read), "steps that were over are not read for"
