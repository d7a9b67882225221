"""The end of a run: what is done and durable is not undone by who is lost on the last metres."""

from typing import Any

import pytest

from orchestrator.core.decisions import CommitCheckpoint, Decision, EndRun
from orchestrator.core.events import CommitFailed, ControllerStarted
from orchestrator.core.phases import RunPhase
from orchestrator.protocol.ids import Step
from orchestrator.protocol.messages import WriteFailed
from orchestrator.protocol.phases import RankPhase
from tests.conftest import Cluster
from tests.journals import SHORT, answer, be_done, write_step

LAST = 20
DONE = dict.fromkeys(range(4), RankPhase.DONE)


def wait(cluster: Cluster, seconds: float) -> list[Any]:
    """Let time pass with somebody looking; return what is decided meanwhile."""
    decisions: list[Any] = []
    for _ in range(int(seconds)):
        decisions += cluster.after(1).beat(step=cluster.state.reached_step, phases=DONE)
    return decisions


def take_over(cluster: Cluster) -> list[Decision]:
    """Have the next controller begin."""
    incarnation = cluster.state.incarnation + 1
    return cluster.tell(ControllerStarted(at=cluster.at(), incarnation=incarnation))


def end(decisions: list[Any]) -> EndRun:
    (order,) = [d for d in decisions if isinstance(d, EndRun)]
    return order


@pytest.fixture
def done() -> Cluster:
    """Every rank is done, and the commit of the last step is ordered."""
    cluster = Cluster(SHORT)
    cluster.start()
    cluster.train(LAST)
    cluster.hold(LAST)
    assert write_step(cluster, LAST)
    be_done(cluster)
    assert cluster.state.phase is RunPhase.FINISHING
    return cluster


def test_a_node_lost_while_the_last_commit_is_under_way_is_not_needed_any_more(
    done: Cluster,
) -> None:
    for node in done.state.world:
        assert not [d for d in done.after(0.5).lose(node) if not isinstance(d, EndRun)]

    assert end(answer(done, LAST)).state == "Succeeded"
    assert [i.kind for i in done.state.incidents] == ["node-lost"]


def test_a_commit_that_is_known_late_ends_a_run_that_waits_for_nodes(done: Cluster) -> None:
    for node in sorted(done.state.nodes):
        done.after(0.5).lose(node)
    wait(done, done.state.timeouts.save_s + 2)
    assert done.state.phase is RunPhase.GATHERING

    assert end(answer(done, LAST)).state == "Succeeded"


def test_a_node_lost_before_its_last_shard_is_durable_is_replaced() -> None:
    cluster = Cluster(SHORT)
    cluster.start()
    cluster.train(LAST)
    cluster.hold(LAST)
    be_done(cluster)

    cluster.after(0.5).lose("node-1")

    assert (cluster.state.generation, cluster.state.start_step) == (2, LAST)


def test_a_last_commit_without_an_answer_has_twice_the_time_and_is_named(done: Cluster) -> None:
    done.say("node-0", WriteFailed(generation=done.state.generation, step=Step(5), reason="full"))
    save_s = done.state.timeouts.save_s
    assert wait(done, 1.5 * save_s) == []

    reason = end(wait(done, save_s)).reason

    assert "its commit was ordered and has no answer" in reason
    assert "full" not in reason


def test_a_checkpoint_that_nobody_wrote_is_not_blamed_on_an_older_one() -> None:
    cluster = Cluster(SHORT)
    cluster.start()
    cluster.train(LAST)
    fact = WriteFailed(generation=cluster.state.generation, step=Step(5), reason="full")
    cluster.say("node-0", fact)
    be_done(cluster)

    reason = end(wait(cluster, cluster.state.timeouts.save_s + 2)).reason

    assert reason.endswith("no node has said that it wrote its part")


def test_a_commit_that_is_tried_again_is_not_forgotten_by_a_newer_one() -> None:
    """A controller that takes over repeats every commit that has no answer."""
    cluster = Cluster(SHORT)
    cluster.start()
    cluster.train(10)
    write_step(cluster, 5)
    epoch = cluster.state.generation
    failed = CommitFailed(at=cluster.at(), step=Step(5), epoch=epoch, reason="503", again=True)
    cluster.tell(failed)
    write_step(cluster, 10)
    again = cluster.after(2.1).tick()
    assert [d.step for d in again if isinstance(d, CommitCheckpoint)] == [5]
    answer(cluster, 10)

    decisions = take_over(cluster.after(1))

    assert [d.step for d in decisions if isinstance(d, CommitCheckpoint)] == [5]
