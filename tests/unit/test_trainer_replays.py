"""Replays within a world's steps: who waits for what, and when there are none."""

import itertools
import time

import pytest
import torch

from orchestrator.protocol.layout import Layout
from orchestrator.worker import Aborted, RankPhase
from trainer import processors
from trainer.blame import Chain
from trainer.reporter import Unheard
from trainer.ring import await_orders

HOURS_S = 3600.0


class Ordered(Unheard):
    """Hears that its generation is over the third time that it says what it does."""

    said = 0

    def phase(self, phase: RankPhase, *, micro_batch: int = 0) -> None:
        assert (phase, micro_batch) == (RankPhase.WAITING, 0)
        self.said += 1
        if self.said == 3:
            raise Aborted("generation 1 is over")


@pytest.mark.parametrize(("device", "repeats"), [("cpu", True), ("cuda", False)])
def test_only_cpus_are_known_to_come_to_the_same_bits(device: str, *, repeats: bool) -> None:
    assert processors.known_to_repeat(torch.device(device)) == repeats


@pytest.mark.parametrize(
    ("layout", "others"),
    [
        (Layout(dp_replicate=3, tp=2), True),
        (Layout(dp_shard=2, tp=2), True),
        (Layout(tp=4), False),
        (Layout(dp_replicate=3, pp=2), True),
        (Layout(pp=2), False),
        (Layout(dp_replicate=3, cp=2), True),
        (Layout(cp=2, tp=2), False),
    ],
)
def test_groups_look_at_each_other_where_there_are_two(layout: Layout, *, others: bool) -> None:
    assert (layout.readers > 1) == others
    chain = Chain.of(layout)
    assert (len(chain.ranks) > chain.together) == others


def test_orders_are_awaited_for_as_long_as_a_controller_takes_to_find_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hours = itertools.count(step=HOURS_S)
    monkeypatch.setattr(time, "monotonic", lambda: next(hours))

    with pytest.raises(Aborted):
        await_orders(Ordered())
