"""A global batch that grows with the tokens that were trained on."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.protocol import runfile
from orchestrator.protocol.ramp import Change, Ramp
from orchestrator.worker import MisconfiguredError, RankPhase
from trainer import parallel
from trainer.config import ModelConfig
from trainer.data import Samples
from trainer.job import read_job
from trainer.model import Llama, next_token_loss
from trainer.reporter import Unheard
from trainer.step import Training
from trainer.tokens import Tokens

CONFIG = ModelConfig(dim=16, layers=1, heads=2, kv_heads=1, ffn_dim=16, vocab=64)
IDS = np.random.default_rng(3).integers(0, 64, 4000).astype(np.uint32)
CHANGES = st.lists(st.tuples(st.integers(1, 10_000), st.integers(1, 64)), max_size=4)


@given(st.integers(1, 64), st.integers(1, 64), CHANGES)
def test_each_step_takes_up_where_the_one_before_ended(
    batch: int, length: int, changes: list[tuple[int, int]]
) -> None:
    ramp = Ramp(batch, length, [Change(tokens, batch=then) for tokens, then in sorted(changes)])

    samples = 0
    for step in range(1, 60):
        due = [then for tokens, then in sorted(changes) if samples * length >= tokens]
        assert ramp.batch(step) == (due[-1] if due else batch)
        assert ramp.consumed(step - 1) == samples
        samples += ramp.batch(step)


@pytest.fixture
def world() -> Iterator[parallel.World]:
    with parallel.alone() as world:
        yield world


def losses(world: parallel.World, job: runfile.Trainer, steps: range) -> list[tuple[float, int]]:
    class Recorder(Unheard):
        def step_done(self, step: int, *, loss: float, tokens: int, **_: object) -> None:
            told.append((loss, tokens))

    told: list[tuple[float, int]] = []
    samples = Samples(Tokens(IDS, "d16e57000000", 63), job)
    training = Training(job, CONFIG, samples, world)
    for step in steps:
        training.step(step, Recorder())
    return told


@pytest.mark.parametrize("reduction", ["fast", "deterministic"])
def test_steps_after_a_change_take_more_samples_whether_or_not_the_run_was_interrupted(
    world: parallel.World, reduction: str
) -> None:
    ramp = (runfile.BatchChange(tokens=16 * 7, global_batch=8),)
    job = runfile.Trainer(
        steps=4, seq_len=16, global_batch=4, micro_batch=2, reduction=reduction, batch_ramp=ramp
    )

    told = losses(world, job, range(1, 5))

    assert [tokens for _, tokens in told] == [64, 64, 128, 128]
    # A process that begins with step 3 has the loss that these samples have by its weights.
    ((found, tokens),) = losses(world, job, range(3, 4))
    model = Llama(CONFIG)
    model.init_weights(0)
    batch = Samples(Tokens(IDS, "d16e57000000", 63), job).batch(3, range(8))
    inputs, targets = map(torch.tensor, (batch.inputs, batch.targets))
    loss = next_token_loss(model(inputs, batch.cuts), targets).item() / 128
    assert (tokens, found) == (128, pytest.approx(loss, rel=1e-5))


@pytest.mark.parametrize("reduction", ["fast", "deterministic"])
def test_sequences_become_longer_whether_or_not_the_run_was_interrupted(
    world: parallel.World, reduction: str
) -> None:
    job = runfile.Trainer(
        steps=4,
        seq_len=16,
        global_batch=4,
        micro_batch=2,
        reduction=reduction,
        batch_ramp=(runfile.BatchChange(tokens=16 * 7, global_batch=2),),
        length_ramp=(runfile.LengthChange(tokens=16 * 7, seq_len=64, micro_batch=1),),
    )

    told = losses(world, job, range(1, 5))

    assert [tokens for _, tokens in told] == [64, 64, 128, 128]
    ((found, tokens),) = losses(world, job, range(3, 4))
    model = Llama(CONFIG)
    model.init_weights(0)
    batch = Samples(Tokens(IDS, "d16e57000000", 63), job).batch(3, range(2))
    inputs, targets = map(torch.tensor, (batch.inputs, batch.targets))
    loss = next_token_loss(model(inputs, batch.cuts), targets).item() / 128
    assert (tokens, found) == (128, pytest.approx(loss, rel=1e-5))


def test_a_step_of_another_length_is_announced_as_one_that_may_have_to_be_compiled(
    world: parallel.World,
) -> None:
    class Listener(Unheard):
        def phase(self, phase: RankPhase, *, micro_batch: int = 0) -> None:
            heard.setdefault(at[0], set()).add(phase)

    job = runfile.Trainer(
        seq_len=16, global_batch=2, length_ramp=(runfile.LengthChange(tokens=64, seq_len=32),)
    )
    training = Training(job, CONFIG, Samples(Tokens(IDS, "d16e57000000", 63), job), world)
    heard: dict[int, set[RankPhase]] = {}
    for step in range(1, 5):
        at = [step]
        training.step(step, Listener())

    assert [RankPhase.FORWARD in heard[step] for step in range(1, 5)] == [False, True, False, True]
    assert heard[1] == heard[3] == {RankPhase.WARMING}


@pytest.mark.parametrize(
    ("ramp", "more", "says"),
    [
        ([(10, 48), (5, 64)], {}, "lengthRamp has tokens 10, 5, expected rising numbers"),
        ([(10, 31)], {"cp": 2}, "lengthRamp: seqLen is 31, expected a multiple of tp x cp = 2"),
        ([(10, 32, 3)], {}, "lengthRamp: microBatch is 3, expected a divisor of each rank's 4"),
        ([(10, 32, 4)], {"pp": 2}, "lengthRamp: microBatch is 4, which makes 1 of a share of 4"),
    ],
)
def test_lengths_that_can_not_be_cut_are_refused(
    ramp: list[tuple[int, ...]], more: dict[str, int], says: str
) -> None:
    fields = ("tokens", "seqLen", "microBatch")
    changes = [dict(zip(fields, change, strict=False)) for change in ramp]
    trainer = {"lengthRamp": changes, "globalBatch": 8, "microBatch": 2}
    job = {"trainer": trainer, "parallelism": {"dpReplicate": 1, "dpShard": 2, **more}}

    with pytest.raises(MisconfiguredError) as caught:
        read_job(job, 2 * more.get("pp", 1) * more.get("cp", 1))

    assert says in str(caught.value)
    assert caught.value.hint


def test_a_source_has_to_be_longer_than_the_longest_sequence() -> None:
    job = runfile.Trainer(length_ramp=(runfile.LengthChange(tokens=1, seq_len=4000),))

    with pytest.raises(MisconfiguredError, match=r"4000 tokens, expected more than .* = 4000"):
        Samples(Tokens(IDS, "d16e57000000", 63), job)


@pytest.mark.parametrize(
    ("ramp", "more", "says"),
    [
        ([(10, 8), (5, 16)], {}, "tokens 10, 5, expected rising numbers"),
        ([(10, 8), (10, 16)], {}, "expected rising numbers"),
        ([(10, 9)], {}, "batchRamp: globalBatch is 9, expected a multiple of the 2 ranks"),
        ([(10, 12)], {}, "batchRamp: microBatch is 4, expected a divisor of each rank's 6"),
        ([(10, 4)], {"pp": 2}, "batchRamp: microBatch is 2, which makes 1 of a share of 2"),
    ],
)
def test_a_ramp_that_can_not_be_shared_out_is_refused(
    ramp: list[tuple[int, int]], more: dict[str, int], says: str
) -> None:
    changes = [{"tokens": tokens, "globalBatch": batch} for tokens, batch in ramp]
    trainer = {"batchRamp": changes, "globalBatch": 8, "microBatch": 4}
    job = {"trainer": trainer, "parallelism": {"dpReplicate": 1, "dpShard": 2, **more}}
    if more:
        trainer["microBatch"] = 2

    with pytest.raises(MisconfiguredError) as caught:
        read_job(job, 2 * more.get("pp", 1))

    assert says in str(caught.value)
    assert caught.value.hint
