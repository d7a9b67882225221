"""A real process that uses the SDK, with this test on the agent's end of its socket."""

import fcntl
import os
import resource
import signal
import time
from pathlib import Path

import pytest

from orchestrator.protocol.ids import Generation, Step
from orchestrator.protocol.phases import RankPhase
from orchestrator.protocol.rank import (
    Abort,
    Died,
    Finished,
    JobAhead,
    Misbehave,
    Reached,
    Retire,
    Staged,
    Troubled,
    frame,
    read_from_rank,
)
from orchestrator.worker import EXIT_MISCONFIGURED, EXIT_STUCK, LEAVE_SHARE
from tests.programs.supervised import Agent

pytestmark = pytest.mark.process


def test_a_rank_takes_its_seat_trains_and_says_farewell(agent: Agent) -> None:
    agent.seat(steps=20)

    finished = agent.hear(Finished)
    agent.send(Retire())

    assert isinstance(finished, Finished)
    assert (finished.step, finished.lanes) == (20, (1, 2))
    assert agent.rank.wait(10) == 0
    assert [r.step for r in agent.beacon.new_steps()] == list(range(1, 21))


@pytest.mark.parametrize("how", ["prepare_succeeds", "prepare_waits", "prepare_fails"])
def test_a_process_without_a_seat_prepares_for_the_job_and_takes_a_seat_however_that_goes(
    agent: Agent, how: str
) -> None:
    agent.send(JobAhead(job={how: True}, cache_dir="there"))
    deadline = time.monotonic() + 20
    while not (agent.folder / "prepared").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert agent.rank.poll() is None

    agent.seat(steps=3)

    finished = agent.hear(Finished)
    assert isinstance(finished, Finished)
    assert finished.step == 3
    assert (agent.folder / "prepared").read_text() == "there"


@pytest.mark.parametrize("steps", [0, 3])
def test_a_rank_that_finishes_has_stepped_once_even_if_no_step_was_left_to_take(
    agent: Agent, steps: int
) -> None:
    agent.seat(steps=steps)

    while not any(isinstance(message, Finished) for message in agent.heard):
        data = agent.control.recv(1 << 16)
        agent.heard += [read_from_rank(body) for body in agent.framer.feed(data)]
    marks = [message.mark for message in agent.heard if isinstance(message, Reached)]

    assert marks.count("stepped") == 1


def test_a_seat_that_arrives_while_its_process_tokenises_is_taken_and_the_lock_let_go(
    agent: Agent,
) -> None:
    text, cache = agent.folder / "text.txt", agent.folder / "cache"
    text.write_text("one document of some thirty megabytes " * 800_000)
    agent.send(JobAhead(job={"tokenise": str(text)}, cache_dir=str(cache)))
    deadline = time.monotonic() + 20
    while not list(cache.glob("*.tmp")):
        assert time.monotonic() < deadline
        time.sleep(0.001)

    agent.seat(steps=3)

    agent.hear(Finished)
    (lock,) = cache.glob("*")  # neither the tokens, nor a part of them
    with lock.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_process_that_has_a_seat_already_prepares_for_none(agent: Agent) -> None:
    agent.seat(steps=3)
    agent.hear(Finished)

    assert not (agent.folder / "prepared").exists()


def test_an_aborted_rank_leaves_keeps_its_process_and_takes_the_next_seat(agent: Agent) -> None:
    agent.seat(1)
    agent.hear(Reached)

    told = time.monotonic()
    agent.send(Abort(before=Generation(2)))
    left = agent.hear(Reached)
    while isinstance(left, Reached) and left.mark != "left":
        left = agent.hear(Reached)

    assert time.monotonic() - told < 1.0
    assert isinstance(left, Reached)
    assert left.generation == 1
    agent.seat(2, steps=3)
    finished = agent.hear(Finished)
    assert isinstance(finished, Finished)
    assert finished.generation == 2
    assert agent.rank.poll() is None


def test_a_newer_seat_is_an_abort_of_the_older(agent: Agent) -> None:
    agent.seat(1)
    agent.hear(Reached)

    agent.seat(2, steps=3)

    finished = agent.hear(Finished)
    assert isinstance(finished, Finished)
    assert finished.generation == 2


