"""A recovery is held up against others of its kind, and what is slow is not taken for stuck."""

from typing import Any

import pytest

from orchestrator.core.decisions import StartGeneration
from orchestrator.core.phases import RunPhase
from orchestrator.detect.hang import AGAIN_MAX_S, AGAIN_WARMUPS
from orchestrator.protocol.phases import RankPhase
from tests.journals import commit

DURABLE = 30.0
"""Seconds; detectWithin is 10 s, and what these clusters do from memory takes 0.05 s a phase."""


def starts(decisions: list[Any]) -> list[StartGeneration]:
    return [d for d in decisions if isinstance(d, StartGeneration)]


def linger(
    cluster: Any, seconds: float, phase: RankPhase = RankPhase.WAITING, every_s: float = 0.5
) -> list[Any]:
    """Nodes are heard, ranks stand still in what they announce."""
    decisions: list[Any] = []
    phases = dict.fromkeys(range(4), phase)
    for _ in range(int(seconds / every_s)):
        decisions += cluster.after(every_s).beat(step=0, moving=lambda _: False, phases=phases)
        if starts(decisions):
            break
    return decisions


def restart_in_place(cluster: Any) -> None:
    cluster.train(5)
    cluster.hold(cluster.state.reached_step)
    assert len(starts(cluster.after(0.1).exit(1))) == 1


def test_a_restore_from_the_durable_tier_is_not_measured_by_those_from_memory(
    cluster: Any,
) -> None:
    cluster.start()
    restart_in_place(cluster)
    cluster.resume()
    cluster.train(60)
    commit(cluster, 60)
    cluster.exit(1)
    cluster.after(0.1).found(60)
    cluster.reach("cleared")
    assert cluster.state.phase is RunPhase.STARTING

    assert linger(cluster, DURABLE) == []

    cluster.resume()
    assert cluster.state.phase is RunPhase.TRAINING
    assert cluster.state.generation == 3


@pytest.mark.parametrize("slow", ["cleared", "formed", "restored"])
def test_the_first_restart_of_a_kind_may_take_as_long_as_what_ranks_announce(
    cluster: Any, slow: str
) -> None:
    cluster.start()
    restart_in_place(cluster)

    for mark in ("cleared", "seated", "formed", "restored", "stepped"):
        cluster.after(0.05).reach(mark)
        if mark == slow:
            assert linger(cluster, 300, RankPhase.RESTORING) == []

    assert cluster.state.generation == 2


def test_a_recovery_that_hangs_is_found_by_what_others_of_its_kind_took(cluster: Any) -> None:
    cluster.start()
    restart_in_place(cluster)
    cluster.resume()
    restart_in_place(cluster)
    for mark in ("cleared", "seated", "formed"):
        cluster.after(0.05).reach(mark)
    begun = cluster.now

    (order,) = starts(linger(cluster, 60, RankPhase.RESTORING))

    assert order.generation == 4
    found_s = cluster.state.incidents[-1].detected_at - begun
    assert found_s == pytest.approx(cluster.state.timeouts.form_s, abs=1)
    assert "Restoring for 10.5 s, limit 10.0 s" in order.reason


def test_a_phase_that_was_broken_off_for_being_slow_has_more_time_when_it_comes_again(
    cluster: Any,
) -> None:
    cluster.start()
    restart_in_place(cluster)
    cluster.resume()
    restart_in_place(cluster)
    cluster.after(0.1).reach("cleared")
    assert len(starts(linger(cluster, DURABLE))) == 1
    cluster.after(0.1).reach("cleared")

    assert linger(cluster, DURABLE) == []

    cluster.resume()
    assert cluster.state.phase is RunPhase.TRAINING


@pytest.mark.parametrize("slow", ["", "cleared", "seated", "formed", "restored"])
def test_what_takes_longer_than_its_limit_has_twice_as_long_until_it_comes_to_its_end(
    cluster: Any, slow: str
) -> None:
    cluster.start()
    restart_in_place(cluster)
    tried = 1

    while not came_to_its_end(cluster, slow, 4 * cluster.state.timeouts.warmup_s):
        tried += 1
        assert tried < 12, "it is begun again for ever"

    assert tried > 2
    assert "after which it was broken off before" in cluster.state.incidents[-1].reason
    cluster.resume()
    assert cluster.state.phase is RunPhase.TRAINING
    assert cluster.state.broken_off.keys().isdisjoint(cluster.state.phase_times)


def came_to_its_end(cluster: Any, slow: str, needs_s: float, every_s: float = 0.5) -> bool:
    """Recover; the phase after a mark takes so long each time. Return whether it was let to."""
    for mark in ("", "cleared", "seated", "formed", "restored"):
        if mark:
            cluster.after(0.05).reach(mark)
        if mark == slow:
            phase = RankPhase.RESTORING if slow in {"formed", "restored"} else RankPhase.WAITING
            return not starts(linger(cluster, needs_s, phase, every_s))
    raise AssertionError(slow)


@pytest.mark.parametrize("slow", ["", "cleared", "seated", "formed", "restored"])
def test_what_hangs_each_time_is_not_waited_for_ever_longer(cluster: Any, slow: str) -> None:
    cluster.start()
    cluster.train(5)
    cluster.hold(cluster.state.reached_step)
    cluster.after(0.1).exit(1)
    most_s = min(AGAIN_WARMUPS * cluster.state.timeouts.warmup_s, AGAIN_MAX_S)

    waited_s = [0.0, 0.0]
    while waited_s[-2] < 0.99 * most_s:
        began = cluster.now
        assert not came_to_its_end(cluster, slow, 3 * most_s, every_s=2.0)
        waited_s.append(cluster.now - began)

    assert waited_s[-2:] == pytest.approx([most_s] * 2, rel=0.02), "with back-off"
    told = cluster.state.incidents[-1].findings[0].evidence
    assert f"limit {most_s:.1f} s (2 x " in told
    assert "and no more than 8 x warmup_s or 3600 s)" in told


def test_what_is_broken_off_early_is_not_known_for_that(cluster: Any) -> None:
    cluster.start()
    restart_in_place(cluster)
    cluster.reach("cleared")
    cluster.after(0.1).exit(2)
    assert len(starts(cluster.rest())) == 1
    cluster.after(0.1).reach("cleared")

    assert linger(cluster, DURABLE) == []


def test_a_node_that_is_new_is_not_measured_by_one_whose_processes_were_warm(
    cluster: Any,
) -> None:
    cluster.start()
    cluster.lose("node-2")
    restart_in_place(cluster)
    cluster.resume()
    cluster.hold(cluster.state.reached_step)
    cluster.lose("node-1")
    assert len(starts(cluster.after(1).join("node-1", incarnation=2))) == 1
    cluster.reach("cleared")
    assert cluster.state.phase is RunPhase.STARTING

    assert linger(cluster, DURABLE) == []


def test_phases_that_nobody_saw_pass_are_not_taken_for_quick(cluster: Any) -> None:
    cluster.start()
    restart_in_place(cluster)
    cluster.after(0.1).reach("cleared")
    cluster.after(0.1).reach("stepped")
    assert cluster.state.phase is RunPhase.TRAINING
    restart_in_place(cluster)
    for mark in ("cleared", "seated", "formed"):
        cluster.after(0.05).reach(mark)

    assert linger(cluster, DURABLE, RankPhase.RESTORING) == []
