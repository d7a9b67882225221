"""Replays within a world's steps: who waits for what, and when there are none."""

import itertools
import time

import pytest
import torch

from orchestrator.protocol.layout import Layout
from orchestrator.worker import Aborted, RankPhase
from trainer.replays import Replays
from trainer.ring import await_orders
from trainer.step import Unheard

HOURS_S = 3600.0


class Ordered(Unheard):
    """Hears that its generation is over the third time that it says what it does."""

    said = 0

    def phase(self, phase: RankPhase, *, micro_batch: int = 0) -> None:
        assert (phase, micro_batch) == (RankPhase.WAITING, 0)
        self.said += 1
        if self.said == 3:
            raise Aborted("generation 1 is over")


@pytest.mark.parametrize(("device", "possible"), [("cpu", True), ("cuda", False)])
def test_nothing_is_replayed_where_two_processes_differ(device: str, *, possible: bool) -> None:
    assert Replays.possible(Layout(dp_replicate=3), torch.device(device)) == possible


@pytest.mark.parametrize(
    ("layout", "possible"),
    [
        (Layout(dp_replicate=3, tp=2), True),
        (Layout(dp_shard=2, tp=2), True),
        (Layout(tp=4), False),
        (Layout(dp_replicate=3, pp=2), False),
        (Layout(dp_replicate=3, cp=2), True),
        (Layout(cp=2, tp=2), False),
    ],
)
def test_who_computes_whole_micro_batches_can_do_it_for_others(
    layout: Layout, *, possible: bool
) -> None:
    assert Replays.possible(layout, torch.device("cpu")) == possible


def test_orders_are_awaited_for_as_long_as_a_controller_takes_to_find_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hours = itertools.count(step=HOURS_S)
    monkeypatch.setattr(time, "monotonic", lambda: next(hours))

    with pytest.raises(Aborted):
        await_orders(Ordered())
