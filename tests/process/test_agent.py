"""A real agent with real ranks; the test is its controller."""

import os
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from orchestrator.agent import linux
from orchestrator.protocol.ids import Generation, Step
from orchestrator.protocol.messages import (
    Beat,
    Farewell,
    Fence,
    Joined,
    NodeUnusable,
    PreparationFailed,
    Prepared,
    RankExited,
    RanksFinished,
    Retain,
    ShardsHeld,
)
from tests.programs.played import Agent, Controller, alive, holder, newest, wait_for

pytestmark = pytest.mark.process
Start = Callable[..., Agent]


def train(controller: Controller, **job: object) -> None:
    """Have a world of one node and two ranks run up to its first step."""
    controller.job.update(job)
    controller.hear(Joined)
    controller.begin(1, ["node-0", "node-0"])
    controller.reached("stepped", 1)


def held(controller: Controller, step: int) -> None:
    for rank in (0, 1):
        controller.hear(ShardsHeld, where=lambda fact, rank=rank: holder(fact, rank, step))


def again(controller: Controller, generation: int, **more: object) -> float:
    return controller.begin(generation, ["node-0", "node-0"], **more)


def test_ranks_are_seated_train_and_report_every_step(controller: Controller, start: Start) -> None:
    start()
    train(controller, steps=60)

    _, finished = controller.hear(RanksFinished)

    assert finished.ranks == (0, 1)
    assert finished.lanes == ((60, 0), (60, 1))
    assert [report.step for report in controller.reports()] == list(range(1, 61))
    _, beat = controller.hear(Beat, where=lambda beat: len(beat.ranks) == 2)
    assert (beat.generation, beat.ranks) == (1, (0, 1))
    assert set(beat.states) <= set("RSD")


def test_a_killed_rank_is_told_at_once_and_one_that_stands_by_takes_its_seat(
    controller: Controller, start: Start
) -> None:
    agent = start()
    train(controller, save_every=10)
    wait_for(lambda: agent.parked() == 1)
    held(controller, 20)
    victim, other = agent.rank_pid(1, 1), agent.rank_pid(0, 1)

    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    told, fact = controller.hear(RankExited)
    again(controller, 2, dismiss=(1,), restore=20, sources=("node-0", "node-0"))

    assert (fact.rank, fact.code, fact.pid) == (1, -signal.SIGKILL, victim)
    assert fact.step >= 20
    assert told - killed < 0.5  # milliseconds, but this machine may be busy
    assert controller.hear(Prepared)[1].own == 2
    controller.reached("stepped", 2)
    assert agent.rank_pid(0, 2) == other
    assert agent.rank_pid(1, 2) != victim
    assert controller.hear(Beat, where=lambda beat: beat.generation == 2)
    assert len(controller.messages(RankExited)) == 1


def test_a_frozen_rank_is_dismissed_without_being_waited_for(
    controller: Controller, start: Start
) -> None:
    agent = start()
    train(controller)
    frozen = agent.rank_pid(1, 1)
    os.kill(frozen, signal.SIGSTOP)
    controller.hear(Beat, where=lambda beat: beat.states[1:] == "T")

    ordered = again(controller, 2, dismiss=(1,))
    cleared = controller.reached("cleared", 2)
    controller.reached("stepped", 2)

    assert cleared - ordered < controller.timeouts.abort_s
    assert not alive(frozen)
    assert not controller.messages(RankExited)


def test_a_frozen_rank_that_nobody_dismissed_is_killed_when_it_does_not_leave(
    controller: Controller, start: Start
) -> None:
    agent = start()
    train(controller)
    frozen = agent.rank_pid(0, 1)
    os.kill(frozen, signal.SIGSTOP)

    again(controller, 2)

    controller.reached("stepped", 2)
    assert not alive(frozen)
    assert not controller.messages(RankExited)
    assert not controller.messages(NodeUnusable)


def test_a_rank_that_can_not_leave_ends_itself_and_counts_as_having_left(
    controller: Controller, start: Start
) -> None:
    agent = start()
    train(controller, nap_at=30, nap_s=60)
    controller.hear(Beat, where=lambda beat: beat.steps == (29, 29))
    stuck = agent.rank_pid(0, 1)

    controller.job["nap_at"] = 0
    ordered = again(controller, 2)
    cleared = controller.reached("cleared", 2)

    assert cleared - ordered < controller.timeouts.abort_s
    assert not alive(stuck)
    assert not controller.messages(RankExited)


