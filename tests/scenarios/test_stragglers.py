"""What is made of a rank that is slow, once it is measured beside its peers."""

from typing import Any

import msgspec
import pytest

from orchestrator.core.decisions import ProbeRanks, StartGeneration
from orchestrator.core.events import Telemetry
from orchestrator.core.incident import Cause, Incident
from orchestrator.core.phases import RunPhase
from orchestrator.policy import stragglers
from orchestrator.protocol.ids import NodeId, Rank, Serial, Step
from orchestrator.protocol.messages import NodeAiling, RankProbed, StepReport, Symptom
from orchestrator.protocol.phases import RankPhase
from orchestrator.protocol.rank import Speed

SLOW = Rank(2)
STEP_S = 0.5


def train(cluster: Any, steps: int, slow: float = 1.0) -> None:
    """Take steps in which one rank computes so many times as long as the others."""
    train_all(cluster, steps, {SLOW: slow})


def train_all(
    cluster: Any, steps: int, slow: dict[Rank, float], busy: dict[Rank, float] | None = None
) -> None:
    """The same with more than one; `busy` is how slow they are in processor time, if known."""
    world = len(cluster.state.seats)
    first = cluster.state.reached_step + 1
    for step in range(first, first + steps):
        cluster.after(STEP_S)
        cluster.progress += 1
        ranks = [Rank(rank) for rank in range(world)]
        compute_s = tuple(0.4 * slow.get(rank, 1 + 0.002 * rank) for rank in ranks)
        busy_s: tuple[float, ...] = (0.0,)
        if busy is not None:
            busy_s = tuple(0.3 * busy.get(rank, 1 + 0.002 * rank) for rank in ranks)
        report = StepReport(Step(step), 2.0, 1.0, 100, STEP_S)
        cluster.tell(
            Telemetry(
                at=cluster.at(), generation=cluster.state.generation,
                heard=tuple(sorted(cluster.state.nodes)), phases=(int(RankPhase.FORWARD),),
                steps=(step,), progress=(cluster.progress,), states="S", cpu_s=(0.0,),
                stall_s=0.0, compute_s=compute_s, busy_s=busy_s, reports=(report,),
            )
        )  # fmt: skip


def go_on(cluster: Any) -> None:
    """Take so many slow steps that they cost more than a restart, or until there is one."""
    for _ in range(20):
        train(cluster, 10, 1.2)
        cluster.hold(cluster.state.reached_step)
        if cluster.state.phase is not RunPhase.TRAINING:
            return


def suspected(cluster: Any, slow: float = 1.2) -> ProbeRanks:
    """Have rank 2 be found, and return the order to measure it."""
    cluster.start()
    train(cluster, 12)
    train(cluster, 12, slow)
    (order,) = (d for d in cluster.decisions if isinstance(d, ProbeRanks))
    return order


def answer(cluster: Any, order: ProbeRanks, slow: float, **named: Any) -> None:
    """Have the first of those that are measured be so many times as slow as the others.

    On a processor that is what a wall clock shows; `busy` is how slow it is in processor time.
    """
    for rank, node in zip(order.ranks, order.nodes, strict=True):
        times = slow if rank == order.ranks[0] else 1.0
        speed = Speed(1e12 / times, 1e11 / times, named.get("problem", ""))
        if busy := named.get("busy"):
            times = busy if rank == order.ranks[0] else 1.0
            speed = msgspec.structs.replace(
                speed, busy_operations=2e12 / times, busy_copied=2e11 / times
            )
        cluster.say(
            node,
            RankProbed(generation=order.generation, number=order.number, rank=rank, speed=speed),
        )


def probes(cluster: Any) -> list[ProbeRanks]:
    return [d for d in cluster.decisions if isinstance(d, ProbeRanks)]


def incident(cluster: Any) -> Incident:
    found: Incident = cluster.state.incidents[0]
    assert found.kind == "straggler"
    return found


def starts(cluster: Any) -> list[StartGeneration]:
    return [d for d in cluster.decisions if isinstance(d, StartGeneration)]


def test_a_slow_rank_is_found_within_ten_steps_and_measured_beside_peers_of_another_node(
    cluster: Any,
) -> None:
    order = suspected(cluster)

    found = incident(cluster)
    assert found.findings[0].step <= 12 + 10
    assert order.ranks[0] == SLOW
    assert order.nodes[0] != order.nodes[1]
    assert "1.20 times as long as its peers" in found.findings[0].evidence
    assert "would take" in found.findings[0].evidence
    assert not found.open
    assert cluster.state.incident is None
    assert not cluster.state.wanting


