"""A fault does harm if it leaves a run further off than clean runs are from each other."""

import math
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from orchestrator.campaign import harm, job
from orchestrator.campaign.judging import Result
from orchestrator.campaign.summary import Clean, campaign
from orchestrator.cli import campaigns
from orchestrator.cli.choices import Form
from orchestrator.protocol.trials import Gap
from trainer.data import Batch
from trainer.trials.drift import End, Reordered, gap

CLEAN = Gap(loss=1e-5, weights=1e-6)
NEAR = Gap(loss=0.5e-5, weights=1e-6)
BASE = Result(number=0, name="a", group="state", effective=True, noticed=True)


@pytest.mark.parametrize(
    ("worst", "harmful", "loss", "weights"),
    [
        (NEAR, False, 0.5, 1.0),
        (Gap(loss=2e-5, weights=0.0), True, 2.0, 1.0),
        (Gap(loss=0.0, weights=3e-6), True, 0.5, 3.0),
        (Gap(loss=None, weights=0.0), True, None, 1.0),
        (Gap(loss=0.0, weights=None), True, 0.5, None),
    ],
)
def test_the_worst_rank_says_whether_a_fault_does_harm(
    worst: Gap, loss: float | None, weights: float | None, *, harmful: bool
) -> None:
    found = harm.told(BASE, [NEAR, worst, NEAR], CLEAN)

    assert found.harmful is harmful
    assert found.loss_gap == (None if loss is None else pytest.approx(loss))
    assert found.weight_gap == (None if weights is None else pytest.approx(weights))


def test_nothing_is_told_where_clean_runs_do_not_differ() -> None:
    for clean in (Gap(loss=0.0, weights=1e-6), Gap(loss=1e-5, weights=0.0)):
        assert harm.told(BASE, [Gap(loss=None, weights=None)], clean) == BASE
    assert harm.widest([None, Gap(loss=1e-5, weights=0.0), Gap(loss=0.0, weights=1e-6)]) == CLEAN


def test_recall_of_what_does_harm_is_told_beside_that_of_all() -> None:
    results = [
        harm.told(BASE, [NEAR], CLEAN),
        _numbered(1, harm.told(BASE, [Gap(loss=None, weights=None)], CLEAN)),
        _numbered(2, harm.told(BASE, [Gap(loss=0.0, weights=1.0)], CLEAN), noticed=False),
        _numbered(3, BASE),
    ]

    told = campaign(results, seed=1, trials=4, ranks=3, clean=Clean(0), pairs=[])

    (row,) = told.by_class
    assert (row.recall.count, row.recall.of, row.judged) == (3, 4, 3)
    assert (row.harmful.count, row.harmful.of) == (1, 2)
    assert (row.harmful_loss.count, row.harmful_loss.of) == (1, 1)
    assert told.summary.state_harmful_recall == row.harmful
    assert "what would do harm" in campaigns.shown(told, Form.TEXT)
    nobody_looked = campaign([BASE], seed=1, trials=1, ranks=3, clean=Clean(0), pairs=[])
    assert "what would do harm" not in campaigns.shown(nobody_looked, Form.TEXT)


def _numbered(number: int, result: Result, **changes: Any) -> Result:
    return msgspec.structs.replace(result, number=number, **changes)


def test_a_gap_is_that_to_the_furthest_and_nothing_that_is_not_finite_is_near() -> None:
    twin = End(2.0, torch.tensor([3.0, 4.0], dtype=torch.float64))
    far = End(2.5, torch.tensor([3.0, 9.0], dtype=torch.float64))

    assert gap(twin, [twin]) == Gap(loss=0.0, weights=0.0)
    assert gap(far, [far, twin]) == Gap(loss=0.5, weights=1.0)
    lost = End(math.nan, torch.tensor([math.inf, 4.0], dtype=torch.float64))
    assert gap(lost, [twin]) == Gap(loss=None, weights=None)


class _Numbers:
    """Samples that are their own indices."""

    mark = 1.0

    def batch(self, step: int, indices: range) -> Batch:
        rows = np.array([[step, index] for index in indices], dtype=np.int64)
        return Batch(rows, rows + 1, [[0, index] for index in indices])


def test_samples_change_places_within_their_step_and_none_is_lost() -> None:
    training: Any = SimpleNamespace(stage=SimpleNamespace(batch=6))
    orders = set()
    for seed in (1, 2):
        samples = Reordered(_Numbers(), training, seed)
        batches = [samples.batch(7, range(at, at + 2)) for at in (0, 2, 4)]
        order = [int(row[1]) for batch in batches for row in batch.inputs]
        assert sorted(order) == list(range(6))
        assert [cut for batch in batches for _, cut in batch.cuts] == order
        assert {int(row[0]) for batch in batches for row in batch.inputs} == {7}
        orders.add(tuple(order))
        assert samples.batch(7, range(6)).inputs[:, 1].tolist() == order
        assert samples.batch(8, range(6)).inputs[:, 1].tolist() != order

    assert len(orders) == 2
    assert job.small().spec.trainer.global_batch == 6
