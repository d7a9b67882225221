"""What ranks make of steps that were computed once more, when nobody can be convicted of them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from orchestrator.protocol import runfile
from orchestrator.protocol.layout import Layout
from orchestrator.worker import Aborted, RankPhase
from trainer import parallel, processors
from trainer.blame import Verdict
from trainer.config import ModelConfig
from trainer.data import Samples, Tokens
from trainer.guard import Guard
from trainer.replay import known_good
from trainer.replays import Replays
from trainer.reporter import Unheard
from trainer.ring import RETRIES_MAX, Ring
from trainer.step import Training

CONFIG = ModelConfig(dim=16, layers=1, heads=2, kv_heads=1, ffn_dim=16, vocab=16)
TOKENS = Tokens(np.arange(512, dtype=np.uint32) * 7 % 16, "d16e57000000", 15)
JOB = runfile.Trainer(steps=5, seq_len=8, global_batch=4, warmup_steps=1)


class Ordered(Unheard):
    """Hears who is said to be wrong since when; its generation is over once it waits for orders."""

    def __init__(self) -> None:
        self.since: list[int] = []

    def phase(self, phase: RankPhase, *, micro_batch: int = 0) -> None:
        assert (phase, micro_batch) == (RankPhase.WAITING, 0)
        raise Aborted("generation 1 is over")

    def diverged(self, step: int, *, since: int, **_: Any) -> None:
        del step
        self.since.append(since)


@pytest.mark.parametrize(
    ("layout", "given_up"),
    [
        (Layout(dp_replicate=4), True),
        (Layout(dp_replicate=3, dp_shard=2), True),
        (Layout(dp_replicate=2, dp_shard=2), False),
        (Layout(dp_shard=4), False),
    ],
)
def test_replays_are_given_up_without_a_majority_only_if_one_rank_can_not_cause_that(
    monkeypatch: pytest.MonkeyPatch, layout: Layout, *, given_up: bool
) -> None:
    """A rank whose weights arrive wrong, here in one way and there in another, misleads others."""
    size = layout.world_size
    world = SimpleNamespace(layout=layout, rank=0, size=size, shards=layout.dp_shard)
    training: Any = SimpleNamespace(job=JOB, world=world, stages=[None], pipeline=None)
    ring, guard = Ring(training, Samples(TOKENS, JOB)), Guard("replays")

    def told(_: Guard, *digests: Tensor) -> list[list[tuple[int]]]:
        return [[(rank,)] * len(digests) for rank in range(size)]

    monkeypatch.setattr(ring, "exchange", told)
    pairs = [((rank,), (rank,)) for rank in range(size)]

    found = ring.find_out(guard, pairs, lambda _: torch.zeros(()), 1, ring.chain)

    assert guard.given_up == given_up
    assert (found is None) == given_up
    assert found is None or (found.divided and not found.proven)


def test_what_a_replay_showed_is_told_since_the_last_one_that_came_out_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody has looked at the steps between: whoever is wrong now may have been wrong in them."""
    monkeypatch.setattr(processors, "known_to_repeat", lambda _: False)
    with parallel.alone() as world:
        samples = Samples(TOKENS, JOB)
        replays = Replays(Training(JOB, CONFIG, samples, world), samples, 0.1, 0.1, untested=True)
        replays.ring.begin(150, 40)
        found, heard = Verdict((1,), proven=True, evidence="differs"), Ordered()

        for _ in range(RETRIES_MAX):
            assert replays._thrown_away(150, found, heard)
        with pytest.raises(Aborted):
            replays._thrown_away(150, found, heard)

    assert heard.since == [known_good(149, 40)]
