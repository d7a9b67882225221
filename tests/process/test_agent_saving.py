"""Real agents whose buddy, slots or durable tier are not there when they are needed."""

import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.protocol.ids import Generation, Step
from orchestrator.protocol.messages import (
    Arm,
    Beat,
    CarryOut,
    FaultDue,
    Joined,
    RankExited,
    RanksFinished,
    Retain,
    ShardsHeld,
    ShardsWritten,
    WriteFailed,
)
from tests.programs.played import Agent, Controller, holder, newest, wait_for

pytestmark = pytest.mark.process
Start = Callable[..., Agent]
TWO = ["node-0", "node-1"]
EACH_OTHER = {"node-0": "node-1", "node-1": "node-0"}


def started(controller: Controller, start: Start, *nodes: str, **job: object) -> dict[str, Agent]:
    """Start nodes with a rank each."""
    controller.job.update(job)
    agents = {node: start(node, ranks=1) for node in nodes}
    for node in nodes:
        controller.hear(Joined, node)
    return agents


def held(fact: ShardsHeld, rank: int) -> list[int]:
    return [h.step for h in fact.holdings if h.rank == rank]


def copies(agent: Agent) -> list[str]:
    return sorted(path.name for path in agent.memory.glob("copy-*"))


# Slots -----------------------------------------------------------------------------------------


def test_a_rank_whose_steps_do_not_get_safe_gives_up_its_oldest_and_never_the_retained_one(
    controller: Controller, start: Start
) -> None:
    started(controller, start, "node-0", save_every=5)
    controller.begin(1, ["node-0"])
    controller.hear(ShardsHeld, where=lambda fact: newest(fact) == 5)

    controller.send("node-0", Retain(order="r", generation=Generation(1), step=Step(5)))
    full, fact = controller.hear(ShardsHeld, where=lambda fact: len(held(fact, 0)) == 3)
    first, second, third = held(fact, 0)
    relieved, later = controller.hear(
        ShardsHeld, since=full, where=lambda fact: newest(fact) > third
    )

    assert first == 5
    assert held(later, 0)[:2] == [first, third], f"{second} was to be given up"
    silence_s = controller.timeouts.silence_s
    assert silence_s * 0.9 < relieved - full < silence_s + 2.0
    # Nothing of this stopped training.
    steps = [report.step for report in controller.reports(since=full)]
    assert steps[-1] > third + 20


# Copies ----------------------------------------------------------------------------------------


def test_a_copy_that_finds_its_buddy_out_of_reach_is_made_when_the_buddy_is_back(
    controller: Controller, start: Start
) -> None:
    started(controller, start, "node-0", "node-1", save_every=10, steps=10)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        wrong = "{}:{}".format(*nobody.getsockname())
        controller.begin(1, TWO, buddies=EACH_OTHER, peers={**controller.peers(), "node-1": wrong})
        # There is one save only, and it is over; the other way round all is well.
        controller.hear(RanksFinished)
        controller.hear(ShardsHeld, where=lambda fact: holder(fact, 1, 10))
        controller.hear(ShardsHeld, "node-1", where=lambda fact: holder(fact, 1, 10))
        assert not [f for f in controller.messages(ShardsHeld, "node-1") if holder(f, 0, 10)]

    controller.begin(1, TWO, buddies=EACH_OTHER)

    controller.hear(ShardsHeld, "node-1", where=lambda fact: holder(fact, 0, 10))


