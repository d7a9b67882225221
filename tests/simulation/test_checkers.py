from collections.abc import Sequence
from typing import Any

import pytest

from orchestrator.core.events import Event, Reported
from orchestrator.core.incident import Cause, Finding
from orchestrator.core.journal import Entry
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import Generation, NodeId, Rank
from orchestrator.protocol.messages import RankExited
from orchestrator.simulation import checkers


class Nervous:
    """A detector that takes every report for news."""

    name = "nervous"

    def __init__(self) -> None:
        self.asked = 0

    def observe(self, state: RunState, event: Event) -> Sequence[Finding]:
        if not isinstance(event, Reported):
            return []
        self.asked += 1
        return [
            Finding(
                at=state.now,
                since=state.now,
                kind="hang",
                cause=Cause.UNKNOWN,
                ranks=(Rank(0),),
                evidence="something is odd",
                signature=f"odd {self.asked}",
            )
        ]


def checked(cluster: Any) -> None:
    checkers.check(cluster.run, cluster.entries)


def a_run_with_a_crash(cluster: Any) -> None:
    cluster.start()
    cluster.train(10)
    cluster.hold(10)
    cluster.exit(1)
    cluster.resume()
    cluster.train(3)


def test_a_journal_of_a_sound_run_passes_every_check(cluster: Any) -> None:
    a_run_with_a_crash(cluster)

    checked(cluster)


def test_a_decision_that_a_replay_does_not_take_is_found(cluster: Any) -> None:
    a_run_with_a_crash(cluster)
    last = cluster.entries[-1]
    (order, *_) = [d for entry in cluster.entries for d in entry.decisions]
    cluster.entries[-1] = Entry(seq=last.seq, event=last.event, decisions=(order,))

    with pytest.raises(AssertionError, match="decided otherwise") as caught:
        checked(cluster)

    assert any(f"event {last.seq}" in note for note in caught.value.__notes__)


def test_a_controller_that_takes_a_repeated_report_for_news_is_found(cluster: Any) -> None:
    cluster.start()
    cluster.train(10)
    cluster.controller._casebook._detectors.append(Nervous())
    twice = checkers.Redelivery(lambda: True)
    decisions = cluster.exit(1)

    with pytest.raises(AssertionError, match=r"told twice, Reported changes .*incidents"):
        twice(cluster.controller, cluster.entries[-1].event, decisions)


def test_a_report_of_an_exit_that_comes_twice_changes_nothing(cluster: Any) -> None:
    cluster.start()
    cluster.train(10)
    decisions = cluster.exit(1)

    checkers.Redelivery(lambda: True)(cluster.controller, cluster.entries[-1].event, decisions)

    assert isinstance(cluster.entries[-1].event.fact, RankExited)
    assert (cluster.state.generation, cluster.state.seats[1]) == (Generation(2), NodeId("node-0"))


def test_a_run_that_is_begun_again_too_often_once_faults_have_stopped_is_found(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.train(10)
    calm_at = cluster.now
    decisions = cluster.after(0.1).exit(1)
    told = (cluster.controller, cluster.entries[-1].event, decisions)

    checkers.Liveness(calm_at, 1)(*told)
    checkers.Liveness(cluster.now, 0)(*told)
    with pytest.raises(AssertionError, match="begun again 1x since the last fault"):
        checkers.Liveness(calm_at, 0)(*told)