def test_a_device_that_is_slow_is_swapped_once_it_has_cost_as_much_as_that_does(
    cluster: Any,
) -> None:
    answer(cluster, suspected(cluster), 1.2)
    assert incident(cluster).cause is Cause.HARDWARE
    train(cluster, 1, 1.2)
    cluster.hold(cluster.state.reached_step)
    assert len(starts(cluster)) == 1
    assert "kept: that costs" in stragglers.standing(cluster.state, NodeId("node-1"))

    go_on(cluster)

    order = starts(cluster)[-1]
    assert order.seats == ("node-0", "node-0", "node-2", "node-2")
    assert "node-1 is slow (inc-1: 1.20 times its peers' time): to keep it costs" in order.reason
    assert "to swap it" in order.reason
    assert cluster.state.budgets["hardware"].spent == 0


def test_more_work_than_anybody_counted_is_reported_and_nobody_is_blamed(cluster: Any) -> None:
    answer(cluster, suspected(cluster), 1.0)
    train(cluster, 1, 1.2)
    cluster.hold(cluster.state.reached_step)

    assert incident(cluster).cause is Cause.SOFTWARE
    assert "nobody is to blame" in incident(cluster).reason
    assert len(starts(cluster)) == 1
    assert stragglers.standing(cluster.state, NodeId("node-1")) == ""


def test_a_device_that_is_slow_in_processor_time_is_blamed_though_others_had_less_of_their_cores(
    cluster: Any,
) -> None:
    answer(cluster, suspected(cluster), 0.8, busy=1.2)

    assert incident(cluster).cause is Cause.HARDWARE
    assert "measured in processor time: 1.67e+03 Gop/s" in incident(cluster).reason
    assert len(probes(cluster)) == 1


@pytest.mark.parametrize(("then", "cause"), [(1.2, Cause.HARDWARE), (1.0, Cause.SOFTWARE)])
def test_a_processor_that_is_slow_by_the_wall_clock_alone_is_measured_twice_before_it_is_blamed(
    cluster: Any, then: float, cause: Cause
) -> None:
    first = suspected(cluster)
    answer(cluster, first, 1.2, busy=1.0)
    assert incident(cluster).cause is Cause.UNKNOWN
    train(cluster, 1, 1.2)
    second = probes(cluster)[-1]
    assert (second.ranks, second.nodes) == (first.ranks, first.nodes)
    answer(cluster, first, 1.2, busy=1.0)  # what is said again is no answer to the second order
    assert incident(cluster).cause is Cause.UNKNOWN

    answer(cluster, second, then, busy=1.0)

    assert incident(cluster).cause is cause
    assert len(probes(cluster)) == 2


def test_a_rank_that_is_slow_in_processor_time_alone_is_found_and_judged_by_that(
    cluster: Any,
) -> None:
    cluster.start()
    train_all(cluster, 12, {}, {})
    train_all(cluster, 12, {}, {SLOW: 1.2})
    (order,) = probes(cluster)
    assert "1.20 times as long as its peers for the same work in processor time" in (
        incident(cluster).findings[0].evidence
    )

    answer(cluster, order, 1.3, busy=1.0)

    assert incident(cluster).cause is Cause.SOFTWARE, "whatever the wall clock says"


def test_a_rank_that_is_slow_by_both_clocks_is_found_once_and_by_processor_time(
    cluster: Any,
) -> None:
    cluster.start()
    train_all(cluster, 12, {}, {})
    train_all(cluster, 40, {SLOW: 1.3}, {SLOW: 1.2})

    (found,) = cluster.state.incidents
    assert found.findings[0].clock == "processor"
    assert found.findings[0].measure[0] == pytest.approx(1.2, abs=0.01)


def test_a_rank_that_does_not_get_its_core_is_found_by_the_wall_clock(cluster: Any) -> None:
    cluster.start()
    train_all(cluster, 12, {}, {})
    train_all(cluster, 12, {SLOW: 1.4}, {})
    assert cluster.state.incidents == [], "cores are taken now from one rank and now from another"
    train_all(cluster, 12, {SLOW: 1.7}, {})

    assert incident(cluster).findings[0].clock == "wall"


def test_a_device_that_turns_slow_where_more_work_was_found_is_measured_again(
    cluster: Any,
) -> None:
    cluster.start()
    train_all(cluster, 12, {}, {})
    train_all(cluster, 12, {SLOW: 1.7}, {})
    answer(cluster, probes(cluster)[0], 1.0, busy=1.0)
    assert incident(cluster).cause is Cause.SOFTWARE

    train_all(cluster, 12, {SLOW: 1.7}, {SLOW: 1.2})

    assert len(probes(cluster)) == 2


