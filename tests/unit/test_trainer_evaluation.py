"""The loss on what is held back, and that nobody learns from it."""

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from orchestrator.protocol import runfile
from orchestrator.worker import MisconfiguredError, RankPhase
from tests import texts
from trainer import parallel
from trainer.config import ModelConfig
from trainer.data import Samples, open_data
from trainer.evaluation import Held, evaluate
from trainer.model import Llama, next_token_loss
from trainer.reporter import Unheard
from trainer.step import Training
from trainer.tokenizer import open_tokenizer
from trainer.tokens import Tokens

CONFIG = ModelConfig(dim=32, layers=2, heads=2, kv_heads=1, ffn_dim=48, vocab=1280)


class Phases(Unheard):
    def __init__(self) -> None:
        self.seen: list[RankPhase] = []
        self.losses: list[float] = []

    def phase(self, phase: RankPhase, *, micro_batch: int = 0) -> None:
        self.seen.append(phase)

    def step_done(self, step: int, *, loss: float, **_: object) -> None:
        self.losses.append(loss)


@pytest.fixture
def world() -> Iterator[parallel.World]:
    with parallel.alone() as world:
        yield world


@pytest.fixture
def job(tmp_path: Path) -> runfile.Trainer:
    data = texts.mixed(tmp_path, validation=0.4)
    return runfile.Trainer(
        steps=20, seq_len=16, global_batch=4, data=data, eval_every_steps=2, eval_samples=10
    )


def opened(job: runfile.Trainer) -> list[Tokens]:
    return open_data(job.data, open_tokenizer(None, 1280), "", lambda: None)


def train(
    world: parallel.World, job: runfile.Trainer, sources: list[Tokens], held: Held | None
) -> tuple[Phases, list[float]]:
    training = Training(job, CONFIG, Samples(sources, job), world)
    phases, losses = Phases(), []
    for step in range(1, 7):
        training.step(step, phases)
        if held is not None and step % 2 == 0:
            losses.append(evaluate(training, held, phases).loss)
    return phases, losses


def test_an_evaluation_changes_no_bit_of_training_and_falls_as_the_loss_does(
    world: parallel.World, job: runfile.Trainer
) -> None:
    sources = opened(job)

    with_it, losses = train(world, job, sources, Held(sources, job))
    without, none = train(world, job, sources, None)

    assert with_it.losses == without.losses
    assert none == []
    assert losses == sorted(losses, reverse=True)
    assert RankPhase.EVALUATING in with_it.seen
    assert RankPhase.EVALUATING.patient, "it may last, and is no hang"


@pytest.mark.parametrize("micro_batch", [None, 1, 2])
def test_the_loss_is_that_of_all_held_samples_however_they_are_shared_out(
    world: parallel.World, job: runfile.Trainer, micro_batch: int | None
) -> None:
    sources = opened(job)
    held = Held(sources, job)
    model = Llama(CONFIG)
    model.init_weights(0)
    expected = {}
    for source, count in held.sources:
        losses = []
        for row in range(count):
            batch = held.batch(source, range(row, row + 1))
            inputs, targets = map(torch.tensor, (batch.inputs, batch.targets))
            losses.append(float(next_token_loss(model(inputs, batch.cuts), targets).detach()))
        expected[source.name] = pytest.approx(math.fsum(losses) / (16 * count), rel=1e-6)

    cut = msgspec.structs.replace(job, micro_batch=micro_batch)
    training = Training(cut, CONFIG, Samples(sources, cut), world)

    found = evaluate(training, held, Unheard())
    assert len(expected) == 2
    assert found.of_sources == expected
    counts = [count for _, count in held.sources]
    mean = math.fsum(map(math.prod, zip(found.of_sources.values(), counts, strict=True)))
    assert found.loss == pytest.approx(mean / found.samples, rel=1e-12)
    assert found.samples == sum(counts) == len(held)


def test_each_source_has_samples_by_its_weight_as_far_as_it_has_some(
    job: runfile.Trainer,
) -> None:
    sources = opened(job)
    there = [(len(source.held) - 1) // 16 for source in sources]

    assert len(Held(sources, msgspec.structs.replace(job, eval_samples=4))) == 3 + 1
    assert len(Held(sources, msgspec.structs.replace(job, eval_samples=10**6))) == sum(there)


def test_a_split_without_a_single_sample_is_refused(job: runfile.Trainer) -> None:
    sources = opened(job)

    with pytest.raises(MisconfiguredError, match=r"holds back \d+ tokens, expected more") as caught:
        Held(sources, msgspec.structs.replace(job, seq_len=1 << 20))
    assert caught.value.hint