def test_a_rank_that_is_killed_while_it_leaves_is_told_of_the_generation_that_it_was_in(
    controller: Controller, start: Start
) -> None:
    agent = start()
    train(controller, nap_at=30, nap_s=60)
    controller.hear(Beat, where=lambda beat: beat.steps == (29, 29))
    victim = agent.rank_pid(1, 1)

    again(controller, 2)
    wait_for(lambda: "generation 2 begins" in agent.log.read_text())
    os.kill(victim, signal.SIGKILL)

    _, fact = controller.hear(RankExited)
    assert (fact.generation, fact.rank, fact.pid) == (1, 1, victim)
    assert (fact.code, fact.step) == (-signal.SIGKILL, 29)
    controller.reached("stepped", 2)
    assert len(controller.messages(RankExited)) == 1


def test_an_exception_that_a_rank_died_of_before_it_was_told_to_leave_is_told(
    controller: Controller, start: Start
) -> None:
    agent = start()
    # What ends it has been said long before it is gone.
    train(controller, raise_at=30, linger_s=60)
    logs = [agent.logs / f"rank-{rank:05d}.log" for rank in (0, 1)]
    wait_for(lambda: all("ArithmeticError" in log.read_text() for log in logs))

    again(controller, 2)

    for rank in (0, 1):
        _, fact = controller.hear(
            RankExited, where=lambda fact, rank=rank: (fact.generation, fact.rank) == (1, rank)
        )
        assert (fact.kind, fact.step) == ("ArithmeticError", 29)
    controller.reached("stepped", 2)


def test_orders_of_an_older_generation_are_ignored_and_a_repeated_one_changes_nothing(
    controller: Controller, start: Start
) -> None:
    agent = start()
    train(controller)
    again(controller, 3)
    controller.reached("stepped", 3)

    again(controller, 2)
    again(controller, 3)
    time.sleep(0.2)
    pids = [agent.rank_pid(rank, 3) for rank in (0, 1)]

    assert all(map(alive, pids))
    assert "generation 2" not in (agent.logs / "rank-00000.log").read_text()


def test_a_begin_that_overtakes_another_leaves_one_process_for_each_seat(
    controller: Controller, start: Start
) -> None:
    agent = start()
    train(controller)
    wait_for(lambda: agent.parked() == 1)

    for generation in range(2, 6):
        again(controller, generation, dismiss=(generation % 2,))

    controller.reached("stepped", 5)
    wait_for(lambda: agent.parked() == 1)
    assert len(agent.children()) == 4  # two ranks, one that stands by, the warm process
    assert not controller.messages(RankExited)


def test_an_exception_is_told_with_its_traceback_and_a_refused_job_as_misconfigured(
    controller: Controller, start: Start
) -> None:
    start()
    train(controller, raise_at=3)
    _, fact = controller.hear(RankExited)

    assert (fact.code, fact.kind, fact.step) == (1, "ArithmeticError", 2)
    assert "steps.py" in fact.traceback
    assert not fact.misconfigured

    # The job travels with the welcome, so this one is for whoever connects next.
    controller.job["refuse"] = True
    controller.stop()
    controller.start()
    controller.hear(Joined, where=lambda joined: joined.generation == 1)
    again(controller, 2)
    _, fact = controller.hear(RankExited, where=lambda fact: fact.generation == 2)
    assert (fact.code, fact.misconfigured) == (78, True)
    assert "choose another tokenizer" in fact.message


def test_a_rank_that_sends_garbage_is_killed_and_told_and_the_agent_lives_on(
    controller: Controller, start: Start
) -> None:
    agent = start()
    controller.job["garbage"] = True
    controller.hear(Joined)
    again(controller, 1)

    _, fact = controller.hear(RankExited)

    assert (fact.code, fact.kind) == (-signal.SIGKILL, "ProtocolError")
    assert "malformed" in fact.message
    assert agent.process.poll() is None


def test_an_order_that_is_none_costs_the_connection_and_nothing_else(
    controller: Controller, start: Start
) -> None:
    start()
    train(controller)

    sent = time.monotonic()
    controller.send_raw("node-0", '{"type": "Rubbish"}')

    _, joined = controller.hear(Joined, since=sent)
    assert (joined.generation, joined.ranks) == (1, (0, 1))
    controller.hear(Beat, since=sent, where=lambda beat: bool(beat.reports))


def test_what_ranks_started_ends_with_them(controller: Controller, start: Start) -> None:
    agent = start()
    train(controller, spawn=True)
    path = agent.logs / "rank-00001.log"
    (child,) = [int(w[1]) for w in map(str.split, path.read_text().splitlines()) if w[0] == "child"]
    assert alive(child)
    (stray,) = [int(w[1]) for w in map(str.split, path.read_text().splitlines()) if w[0] == "stray"]
    wait_for(lambda: linux.vitals(stray) is None, what="the dead orphan is reaped")

    os.kill(agent.rank_pid(1, 1), signal.SIGKILL)
    controller.hear(RankExited)
    again(controller, 2, dismiss=(1,))
    controller.reached("cleared", 2)

    assert not alive(child)


