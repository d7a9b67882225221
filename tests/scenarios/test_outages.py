"""Time in which no controller looked counts against nobody, in whatever the run was."""

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.core.decisions import CommitCheckpoint, EndRun, StartGeneration
from orchestrator.core.events import ControllerStarted
from orchestrator.core.phases import RunPhase
from orchestrator.core.report import report
from orchestrator.protocol.ids import Generation, Step
from orchestrator.protocol.messages import RanksFinished, RanksTroubled, Receipt, ShardsWritten
from tests.journals import SHORT, commit


def succeed(cluster: Any, after_s: float) -> list[Any]:
    """The controller was gone for a while; the next one starts."""
    return cluster.after(after_s).tell(ControllerStarted(at=cluster.at(), incarnation=2))


def come_back(cluster: Any, mark: int) -> list[Any]:
    generation = cluster.state.generation
    decisions = []
    for node in ("node-0", "node-1", "node-2"):
        seated = node in cluster.state.seats
        decisions += cluster.after(0.1).join(
            node, generation=generation if seated else 0, mark=mark if seated else 0
        )
    return decisions


def ends(decisions: list[Any]) -> list[EndRun]:
    return [d for d in decisions if isinstance(d, EndRun)]


def starts(decisions: list[Any]) -> list[StartGeneration]:
    return [d for d in decisions if isinstance(d, StartGeneration)]


def test_a_successor_does_not_count_the_outage_as_waiting_for_nodes(cluster: Any) -> None:
    cluster.start()
    cluster.train(60)
    commit(cluster, 50)
    cluster.exit(1)
    assert cluster.state.phase is RunPhase.SEARCHING

    assert ends(succeed(cluster, 61)) == []
    come_back(cluster, mark=5)

    (order,) = starts(cluster.after(0.1).found(50))
    assert order.restore is not None
    assert order.restore.step == 50


def test_a_run_still_gives_up_after_spare_wait_in_which_a_controller_lived(cluster: Any) -> None:
    cluster.start()
    cluster.train(5)
    cluster.lose("node-2")
    cluster.lose("node-1")
    for _ in range(30):
        cluster.after(1).beat(step=5, heard=("node-0",))
    decisions = succeed(cluster, 1000)
    cluster.after(0.1).join("node-0", generation=1, mark=5)
    begun = cluster.now

    while not ends(decisions) and cluster.now < begun + 100:
        decisions = cluster.after(1).beat(step=5, heard=("node-0",))

    assert "after waiting 60 s" in ends(decisions)[0].reason
    assert cluster.now - begun == pytest.approx(30, abs=2)


def test_a_successor_gives_the_last_checkpoint_its_time_to_be_committed(
    cluster_of: Callable[..., Any],
) -> None:
    cluster = cluster_of(SHORT)
    cluster.start()
    cluster.train(20)
    cluster.hold(20)
    for node, shard in (("node-0", 0), ("node-1", 1)):
        receipts = (Receipt(shard, 1, "d"),)
        cluster.say(
            node,
            ShardsWritten(generation=Generation(1), step=Step(20), receipts=receipts, model="m"),
        )
    for node in cluster.state.world:
        ranks = cluster.state.ranks_of(node)
        cluster.say(
            node,
            RanksFinished(
                generation=Generation(1), step=Step(20), ranks=ranks, lanes=((1, 2),) * len(ranks)
            ),
        )
    assert cluster.state.phase is RunPhase.FINISHING

    decisions = succeed(cluster, 61)

    assert [type(d) for d in decisions] == [CommitCheckpoint]
    commit(cluster, 20)
    assert cluster.state.phase is RunPhase.SUCCEEDED


@pytest.mark.parametrize("reached", ["cleared", "seated", "formed", "restored"])
def test_a_successor_takes_no_phase_of_a_recovery_for_stuck(cluster: Any, reached: str) -> None:
    cluster.start()
    cluster.train(20)
    cluster.hold(20)
    cluster.exit(1)
    for mark in ("cleared", "seated", "formed", "restored"):
        cluster.after(0.05).reach(mark)
        if mark == reached:
            break

    decisions = succeed(cluster, 700)
    decisions += cluster.after(0.01).tick()
    decisions += come_back(cluster, mark=5)

    assert starts(decisions) == []
    assert cluster.state.phase is RunPhase.TRAINING
    assert cluster.state.generation == 2
    assert report(cluster.state).false_alarms == 0
    assert [i.kind for i in cluster.state.incidents] == ["crash", "controller-restart"]


def test_what_survivors_complained_of_before_an_outage_may_still_be_explained_after_it(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(5)
    fact = RanksTroubled(generation=Generation(1), ranks=(), message="reset by peer")
    cluster.say("node-0", fact)

    succeed(cluster, 20)
    cluster.after(0.1).tick()
    assert [i.kind for i in cluster.state.incidents] == ["controller-restart"]

    cluster.after(0.1).exit(2)
    assert cluster.state.incidents[-1].kind == "crash"


def test_a_phase_is_not_learned_as_short_because_most_of_it_passed_in_an_outage(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(20)
    cluster.hold(20)
    cluster.exit(1)
    for mark in ("cleared", "seated", "formed"):
        cluster.after(0.05).reach(mark)
    assert cluster.state.phase is RunPhase.RESTORING
    succeed(cluster, 40)
    come_back(cluster, mark=3)
    cluster.after(0.1).reach("restored")
    cluster.after(0.1).reach("stepped")
    cluster.hold(20)
    cluster.exit(1)
    assert len(starts(cluster.rest())) == 1
    for mark in ("cleared", "seated", "formed"):
        cluster.after(0.05).reach(mark)

    for _ in range(80):
        assert cluster.after(0.5).beat(step=0) == []