def test_a_fault_that_the_program_can_not_commit_is_a_mistake_in_the_plan(agent: Agent) -> None:
    agent.seat(1)
    agent.hear(Reached)

    agent.send(Misbehave(how="flip-bit", options={"state": "weights"}))

    died = agent.hear(Died)
    assert isinstance(died, Died)
    assert died.misconfigured
    assert "asks for flip-bit, and this program has no way to commit it" in died.message
    assert "hint: give Worker.on_fault what commits it" in died.message
    assert agent.rank.wait(10) == EXIT_MISCONFIGURED


def test_a_lost_peer_is_reported_and_the_process_waits_for_a_seat(agent: Agent) -> None:
    agent.seat(1, lose_peer_at=5)

    troubled = agent.hear(Troubled)

    assert isinstance(troubled, Troubled)
    assert "reset by peer" in troubled.message
    assert agent.rank.poll() is None


@pytest.mark.parametrize("abort_within_s", [0.5, 2.0])
def test_a_rank_that_can_not_leave_ends_itself_before_it_would_be_killed(
    agent: Agent, abort_within_s: float
) -> None:
    agent.seat(stuck_at=3, abort_within_s=abort_within_s)
    while agent.beacon.read().step < 2:
        time.sleep(0.01)
    time.sleep(0.05)

    told = time.monotonic()
    agent.send(Abort(before=Generation(2)))

    assert agent.rank.wait(10) == EXIT_STUCK
    leave_within_s = LEAVE_SHARE * abort_within_s
    assert leave_within_s <= time.monotonic() - told < leave_within_s + 1.0


def test_a_rank_that_left_in_time_lives_on_past_the_limit(agent: Agent) -> None:
    agent.seat(1, abort_within_s=0.5)
    agent.hear(Reached)
    agent.send(Abort(before=Generation(2)))
    time.sleep(0.7)

    agent.seat(2, steps=3)

    assert isinstance(agent.hear(Finished), Finished)


def test_a_callback_that_fails_does_not_keep_the_orders_that_follow_from_being_heard(
    agent: Agent,
) -> None:
    log = agent.folder / "rank.log"
    agent.seat(1, callback_fails=True, log=str(log))
    agent.hear(Reached)

    agent.send(Abort(before=Generation(2)))
    agent.seat(2, steps=3)

    agent.hear(Finished)
    assert "ZeroDivisionError" in log.read_text()
    agent.send(Retire())
    assert agent.rank.wait(10) == 0


def test_a_rank_that_can_not_hear_any_more_says_why_and_ends(agent: Agent) -> None:
    agent.seat()
    agent.hear(Reached)

    agent.control.sendall(b"\x05\x00\x00\x00hello")

    died = agent.hear(Died)
    assert isinstance(died, Died)
    assert (died.generation, died.kind) == (1, "ProtocolError")
    assert agent.rank.wait(10) == 1


