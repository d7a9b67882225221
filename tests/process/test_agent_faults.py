"""Planned faults, carried out by a real agent on real ranks."""

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.protocol.agent import NODE_LOST_EXIT
from orchestrator.protocol.messages import (
    Arm,
    Beat,
    CarryOut,
    FaultCarriedOut,
    FaultDue,
    Joined,
    RankExited,
    ShardsHeld,
    ShardsWritten,
    WriteFailed,
)
from tests.programs.played import Agent, Controller, alive, newest, wait_for

pytestmark = pytest.mark.process
Start = Callable[..., Agent]


@pytest.fixture
def agent(start: Start) -> Agent:
    return start()


def train(controller: Controller, *faults: dict[str, Any], **job: object) -> None:
    """Arm an agent with faults, all at step 5 if they do not say when, and train."""
    controller.job.update(job)
    controller.hear(Joined)
    armed = tuple(
        {"index": index, "fault": {"when": {"step": 5}, **fault}}
        for index, fault in enumerate(faults)
    )
    controller.send("node-0", Arm(order="arm", faults=armed))
    controller.begin(1, ["node-0", "node-0"])


def let_loose(controller: Controller, index: int = 0) -> float:
    """Wait until a fault is due, order it, and return when it was carried out."""
    _, due = controller.hear(FaultDue, where=lambda fact: fact.index == index)
    controller.send("node-0", CarryOut(order=f"c{index}", index=due.index))
    at, done = controller.hear(FaultCarriedOut, where=lambda fact: fact.index == index)
    assert done.problem == ""
    return at


def test_a_fault_is_due_when_its_target_has_done_the_step_and_waits_for_the_order(
    controller: Controller, agent: Agent
) -> None:
    train(controller, {"fault": "kill-rank", "rank": 1, "when": {"step": 30}})

    controller.hear(FaultDue)
    assert controller.reports()[-1].step >= 29
    time.sleep(0.2)
    assert alive(agent.rank_pid(1, 1))
    let_loose(controller)
    _, fact = controller.hear(RankExited)

    assert (fact.rank, fact.code) == (1, -signal.SIGKILL)
    controller.send("node-0", CarryOut(order="again", index=0))
    controller.begin(2, ["node-0", "node-0"], dismiss=(1,))
    controller.reached("stepped", 2)
    time.sleep(0.2)
    assert len(controller.messages(RankExited)) == 1


@pytest.mark.parametrize(
    ("fault", "code", "kind", "text"),
    [
        ("segfault-rank", -signal.SIGSEGV, "", "Segmentation fault"),
        ("exit-rank", 1, "InjectedFaultError", "misbehaviour.py"),
    ],
)
@pytest.mark.usefixtures("agent")
def test_a_rank_that_crashes_says_where(
    controller: Controller, fault: str, code: int, kind: str, text: str
) -> None:
    train(controller, {"fault": fault, "rank": 0})
    let_loose(controller)

    _, fact = controller.hear(RankExited)

    assert (fact.rank, fact.code, fact.kind) == (0, code, kind)
    assert text in fact.traceback
    assert "pid" not in fact.traceback.partition("Current thread")[0] or kind == ""


@pytest.mark.usefixtures("agent")
def test_a_frozen_rank_shows_as_stopped_and_goes_on_when_the_fault_ends(
    controller: Controller,
) -> None:
    train(controller, {"fault": "freeze-rank", "rank": 1, "for": "2500ms"})
    at = let_loose(controller)

    stopped, beat = controller.hear(Beat, since=at, where=lambda b: b.states[1:] == "T")
    controller.hear(
        Beat, since=stopped, where=lambda b: b.states[1] in "RS" and b.steps[1] > beat.steps[1] + 5
    )


@pytest.mark.parametrize("hold_gil", [True, False])
def test_a_spinning_rank_burns_its_processor_and_makes_no_progress(
    controller: Controller, agent: Agent, *, hold_gil: bool
) -> None:
    train(controller, {"fault": "spin-rank", "rank": 0, "holdGil": hold_gil})
    at = let_loose(controller)

    _, first = controller.hear(Beat, since=at + 0.2)
    _, later = controller.hear(Beat, where=lambda b: b.cpu_s[:1] > (first.cpu_s[0] + 0.1,))

    assert later.progress[0] == first.progress[0]
    assert later.progress[1] > first.progress[1]
    # A survivor that spins is replaced like any other that does not leave.
    pid = agent.rank_pid(0, 1)
    controller.begin(2, ["node-0", "node-0"])
    controller.reached("stepped", 2)
    assert not alive(pid)