@pytest.mark.parametrize(("then", "cause"), [(1.3, Cause.HARDWARE), (1.0, Cause.SOFTWARE)])
def test_a_device_that_only_copies_slowly_is_measured_twice_before_it_is_blamed(
    cluster: Any, then: float, cause: Cause
) -> None:
    cluster.start()
    train_all(cluster, 12, {}, {})
    train_all(cluster, 12, {}, {SLOW: 1.2})
    for times in (1.3, then):
        order = probes(cluster)[-1]
        for rank, node in zip(order.ranks, order.nodes, strict=True):
            copied = 1e11 / (times if rank == SLOW else 1.0)
            told = RankProbed(
                generation=order.generation, number=order.number, rank=rank,
                speed=Speed(1e12, 1e11, busy_operations=1e12, busy_copied=copied),
            )  # fmt: skip
            cluster.say(node, told)
        train_all(cluster, 1, {}, {SLOW: 1.2})

    assert incident(cluster).cause is cause
    assert len(probes(cluster)) == 2


def answer_each(cluster: Any, order: ProbeRanks, speeds: list[Speed]) -> None:
    for rank, node, speed in zip(order.ranks, order.nodes, speeds, strict=True):
        told = RankProbed(generation=order.generation, number=order.number, rank=rank, speed=speed)
        cluster.say(node, told)


def test_a_rank_that_is_as_slow_as_one_of_two_peers_by_the_wall_clock_has_no_slow_device(
    cluster: Any,
) -> None:
    order = suspected(cluster)
    answer_each(cluster, order, [Speed(1e12 / times, 1e11) for times in (1.2, 1.15, 0.8)])

    assert incident(cluster).cause is Cause.SOFTWARE


def test_a_wall_clock_says_nothing_where_no_rank_gets_its_core(cluster: Any) -> None:
    order = suspected(cluster)
    speeds = [Speed(each, 1e11, "", 1e12, 1e11) for each in (1e11, 2e11, 9e11)]
    answer_each(cluster, order, speeds)

    assert incident(cluster).cause is Cause.UNKNOWN
    assert "those did not get their cores either" in incident(cluster).reason
    assert len(probes(cluster)) == 1


def test_in_processor_time_a_rank_is_compared_with_what_its_peers_do_on_average(
    cluster: Any,
) -> None:
    order = suspected(cluster)
    speeds = [Speed(1e12, 1e11, "", 1e12 / times, 1e11) for times in (1.12, 1.05, 0.95)]
    answer_each(cluster, order, speeds)

    assert incident(cluster).cause is Cause.HARDWARE


def test_what_measured_nothing_at_all_is_nobodys_fault(cluster: Any) -> None:
    order = suspected(cluster)
    for rank, node in zip(order.ranks, order.nodes, strict=True):
        nothing = RankProbed(
            generation=order.generation, number=order.number, rank=rank, speed=Speed(0.0, 0.0)
        )
        cluster.say(node, nothing)

    assert incident(cluster).cause is Cause.UNKNOWN
    assert "nothing could be measured" in incident(cluster).reason


@pytest.mark.parametrize("problem", ["no memory", ""])
def test_what_can_not_be_measured_is_nobodys_fault(cluster: Any, problem: str) -> None:
    order = suspected(cluster)
    if problem:
        answer(cluster, order, 2.0, problem=problem)
    else:
        train(cluster, 60, 1.2)

    assert incident(cluster).cause is Cause.UNKNOWN
    assert (problem or "not measured in time") in incident(cluster).reason
    assert len(starts(cluster)) == 1


def test_a_slow_node_is_kept_when_hardly_a_step_is_left(cluster_of: Any) -> None:
    from tests import runfiles  # noqa: PLC0415 - one test of many

    cluster = cluster_of(runfiles.text(trainer={"steps": 60}))
    answer(cluster, suspected(cluster), 1.2)
    train(cluster, 1, 1.2)
    cluster.hold(cluster.state.reached_step)

    assert len(starts(cluster)) == 1
    assert "kept: that costs" in stragglers.standing(cluster.state, NodeId("node-1"))


