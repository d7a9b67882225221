"""Which planned faults are due, and who is to notice."""

from orchestrator import compose
from orchestrator.core.events import FaultInjected, Reported, Telemetry
from orchestrator.faults.plan import FaultPlan
from orchestrator.protocol.ids import Generation, NodeId, Seconds, Step
from orchestrator.protocol.messages import FaultCarriedOut, StepReport
from orchestrator.worlds.faults import Schedule

PLAN = """
kind: FaultPlan
faults:
  - {when: {step: 5}, fault: kill-rank, rank: 1}
  - {when: {after: 2s}, fault: freeze-rank, rank: 0}
  - {when: {step: 7}, fault: kill-controller}
  - {when: {step: 3}, fault: kill-agent, node: node-2}
"""
SEATED = {NodeId("node-0"), NodeId("node-1")}


def schedule() -> Schedule:
    return Schedule(compose.parse(PLAN, FaultPlan, "plan.yaml").drawn())


def due(s: Schedule, now: float, reached: int, ranks: int = 4) -> list[int]:
    return [armed.index for armed in s.due(Seconds(now), Step(reached), SEATED, ranks)]


def test_the_step_of_a_seated_rank_is_watched_by_its_agent_not_here() -> None:
    assert 0 not in due(schedule(), 10.0, 100)


def test_a_span_counts_from_the_first_step_of_the_run() -> None:
    s = schedule()

    assert due(s, 60.0, 0) == []
    assert due(s, 61.0, 1) == []
    assert due(s, 62.9, 1) == []
    assert due(s, 63.0, 1) == [1]


def test_the_controller_and_a_node_without_ranks_are_due_by_the_steps_of_the_run() -> None:
    s = schedule()

    assert due(s, 0.0, 2) == []
    assert due(s, 0.0, 3) == [3]
    assert due(s, 0.0, 7) == [2, 3]


def injected(index: int, node: str) -> FaultInjected:
    return FaultInjected(
        at=Seconds(0.0), index=index, description="x", target="x", node=NodeId(node)
    )


def confirmed(index: int, node: str) -> Reported:
    return Reported(at=Seconds(0.0), node=NodeId(node), fact=FaultCarriedOut(index=index))


def test_what_is_on_record_is_not_due_again_not_even_for_the_next_controller() -> None:
    s = schedule()
    s.injected(3, NodeId("node-2"))
    assert due(s, 0.0, 7) == [2]

    successor = schedule()
    successor.resume([injected(2, ""), injected(3, "node-2")])

    assert due(successor, 0.0, 7) == []
    assert [armed.index for armed in successor.left()] == [0, 1]


def test_a_span_counts_on_when_a_controller_takes_over() -> None:
    successor = schedule()
    report = StepReport(Step(1), 2.0, 1.0, 100, 0.1)
    successor.resume(
        telemetry(at, reports) for at, reports in ((58, ()), (61, (report,)), (62, ()))
    )

    assert due(successor, 62.9, 0) == []
    assert due(successor, 63.0, 0) == [1]


def telemetry(at: float, reports: tuple[StepReport, ...]) -> Telemetry:
    return Telemetry(
        at=Seconds(at),
        generation=Generation(1),
        heard=(),
        phases=(),
        steps=(),
        progress=(),
        states="",
        cpu_s=(),
        stall_s=0.0,
        reports=reports,
    )


def test_an_order_is_owed_to_its_node_until_that_confirms_it() -> None:
    s = schedule()
    s.injected(1, NodeId("node-0"))
    s.injected(2, NodeId(""))
    assert s.owed(NodeId("node-0")) == [1]
    assert s.owed(NodeId("node-1")) == []

    s.confirm(1)

    assert s.owed(NodeId("node-0")) == []
    successor = schedule()
    successor.resume([injected(1, "node-0"), injected(3, "node-2"), confirmed(1, "node-0")])
    assert successor.owed(NodeId("node-0")) == []
    assert successor.owed(NodeId("node-2")) == [3]


def test_a_fault_on_record_is_put_there_again_for_another_node_until_it_is_confirmed() -> None:
    s = schedule()
    s.injected(0, NodeId("node-0"))
    armed = s.asked_for(0, NodeId("node-2"))
    assert armed is not None
    assert armed.fault.rank == 1
    # This one has its order already, or gets it when it comes back.
    assert s.asked_for(0, NodeId("node-0")) is None

    s.confirm(0)

    assert s.asked_for(0, NodeId("node-2")) is None
    assert s.asked_for(99, NodeId("node-2")) is None
    successor = schedule()
    successor.resume([injected(0, "node-0"), confirmed(0, "node-0")])
    assert successor.asked_for(0, NodeId("node-2")) is None
