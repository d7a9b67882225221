"""What is read of other ranks keeps neither a step nor a world for long, and looks like no hang."""

import threading
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