def test_a_buddy_that_takes_a_lost_ones_place_gets_what_the_lost_one_held(
    controller: Controller, start: Start, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    agents = started(
        controller,
        start,
        "node-0",
        "node-1",
        "node-2",
        save_every=10,
        gate_at=11,
        gate=str(gate),
        nap_at=20,
        nap_s=60,
    )
    controller.begin(1, TWO, buddies=EACH_OTHER)
    controller.hear(ShardsHeld, "node-0", where=lambda fact: holder(fact, 1, 10))
    controller.hear(ShardsHeld, "node-1", where=lambda fact: holder(fact, 0, 10))

    agents["node-1"].process.kill()
    controller.begin(
        2,
        ["node-0", "node-2"],
        buddies={"node-0": "node-2", "node-2": "node-0"},
        restore=10,
        sources=("node-0", "node-0"),
    )

    for node in ("node-0", "node-2"):
        controller.reached("restored", 2, node)
    controller.hear(Beat, since=time.monotonic() + 0.5)
    assert copies(agents["node-2"]) == [], "copies take their time from the recovery"
    opened = time.monotonic()
    gate.touch()
    # Before any new save: step 20 is never reached.
    at, fact = controller.hear(ShardsHeld, "node-2", where=lambda fact: holder(fact, 0, 10))
    assert holder(fact, 1, 10)
    assert at >= opened, "copies take their time from the recovery"
    # What node-2 fetched from node-0 lies there already, and is not sent back.
    assert [name.split("-")[1] for name in copies(agents["node-0"])] == ["00001"]
    before = copies(agents["node-2"])
    assert [name.split("-")[1] for name in before] == ["00000"]

    # And a buddy that has it is not sent it once more, if it had the time to say so.
    controller.hear(Beat, since=at + 1.0)
    controller.begin(
        3,
        ["node-0", "node-2"],
        buddies={"node-0": "node-2", "node-2": "node-0"},
        restore=10,
        sources=("node-0", "node-2"),
    )
    last = max(controller.reached("stepped", 3, node) for node in ("node-0", "node-2"))
    controller.hear(Beat, "node-2", since=last + 0.5)
    assert copies(agents["node-2"]) == before
    assert [name.split("-")[1] for name in copies(agents["node-0"])] == ["00001"]


# The durable tier ------------------------------------------------------------------------------


def break_disk(controller: Controller, fault: str, *seats: str, **more: str) -> float:
    """Have the disk of node-0 be bad from its first step on; return when it was."""
    planned = {"when": {"step": 1}, "fault": fault, "node": "node-0", **more}
    controller.send("node-0", Arm(order="arm", faults=({"index": 0, "fault": planned},)))
    controller.begin(1, list(seats) or ["node-0", "node-0"])
    at, _ = controller.hear(FaultDue)
    controller.send("node-0", CarryOut(order="c", index=0))
    return at


def fill_disk(controller: Controller, lasts: str) -> float:
    """Have the disk of node-0 be full from its first step on; return when it was."""
    return break_disk(controller, "full-disk", **{"for": lasts})


@pytest.mark.parametrize("fault", ["full-disk", "read-only-disk"])
def test_the_last_write_is_tried_again_for_as_long_as_its_ranks_wait(
    controller: Controller, start: Start, fault: str
) -> None:
    controller.job.update(steps=60, step_s=0.03, durable_every=60, await_persisted=True)
    start()
    controller.hear(Joined)
    at = break_disk(controller, fault, **{"for": "6s"})

    failed, _ = controller.hear(WriteFailed)
    written, fact = controller.hear(ShardsWritten)
    finished, _ = controller.hear(RanksFinished)

    assert failed - at < 6 < written - at
    assert (fact.step, [receipt.shard for receipt in fact.receipts]) == (60, [0, 1])
    assert finished >= written - 0.5
    assert len(controller.messages(WriteFailed)) == 1
    assert not controller.messages(RankExited)


def test_a_write_is_not_tried_again_when_a_newer_one_is_due(
    controller: Controller, start: Start
) -> None:
    # Nothing is retained, so every shard stays held: only what is newer ends the attempts.
    controller.job.update(steps=120, step_s=0.02, durable_every=60, await_persisted=True)
    agent = start()
    controller.hear(Joined)
    fill_disk(controller, "4s")

    controller.hear(RanksFinished)

    assert controller.messages(WriteFailed)[0].step == 60
    assert [fact.step for fact in controller.messages(ShardsWritten)] == [120]
    wait_for(lambda: agent.log.read_text().count("step 60 is not written any more") == 2)


def test_a_durable_tier_that_hangs_does_not_keep_memory_from_saving(
    controller: Controller, start: Start
) -> None:
    started(controller, start, "node-0", save_every=5, durable_every=20, step_s=0.02)
    break_disk(controller, "slow-disk", "node-0", delay="60s")

    step = 0
    while step < 150:
        _, fact = controller.hear(ShardsHeld, where=lambda f, known=step: newest(f) > known)
        step = newest(fact)
        controller.send("node-0", Retain(order="r", generation=Generation(1), step=Step(step)))

    # Every one of them, and what was not written is told, with the reason.
    held_steps = {h.step for fact in controller.messages(ShardsHeld) for h in fact.holdings}
    assert set(range(5, 150, 5)) <= held_steps
    _, failure = controller.hear(WriteFailed, where=lambda fact: fact.step == 40)
    assert "the durable tier was not done with an older step when step 60 was due" in failure.reason
    assert controller.messages(ShardsWritten) == []


def test_the_last_write_of_a_run_is_never_passed_over(controller: Controller, start: Start) -> None:
    controller.job.update(steps=60, step_s=0.01, durable_every=10, await_persisted=True)
    start(ranks=1)
    controller.hear(Joined)
    break_disk(controller, "slow-disk", "node-0", delay="800ms")

    controller.hear(RanksFinished)

    written = [fact.step for fact in controller.messages(ShardsWritten)]
    assert written[0] == 10
    assert written[-1] == 60
    assert len(written) < 6, "the disk was not slow"
    assert not controller.messages(RankExited)