def test_a_rank_hears_on_a_descriptor_above_those_that_select_knows(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    agent = Agent(tmp_path, descriptor=1500)
    try:
        agent.seat(steps=3)
        agent.hear(Finished)
    finally:
        agent.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_seat_that_is_over_before_it_is_taken_is_left_at_once(agent: Agent) -> None:
    agent.control.sendall(frame(Abort(before=Generation(2))))
    agent.seat(1)

    left = agent.hear(Reached)

    assert isinstance(left, Reached)
    assert (left.mark, left.generation) == ("left", 1)


def test_a_process_rehearses_before_it_waits_for_its_first_seat(agent: Agent) -> None:
    agent.until_waiting()

    assert (agent.folder / "rehearsed").exists()
    assert agent.rank.poll() is None


def test_a_process_whose_seat_is_there_already_does_not_rehearse(tmp_path: Path) -> None:
    agent = Agent(tmp_path, seated=True)
    try:
        agent.hear(Finished)
    finally:
        agent.close()

    assert not (tmp_path / "rehearsed").exists()


def test_a_process_that_is_made_for_a_seat_does_not_rehearse_before_that_comes(
    tmp_path: Path,
) -> None:
    agent = Agent(tmp_path, wanted=True)
    try:
        agent.until_waiting()
        agent.seat(1, steps=3)
        agent.hear(Finished)
    finally:
        agent.close()

    assert not (tmp_path / "rehearsed").exists()


def test_output_goes_to_the_log_of_the_seat_from_then_on(agent: Agent) -> None:
    agent.seat(1, log=str(agent.folder / "rank-00000.log"), steps=3)
    agent.hear(Finished)
    agent.seat(2, log=str(agent.folder / "rank-00001.log"), say="hello", steps=3)
    agent.hear(Finished)

    agent.send(Retire())
    assert agent.rank.wait(10) == 0
    assert (agent.folder / "rank-00000.log").read_text() == "step 3\n"
    assert (agent.folder / "rank-00001.log").read_text() == "hello\nstep 3\n"


def test_a_log_that_can_not_be_opened_costs_the_output_and_not_the_rank(agent: Agent) -> None:
    agent.seat(log=str(agent.folder / "missing" / "rank.log"), steps=3)

    assert isinstance(agent.hear(Finished), Finished)


def test_the_beacon_of_a_frozen_rank_can_be_read(agent: Agent) -> None:
    agent.seat()
    agent.hear(Staged)

    os.kill(agent.rank.pid, signal.SIGSTOP)
    time.sleep(0.05)
    first = agent.beacon.read()
    time.sleep(0.1)

    assert agent.beacon.read() == first
    assert first.phase is RankPhase.FORWARD
    assert first.step >= Step(10)


def test_an_exception_is_told_with_its_traceback_before_the_exit(agent: Agent) -> None:
    agent.seat()
    agent.hear(Reached)
    agent.send(Misbehave(how="exception"))

    died = agent.hear(Died)

    assert isinstance(died, Died)
    assert died.kind == "InjectedFaultError"
    assert "misbehaviour.py" in died.traceback
    assert agent.rank.wait(10) == 1


def test_a_job_that_can_not_run_exits_with_its_own_code_and_a_hint(agent: Agent) -> None:
    agent.seat(misconfigured=True)

    died = agent.hear(Died)

    assert isinstance(died, Died)
    assert died.misconfigured
    assert "hint: choose another tokenizer" in died.message
    assert agent.rank.wait(10) == 78


def test_a_state_that_can_not_be_read_ends_a_rank_without_the_job_being_at_fault(
    agent: Agent,
) -> None:
    agent.seat(unrestorable=True)

    died = agent.hear(Died)

    assert (died.unrestorable, died.misconfigured) == (True, False)
    assert died.message == "AccessDenied: b/s0.st\nhint: compare credentials"
    assert agent.rank.wait(10) == 1


def test_a_trainer_that_returns_before_it_has_finished_is_refused_and_told_how_far_it_came(
    agent: Agent,
) -> None:
    agent.seat(steps=3, unfinished=True)

    died = agent.hear(Died)

    assert isinstance(died, Died)
    assert died.misconfigured
    assert died.message.startswith(
        "train returned after step 3 without worker.finished(...)\nhint: "
    )
    assert agent.rank.wait(10) == 78


def test_a_trainer_that_returns_because_its_generation_is_over_gets_the_next_seat(
    agent: Agent,
) -> None:
    agent.seat(1, swallow=True)
    agent.hear(Reached)

    agent.send(Abort(before=Generation(2)))
    agent.seat(2, steps=3)

    finished = agent.hear(Finished)
    assert isinstance(finished, Finished)
    assert finished.generation == 2


def test_a_rank_that_holds_the_interpreter_lock_answers_nobody(agent: Agent) -> None:
    agent.seat()
    agent.hear(Staged)
    agent.send(Misbehave(how="spin-holding-gil"))
    time.sleep(0.3)
    still = agent.beacon.read().progress

    agent.send(Abort(before=Generation(2)))
    time.sleep(0.3)

    assert agent.beacon.read().progress == still
    assert agent.rank.poll() is None


def test_a_rank_whose_agent_is_gone_does_not_run_on(agent: Agent) -> None:
    agent.seat()
    agent.hear(Reached)

    agent.control.close()

    assert agent.rank.wait(10) == 75
