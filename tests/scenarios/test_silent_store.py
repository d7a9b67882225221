"""A durable tier that does not answer is asked again, for a while; then memory has to do."""

from typing import Any

import pytest

from orchestrator.core.decisions import EndRun, SearchCheckpoints, StartGeneration
from orchestrator.core.events import SearchFailed
from orchestrator.core.phases import RunPhase
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
        cluster.state.holdings.clear()
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