def test_a_fenced_node_stops_its_ranks_and_keeps_its_memory(
    controller: Controller, start: Start
) -> None:
    agent = start()
    train(controller, save_every=10)
    held(controller, 10)
    pids = [agent.rank_pid(rank, 1) for rank in (0, 1)]

    fenced = time.monotonic()
    controller.send("node-0", Fence(order="f", generation=Generation(7)))

    controller.hear(Beat, since=fenced, where=lambda b: b.generation == 7 and b.ranks == ())
    wait_for(lambda: agent.parked() >= 2)
    controller.send_raw("node-0", "{}")
    _, joined = controller.hear(Joined, since=fenced)
    assert (joined.generation, joined.ranks) == (7, ())
    assert joined.holdings
    # Having left in order, they are as good as any other that stands by.
    assert all(map(alive, pids))


def test_a_spare_has_a_process_for_every_seat_and_is_seated_without_a_fork(
    controller: Controller, start: Start
) -> None:
    agent = start(ranks=3)
    wait_for(lambda: agent.parked() == 3)
    before = set(agent.children())
    controller.hear(Joined)

    controller.begin(1, ["node-0"] * 3)
    controller.reached("stepped", 1)

    assert {agent.rank_pid(rank, 1) for rank in range(3)} <= before


def test_memory_that_is_retained_frees_slots_so_that_saving_goes_on(
    controller: Controller, start: Start
) -> None:
    start()
    train(controller, save_every=5)

    step = 0
    while step < 60:  # of three slots
        _, fact = controller.hear(ShardsHeld, where=lambda f, known=step: newest(f) > known)
        step = newest(fact)
        controller.send("node-0", Retain(order="r", generation=Generation(1), step=Step(step)))


def test_a_generation_whose_state_is_nowhere_is_not_started(
    controller: Controller, start: Start
) -> None:
    start()
    train(controller)

    again(controller, 2, restore=500, sources=("node-0", "node-0"))

    _, fact = controller.hear(PreparationFailed)
    assert (fact.generation, fact.step, fact.tier) == (2, 500, "memory")
    controller.reached("cleared", 2)


def test_farewell_leaves_no_process_and_no_memory(controller: Controller, start: Start) -> None:
    agent = start()
    train(controller, save_every=10)
    held(controller, 10)
    children = agent.children()
    assert agent.memory.exists()

    controller.send("node-0", Farewell(order="x", reason="the run is over"))

    assert agent.process.wait(10) == 0
    assert not any(map(alive, children))
    assert not agent.memory.exists()


def test_ranks_that_ignore_sigterm_or_are_frozen_do_not_keep_an_agent_from_ending(
    controller: Controller, start: Start
) -> None:
    agent = start()
    train(controller, stubborn=True, nap_at=10, nap_s=60)
    controller.hear(Beat, where=lambda beat: beat.steps == (9, 9))
    os.kill(agent.rank_pid(1, 1), signal.SIGSTOP)
    children = agent.children()

    begun = time.monotonic()
    assert agent.terminate() == 0

    t = controller.timeouts
    assert time.monotonic() - begun < t.terminate_s + t.kill_s + 1.0
    assert not any(map(alive, children))


def test_an_agent_that_is_killed_leaves_no_process_and_the_next_one_clears_its_memory(
    controller: Controller, start: Start
) -> None:
    agent = start()
    train(controller, save_every=10)
    held(controller, 10)
    children = agent.children()
    left_over = sorted(agent.memory.glob("rank-*"))
    assert left_over

    agent.process.kill()
    agent.process.wait(10)

    for pid in children:
        wait_for(lambda pid=pid: not alive(pid))
    second = start(incarnation=2)
    _, joined = controller.hear(Joined, where=lambda joined: joined.incarnation == 2)
    assert (joined.generation, joined.holdings) == (0, ())
    assert not any(path.exists() for path in left_over)
    assert second.memory.stat().st_mode & 0o777 == 0o700


def test_a_second_agent_of_a_node_is_refused_while_the_first_lives(
    controller: Controller, start: Start
) -> None:
    first = start()
    controller.hear(Joined)

    second = start()

    assert second.process.wait(15) == 1
    assert f"process {first.pid} owns" in second.log.read_text()
    assert first.process.poll() is None


def test_a_wrong_token_ends_the_agent_with_a_clear_message(
    controller: Controller, start: Start
) -> None:
    agent = start(token="wrong")  # noqa: S106 - the secret of a test

    assert agent.process.wait(15) == 77
    assert "the token is not the one of its run" in agent.log.read_text()
    assert not agent.memory.exists()
    assert controller.refused


def test_a_config_that_is_none_is_refused() -> None:
    done = subprocess.run(
        [os.sys.executable, "-m", "orchestrator.agent"],
        input=b'{"node": 1}',
        capture_output=True,
        timeout=20,
        check=False,
    )

    assert done.returncode == 2
    assert b"standard input is no agent config" in done.stderr
