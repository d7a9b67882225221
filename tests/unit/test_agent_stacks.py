"""Where a process stands is seen from outside, however it stands still, and a failure says why."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.agent import stacks
from orchestrator.protocol.ids import Generation, Rank
from orchestrator.protocol.messages import Inspect
from orchestrator.protocol.stacks import FRAME_MAX, Stack

WAITING = """
import sys, threading
def in_a_collective():
    print(flush=True)
    threading.Event().wait(60)
def step():
    in_a_collective()
step()
"""


def order(*suspects: int, within_s: float = 20.0) -> Inspect:
    return Inspect(
        order="1.1",
        generation=Generation(1),
        suspects=tuple(map(Rank, suspects)),
        within_s=within_s,
    )


@pytest.fixture
def waiting() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        yield child.pid
        child.kill()


def places(found: tuple[Stack, ...]) -> list[str]:
    (stack,) = found
    return [frame.split(" ")[0] for frame in stack.frames]


def test_the_functions_a_process_is_in_are_seen_innermost_first(waiting: int) -> None:
    seen = stacks.take(order(), {Rank(3): waiting})

    assert seen.problem == ""
    assert seen.stacks[0].ranks == (3,)
    assert places(seen.stacks)[-3:] == ["in_a_collective", "step", "<module>"]


def test_of_a_suspect_native_frames_are_seen_below(waiting: int) -> None:
    seen = stacks.take(order(3), {Rank(3): waiting})

    names = places(seen.stacks)
    assert "in_a_collective" in names
    assert any("libc" in frame or ".so" in frame for frame in seen.stacks[0].frames)


def test_a_frozen_suspect_is_seen_all_the_same(waiting: int) -> None:
    os.kill(waiting, signal.SIGSTOP)

    seen = stacks.take(order(3), {Rank(3): waiting})

    assert seen.problem == ""
    assert "in_a_collective" in places(seen.stacks)


def test_ranks_at_one_place_are_one_stack(waiting: int) -> None:
    seen = stacks.take(order(), {Rank(0): waiting, Rank(1): waiting})

    assert [stack.ranks for stack in seen.stacks] == [(0, 1)]


def test_a_process_that_is_gone_is_told_with_the_reason_and_the_others_are_seen(
    waiting: int,
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass

    seen = stacks.take(order(), {Rank(0): gone.pid, Rank(1): waiting})

    assert seen.problem.startswith("rank 0: ")
    assert len(seen.problem) > len("rank 0: ")
    assert seen.stacks[0].ranks == (1,)


def test_what_is_not_seen_in_time_is_given_up(waiting: int) -> None:
    seen = stacks.take(order(within_s=0.0), {Rank(0): waiting})

    assert (seen.stacks, seen.problem) == ((), "rank 0: not seen in time")


def test_without_the_tool_nothing_is_seen_and_the_reason_is_told(
    waiting: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stacks, "SPY", tmp_path / "py-spy")

    seen = stacks.take(order(), {Rank(0): waiting})

    assert seen.stacks == ()
    assert "No such file" in seen.problem


def test_a_long_frame_keeps_its_end() -> None:
    (told,) = stacks.frames([stacks._Frame("f" * 300, "a.py", line=7)])

    assert len(told) == FRAME_MAX
    assert told.endswith("f (a.py:7)")
