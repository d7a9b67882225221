"""When a world that stands still hangs, whose fault that is, and when it has a reason to."""

from collections.abc import Callable
from typing import Any

from orchestrator.core.phases import Bucket, RunPhase
from orchestrator.protocol.phases import RankPhase
from tests.journals import SHORT, finish
from tests.orders import started


def test_a_stopped_process_is_named_and_dismissed_within_half_of_detect_within(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(20)
    begun = cluster.now
    decisions: list[Any] = []
    while not decisions and cluster.now < begun + 10:
        decisions = cluster.after(0.5).beat(
            step=20, moving=lambda _: False, states="SSTS", steps={2: 19}
        )

    order = started(decisions)
    assert cluster.now - begun <= 6.0
    assert order.dismiss == (2,)
    assert "state T" in cluster.state.incidents[-1].findings[0].evidence


def test_a_world_that_stands_still_is_a_hang_and_the_rank_behind_is_the_culprit(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(20)
    begun = cluster.now
    decisions: list[Any] = []
    while not decisions and cluster.now < begun + 20:
        decisions = cluster.after(0.5).beat(step=20, moving=lambda _: False, steps={3: 19})

    assert started(decisions).dismiss == (3,)
    assert cluster.now - begun <= 10.0
    spent = cluster.state.ledger.totals()[Bucket.DETECT]
    assert spent > 5_000_000


def test_a_hang_that_names_nobody_dismisses_everybody(cluster: Any) -> None:
    cluster.start()
    cluster.train(20)
    decisions: list[Any] = []
    for _ in range(40):
        decisions = decisions or cluster.after(0.5).beat(step=20, moving=lambda _: False)

    assert started(decisions).dismiss == (0, 1, 2, 3)


def test_hang_is_not_reported_while_a_checkpoint_stalls_every_rank(cluster: Any) -> None:
    cluster.start()
    cluster.train(20)

    for _ in range(120):
        phases = {1: RankPhase.CHECKPOINT}
        assert cluster.after(0.5).beat(step=20, moving=lambda _: False, phases=phases) == []


def test_a_world_that_waits_for_one_rank_that_waits_for_data_does_not_hang(cluster: Any) -> None:
    cluster.start()
    cluster.train(20)

    for _ in range(120):
        phases = {1: RankPhase.DATA}
        beat = cluster.after(0.5).beat(step=20, moving=lambda rank: rank == 1, phases=phases)
        assert beat == []


def test_a_rank_that_is_done_is_no_reason_for_the_others_to_stand_still(cluster: Any) -> None:
    cluster.start()
    cluster.train(20)
    phases = {0: RankPhase.DONE, 1: RankPhase.DONE}
    begun = cluster.now
    decisions: list[Any] = []
    while not decisions and cluster.now < begun + 20:
        cluster.after(0.5)
        decisions = cluster.beat(step=21, moving=lambda _: False, phases=phases, steps={3: 20})

    # Being done is announced, as saving is; only that nobody has to wait for it.
    assert started(decisions).dismiss == (3,)
    assert cluster.now - begun <= 10.0


def test_a_world_in_which_every_rank_is_done_may_stand_still(cluster: Any) -> None:
    cluster.start()
    cluster.train(20)
    phases = dict.fromkeys(range(4), RankPhase.DONE)

    for _ in range(120):
        assert cluster.after(0.5).beat(step=21, moving=lambda _: False, phases=phases) == []


def test_nodes_that_say_nothing_but_that_they_are_done_have_come_all_the_way(
    cluster_of: Callable[..., Any],
) -> None:
    cluster = cluster_of(SHORT)
    cluster.start()
    cluster.train(20)
    cluster.hold(20)
    started(cluster.after(0.1).exit(1, step=20))

    # Restored behind the last step: there is none to complete, hence no other mark to be told.
    finish(cluster, dict.fromkeys(range(4), (1, 2)))

    assert cluster.state.phase is RunPhase.SUCCEEDED
    assert [incident.open for incident in cluster.state.incidents] == [False]


def test_a_suspended_machine_is_not_taken_for_a_hang_or_a_lost_node(cluster: Any) -> None:
    cluster.start()
    cluster.train(20)

    cluster.after(3600).tick()
    cluster.after(0.5).beat(step=20, moving=lambda _: False)
    cluster.train(5)

    assert cluster.state.incidents == []
