"""Which planned faults are due, and who is to notice."""

from orchestrator import compose
from orchestrator.faults.plan import FaultPlan
from orchestrator.protocol.ids import NodeId, Seconds, Step
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


def due(s: Schedule, now: float, reached: int) -> list[int]:
    return [armed.index for armed in s.due(Seconds(now), Step(reached), SEATED)]


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


def test_what_is_on_record_is_not_due_again_not_even_for_the_next_controller() -> None:
    s = schedule()
    s.injected(3)
    assert due(s, 0.0, 7) == [2]

    successor = schedule()
    successor.resume({2, 3}, set())

    assert due(successor, 0.0, 7) == []
    assert [armed.index for armed in successor.left()] == [0, 1]


def test_a_fault_on_record_is_ordered_again_until_it_is_confirmed_and_never_after() -> None:
    s = schedule()
    s.injected(0)
    armed = s.asked_for(0)
    assert armed is not None
    assert armed.fault.rank == 1

    s.confirm(0)

    assert s.asked_for(0) is None
    assert s.asked_for(99) is None
    successor = schedule()
    successor.resume({0}, {0})
    assert successor.asked_for(0) is None
