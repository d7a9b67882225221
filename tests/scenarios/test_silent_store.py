"""A durable tier that does not answer is asked again, for a while; then memory has to do."""

from typing import Any

import msgspec
import pytest

from orchestrator.core.decisions import EndRun, SearchCheckpoints, StartGeneration
from orchestrator.core.events import CheckpointFound, ControllerStarted, SearchFailed
from orchestrator.core.phases import RunPhase
from orchestrator.protocol.ids import Generation, Step
from tests import runfiles
from tests.conftest import Cluster
from tests.journals import commit


def searching(cluster: Any, held: int | None) -> None:
    """Step 15 is committed, memory has an older step or none, and a rank died."""
    cluster.start()
    cluster.train(10)
    if held is not None:
        cluster.hold(held)
    cluster.train(10)
    commit(cluster, 15)
    if held is None:
        cluster.state.holdings.drop(cluster.state.holdings)
    assert [type(d) for d in cluster.after(0.1).exit(1)] == [SearchCheckpoints]


def wait(cluster: Any, for_s: float, *, failing: bool) -> list[Any]:
    """Beats, and a failure for each search that is ordered, if so; returns what is ordered."""
    ordered: list[Any] = []
    asked, end = True, cluster.now + for_s
    while cluster.now < end and not cluster.state.phase.final and cluster.state.wanting:
        decisions = cluster.after(0.5).beat(step=20)
        if asked and failing:
            event = SearchFailed(at=cluster.at(), reason="timed out", again=True)
            decisions += cluster.tell(event)
        ordered += decisions
        asked = any(isinstance(d, SearchCheckpoints) for d in decisions)
    return ordered


def test_one_search_without_an_answer_is_not_the_end(cluster: Any) -> None:
    searching(cluster, None)

    again = wait(cluster, 3, failing=True)
    (order,) = [d for d in cluster.found(15) if isinstance(d, StartGeneration)]

    assert any(isinstance(d, SearchCheckpoints) for d in again)
    assert order.restore is not None
    assert order.restore.step == 15


@pytest.mark.parametrize("failing", [True, False], ids=["failing", "hanging"])
def test_a_silent_store_is_given_up_for_whole_memory(cluster: Any, *, failing: bool) -> None:
    searching(cluster, 10)

    ordered = wait(cluster, 1000, failing=failing)

    (order,) = [d for d in ordered if isinstance(d, StartGeneration)]
    assert order.restore is not None
    assert (order.restore.step, order.restore.commit) == (10, "")
    assert "the durable tier does not answer" in order.reason
    assert cluster.now < (75 if failing else 700)


def test_a_silent_store_ends_a_run_that_has_nothing_else_and_says_so(cluster: Any) -> None:
    searching(cluster, None)

    (end,) = [d for d in wait(cluster, 1000, failing=True) if isinstance(d, EndRun)]

    assert "timed out" in end.reason
    assert cluster.state.phase is RunPhase.FAILED
    assert 40 < cluster.now < 75


def test_what_was_committed_during_a_search_that_did_not_see_it_stays_sound(cluster: Any) -> None:
    searching(cluster, None)
    cluster.after(0.1)
    commit(cluster, 18)

    cluster.after(0.1).found(15)

    assert cluster.state.committed(18)


def late(cluster: Any, step: int) -> CheckpointFound:
    """Return what a search finds in the end that the first generation asked for."""
    return CheckpointFound(
        at=cluster.at(),
        step=Step(step),
        epoch=Generation(1),
        key=f"commits/{step}",
        generation=Generation(1),
    )


def test_what_a_search_finds_that_was_given_up_says_nothing_of_later_commits(cluster: Any) -> None:
    searching(cluster, 10)
    wait(cluster, 1000, failing=False)
    assert cluster.state.generation == 2
    cluster.resume()
    cluster.train(20)
    commit(cluster, 30)

    cluster.tell(late(cluster, 15))

    assert cluster.state.committed(30)


def test_the_answer_to_an_earlier_search_is_none_to_the_present_one(cluster: Any) -> None:
    searching(cluster, 10)
    wait(cluster, 1000, failing=False)
    cluster.resume()
    cluster.train(20)
    commit(cluster, 30)
    cluster.state.holdings.drop(cluster.state.holdings)
    assert [type(d) for d in cluster.after(0.1).exit(1)] == [SearchCheckpoints]

    assert cluster.tell(late(cluster, 15)) == []
    failed = SearchFailed(
        at=cluster.at(), reason="timed out", again=False, generation=Generation(1)
    )
    assert cluster.tell(failed) == []

    (order,) = [d for d in cluster.after(0.1).found(30) if isinstance(d, StartGeneration)]
    assert order.restore.step == 30


def test_the_answer_to_a_search_that_was_given_up_is_news_to_nobody() -> None:
    """Not even before the first generation, nor within the one that asked again."""
    cluster = Cluster(runfiles.text(trainer={"steps": 1000}, recovery={"spareWait": "30m"}))
    cluster.tell(ControllerStarted(at=cluster.at(), incarnation=1))
    decisions = [d for node in ("node-0", "node-1", "node-2") for d in cluster.join(node)]
    (first,) = [d for d in decisions if isinstance(d, SearchCheckpoints)]
    again: list[SearchCheckpoints] = []
    while not again:
        again = [d for d in cluster.after(1).tick() if isinstance(d, SearchCheckpoints)]
        for node in ("node-0", "node-1", "node-2"):
            cluster.join(node)
    late = CheckpointFound(
        at=cluster.at(), step=None, epoch=None, key="", generation=first.generation,
        number=first.number,
    )  # fmt: skip

    assert cluster.tell(late) == []

    answer = msgspec.structs.replace(late, number=again[0].number)
    assert any(isinstance(d, StartGeneration) for d in cluster.tell(answer))
    cluster.resume()
    cluster.train(50)
    commit(cluster, 50)
    cluster.after(1).tell(msgspec.structs.replace(late, at=cluster.at()))
    assert cluster.state.committed(Step(50))
