"""Where a process stands is seen from outside, however it stands still, and a failure says why."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.agent import stacks
from orchestrator.protocol.ids import Generation, Rank
from orchestrator.protocol.messages import Inspect, StacksTaken
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


def take(pids: dict[int, int], *suspects: int, within_s: float = 20.0) -> StacksTaken:
    order = Inspect(
        order="1.1",
        generation=Generation(1),
        suspects=tuple(map(Rank, suspects)),
        within_s=within_s,
    )
    ranks = {Rank(rank): pid for rank, pid in pids.items()}
    return stacks.take(order, ranks, time.monotonic() + within_s)


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
    seen = take({3: waiting})

    assert seen.problem == ""
    assert seen.stacks[0].ranks == (3,)
    assert places(seen.stacks)[-3:] == ["in_a_collective", "step", "<module>"]


def test_of_a_suspect_native_frames_are_seen_below(waiting: int) -> None:
    seen = take({3: waiting}, 3)

    names = places(seen.stacks)
    assert "in_a_collective" in names
    assert any("libc" in frame or ".so" in frame for frame in seen.stacks[0].frames)


def test_a_frozen_suspect_is_seen_all_the_same(waiting: int) -> None:
    os.kill(waiting, signal.SIGSTOP)

    seen = take({3: waiting}, 3)

    assert seen.problem == ""
    assert "in_a_collective" in places(seen.stacks)


def test_ranks_at_one_place_are_one_stack(waiting: int) -> None:
    seen = take({0: waiting, 1: waiting})

    assert [stack.ranks for stack in seen.stacks] == [(0, 1)]


def test_a_process_that_is_gone_is_told_with_the_reason_and_the_others_are_seen(
    waiting: int,
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass

    seen = take({0: gone.pid, 1: waiting})

    assert seen.problem.startswith("rank 0: ")
    assert len(seen.problem) > len("rank 0: ")
    assert seen.stacks[0].ranks == (1,)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A look that hangs, as that of whoever reads /proc of a process in a broken driver does."""
    script = tmp_path / "py-spy"
    script.write_text("#!/bin/sh\nexec sleep 30\n")
    script.chmod(0o755)
    monkeypatch.setattr(stacks, "SPY", script)


@pytest.mark.usefixtures("hanging")
def test_what_is_not_seen_in_time_is_given_up(waiting: int) -> None:
    seen = take({0: waiting, 1: waiting}, within_s=0.1)

    assert (seen.stacks, seen.problem) == ((), "rank 0, 1: not seen in time")


@pytest.mark.parametrize(
    "said",
    [
        "Error: Permission Denied: Try running again with elevated permissions by going 'sudo !!'",
        "Permission Denied\n\nIt looks like you are running in a docker container.",
    ],
)
def test_who_may_not_look_says_what_it_takes_to_be_allowed_to(
    waiting: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str
) -> None:
    script = tmp_path / "py-spy"
    script.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{said}\nEND\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(stacks, "SPY", script)

    seen = take({0: waiting, 1: waiting}, 0)

    assert seen.stacks == ()
    assert seen.problem == f"rank 0, 1: Permission Denied: {stacks.MAY_TRACE}"


def test_without_the_tool_nothing_is_seen_and_the_reason_is_told(
    waiting: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stacks, "SPY", tmp_path / "py-spy")

    seen = take({0: waiting})

    assert seen.stacks == ()
    assert "No such file" in seen.problem


def test_a_long_frame_keeps_its_end() -> None:
    (told,) = stacks.frames([stacks._Frame("f" * 300, "a.py", line=7)])

    assert len(told) == FRAME_MAX
    assert told.endswith("f (a.py:7)")


@pytest.mark.usefixtures("hanging")
def test_who_makes_ranks_move_waits_for_a_look_but_no_longer_than_that_may_take(
    waiting: int,
) -> None:
    asked = Inspect(order="1.1", generation=Generation(1), suspects=(), within_s=0.3)

    async def moved_after() -> float:
        inspector = stacks.Inspector()
        began = time.monotonic()
        looking = asyncio.create_task(inspector.look(asked, {Rank(0): waiting}))
        await asyncio.sleep(0)
        await inspector.settled()
        spent = time.monotonic() - began
        assert (await looking).problem == "rank 0: not seen in time"
        inspector.close()
        return spent

    assert 0.3 <= asyncio.run(moved_after()) < 5