@pytest.mark.usefixtures("agent")
def test_a_slow_rank_is_slow_for_a_while(controller: Controller) -> None:
    train(
        controller,
        {"fault": "slow-rank", "rank": 1, "share": 0.1, "for": "800ms", "when": {"step": 20}},
    )
    at = let_loose(controller)
    _, first = controller.hear(Beat, since=at)
    _, last = controller.hear(Beat, since=at + 0.6)
    done = [b - a for a, b in zip(first.steps, last.steps, strict=True)]

    assert 0 < done[1] < done[0] / 2
    end, then = controller.hear(Beat, since=at + 1.0)
    controller.hear(Beat, since=end, where=lambda b: b.steps[1] > then.steps[1] + 20)


def test_a_killed_agent_takes_its_ranks_along_and_says_so_before(
    controller: Controller, agent: Agent
) -> None:
    train(controller, {"fault": "kill-agent", "node": "node-0"})
    children = agent.children()
    let_loose(controller)

    assert agent.process.wait(10) == -signal.SIGKILL
    for pid in children:
        wait_for(lambda pid=pid: not alive(pid))


def test_a_lost_node_is_gone_with_its_ranks_and_its_memory(
    controller: Controller, agent: Agent
) -> None:
    train(controller, {"fault": "lose-node", "node": "node-0"}, save_every=2)
    children = agent.children()
    let_loose(controller)

    assert agent.process.wait(10) == NODE_LOST_EXIT
    assert not agent.memory.exists()
    for pid in children:
        wait_for(lambda pid=pid: not alive(pid))


@pytest.mark.usefixtures("agent")
def test_a_partitioned_node_trains_on_unheard_and_comes_back_with_everything(
    controller: Controller,
) -> None:
    train(controller, {"fault": "partition-node", "node": "node-0", "for": "700ms"})
    at = let_loose(controller)

    back, joined = controller.hear(Joined, since=at)

    assert back - at >= 0.65
    assert not [m for when, _, m in controller.heard if at + 0.1 < when < back]
    assert (joined.generation, joined.ranks) == (1, (0, 1))
    controller.hear(Beat, since=back, where=lambda b: b.reports[-1:] != ())
    steps = sorted({report.step for report in controller.reports()})
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.usefixtures("agent")
def test_a_full_disk_fails_a_write_and_training_goes_on_until_there_is_room(
    controller: Controller,
) -> None:
    train(
        controller,
        {"fault": "full-disk", "node": "node-0", "for": "4s", "when": {"step": 1}},
        durable_every=25,
        step_s=0.02,  # its ranks skip saves each for itself: faster, they may skip in turn for ever
    )
    at = let_loose(controller)

    failed, fact = controller.hear(WriteFailed, where=lambda f: "StorageFullError" in f.reason)
    controller.hear(Beat, since=failed, where=lambda b: b.reports[-1:] != ())

    assert failed - at < 5
    controller.hear(ShardsWritten, where=lambda f: f.step > fact.step)
    assert not controller.messages(RankExited)


@pytest.mark.usefixtures("agent")
def test_a_slow_disk_delays_a_checkpoint_and_not_the_ranks(controller: Controller) -> None:
    train(
        controller,
        {"fault": "slow-disk", "node": "node-0", "delay": "600ms", "when": {"step": 1}},
        durable_every=50,
        step_s=0.02,  # step 50 is a second away: the fault is there before
    )
    let_loose(controller)

    held, _ = controller.hear(ShardsHeld, where=lambda f: newest(f) == 50)
    written, _ = controller.hear(ShardsWritten, where=lambda f: f.step == 50)

    assert written - held > 0.5
    assert len(controller.reports(since=held)) > 20


@pytest.mark.usefixtures("agent")
def test_a_fault_that_can_not_happen_is_reported_with_the_reason(controller: Controller) -> None:
    train(controller, {"fault": "corrupt-shard", "node": "node-0"})
    controller.hear(FaultDue)
    controller.send("node-0", CarryOut(order="c", index=0))
    controller.send("node-0", CarryOut(order="d", index=17))

    _, fact = controller.hear(FaultCarriedOut, where=lambda f: f.index == 0)
    assert "no checkpoint" in fact.problem
    _, fact = controller.hear(FaultCarriedOut, where=lambda f: f.index == 17)
    assert "was not told of it" in fact.problem


@pytest.mark.usefixtures("agent")
def test_faults_of_other_nodes_and_of_the_clock_are_not_due_here(controller: Controller) -> None:
    train(
        controller,
        {"fault": "kill-agent", "node": "node-1"},
        {"fault": "kill-rank", "rank": 7},
        {"fault": "kill-rank", "rank": 0, "when": {"after": "1ms"}},
        {"fault": "kill-controller"},
    )
    controller.hear(Beat, where=lambda b: b.reports[-1:] != () and b.reports[-1].step > 50)

    assert not controller.messages(FaultDue)