def test_a_slow_node_waits_for_a_spare_that_is_not_slow_itself(cluster: Any) -> None:
    order = suspected(cluster)
    cluster.lose("node-2")
    answer(cluster, order, 1.2)
    go_on(cluster)
    assert len(starts(cluster)) == 1
    assert "waiting for a spare" in stragglers.standing(cluster.state, NodeId("node-1"))

    cluster.join("node-2", incarnation=2)
    train(cluster, 1, 1.2)
    cluster.hold(cluster.state.reached_step)

    assert starts(cluster)[-1].seats == ("node-0", "node-0", "node-2", "node-2")


def test_a_node_that_is_as_fast_as_its_peers_again_is_kept_when_a_spare_comes(cluster: Any) -> None:
    order = suspected(cluster)
    cluster.lose("node-2")
    answer(cluster, order, 1.2)
    go_on(cluster)
    train(cluster, 12)
    cluster.join("node-2", incarnation=2)
    train(cluster, 1)
    cluster.hold(cluster.state.reached_step)

    assert len(starts(cluster)) == 1
    assert "as fast as its peers" in stragglers.standing(cluster.state, NodeId("node-1"))

    go_on(cluster)

    assert starts(cluster)[-1].seats == ("node-0", "node-0", "node-2", "node-2")


def test_what_was_measured_in_an_older_world_does_not_end_this_one_until_it_shows_again(
    cluster: Any,
) -> None:
    order = suspected(cluster)
    cluster.lose("node-2")
    answer(cluster, order, 1.2)
    train(cluster, 1, 1.2)
    cluster.hold(cluster.state.reached_step)
    cluster.exit(0)
    cluster.resume()
    cluster.join("node-2", incarnation=2)
    before = len(starts(cluster))
    assert before == 2

    train(cluster, 3, 1.2)
    cluster.hold(cluster.state.reached_step)
    assert len(starts(cluster)) == before

    train(cluster, 12, 1.2)
    cluster.hold(cluster.state.reached_step)
    assert starts(cluster)[-1].seats == ("node-0", "node-0", "node-2", "node-2")


def test_a_rank_is_reported_once_and_again_after_it_was_as_fast_as_others(cluster: Any) -> None:
    answer(cluster, suspected(cluster), 1.2, problem="no memory")
    train(cluster, 30, 1.2)
    assert len(cluster.state.incidents) == 1

    train(cluster, 12)
    train(cluster, 12, 1.2)

    assert [found.kind for found in cluster.state.incidents] == ["straggler"] * 2


def test_a_rank_at_the_limit_is_not_found_again_until_it_was_clearly_as_fast(cluster: Any) -> None:
    answer(cluster, suspected(cluster, 1.12), 1.0, problem="no memory")

    for _ in range(5):
        train(cluster, 12, 1.05)
        train(cluster, 12, 1.12)

    assert len(cluster.state.incidents) == 1


def test_a_rank_that_is_slow_now_and_then_is_measured_less_often_each_time(cluster: Any) -> None:
    answer(cluster, suspected(cluster), 1.0, problem="no memory")

    for _ in range(10):
        train(cluster, 12)
        train(cluster, 12, 1.2)

    assert len(cluster.state.incidents) == 4


def test_more_work_is_not_measured_again_in_its_generation_unless_it_gets_far_slower(
    cluster: Any,
) -> None:
    answer(cluster, suspected(cluster), 1.0)

    for _ in range(4):
        train(cluster, 12)
        train(cluster, 12, 1.2)
    assert len(cluster.state.incidents) == 1
    train(cluster, 12)
    train(cluster, 12, 1.6)

    assert len(cluster.state.incidents) == 2


def test_a_detector_of_stragglers_that_raises_is_switched_off_and_training_goes_on(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.start()
    monkeypatch.setattr("orchestrator.detect.straggler.rates", lambda *_: 1 / 0, raising=True)
    train(cluster, 15, 1.5)

    assert cluster.controller.disabled == {"straggler": "ZeroDivisionError: division by zero"}
    assert cluster.state.incidents == []


def test_what_the_hardware_of_a_slow_node_says_stands_beside_the_verdict_and_changes_none(
    cluster: Any,
) -> None:
    order = suspected(cluster)
    words = "gpu-throttled of 0000:3b:00: its clocks are held down since it is hot"
    hot = Symptom(
        name="gpu-throttled", device="0000:3b:00", serial=Serial("GPU-1"), drain=False, words=words
    )

    cluster.say(order.nodes[0], NodeAiling(symptoms=(hot,)))
    answer(cluster, order, 1.0)

    incident = cluster.state.incidents[-1]
    assert incident.cause is Cause.SOFTWARE
    assert f"its hardware says: {words}" in incident.reason
    assert f"hardware of {order.nodes[0]}: {words}" in [note.text for note in incident.timeline]
