"""Ranks forked from a warm process: whose children they are, and how they end."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from orchestrator.agent import linux
from orchestrator.agent.nursery import Nursery
from orchestrator.agent.process import RankProcess
from orchestrator.agent.warm import MESSAGE_MAX_BYTES, Fork, Warm, WarmUpError
from orchestrator.worker.errors import EXIT_ORPHANED

pytestmark = pytest.mark.process
PROGRAMS = Path(__file__).parents[1] / "programs"
Start = Callable[[str], RankProcess]


@pytest.fixture
def warm_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], Warm]]:
    monkeypatch.setenv("PYTHONPATH", str(PROGRAMS), prepend=os.pathsep)
    linux.adopt_orphans()
    made: list[Warm] = []
    with (tmp_path / "warm.log").open("ab") as log:

        def make(entrypoint: str) -> Warm:
            made.append(Warm(entrypoint, log))
            return made[-1]

        yield make
    for warm in made:
        warm.close()
    linux.adopt_orphans(on=False)


@pytest.fixture
def start(warm_of: Callable[[str], Warm], tmp_path: Path) -> Iterator[Start]:
    started: list[RankProcess] = []
    sockets: list[socket.socket] = []

    def fork(entrypoint: str) -> RankProcess:
        ours, theirs = socket.socketpair()
        sockets.append(ours)
        with theirs:
            pid = warm_of(entrypoint).fork({"X": "1"}, theirs, "CONTROL", tmp_path / "rank.log")
        started.append(RankProcess(pid))
        return started[-1]

    yield fork
    for process in started:
        if process.code is None:
            process.stop(0.1, 10)
    for sock in sockets:
        sock.close()


def wait_for(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_rank_is_our_child_inherits_what_was_imported_and_its_code_is_reaped(
    start: Start, tmp_path: Path
) -> None:
    process = start("entry:say")

    assert process.wait(10) == 7
    text = (tmp_path / "rank.log").read_text()
    assert "warmed=True" in text
    assert "x=1" in text
    # Imports leave no garbage to look for; ranks do.
    assert "collected, imported: False and then: True" in text
    assert linux.vitals(process.pid) is None


def test_a_signal_that_ends_a_rank_is_its_code(start: Start, tmp_path: Path) -> None:
    process = start("entry:crash")

    assert process.wait(10) == -signal.SIGSEGV
    assert "Segmentation fault" in (tmp_path / "rank.log").read_text()


def test_an_exception_is_printed_and_does_not_return_to_the_fork_server(
    start: Start, tmp_path: Path
) -> None:
    process = start("entry:fail")

    assert process.wait(10) == 1
    assert "ValueError: of its own making" in (tmp_path / "rank.log").read_text()


def test_a_stopped_rank_is_killed_at_once_and_one_that_ignores_sigterm_after_its_grace(
    start: Start, tmp_path: Path
) -> None:
    frozen = start("entry:sleep")
    os.kill(frozen.pid, signal.SIGSTOP)
    wait_for(lambda: (v := linux.vitals(frozen.pid)) is not None and v.state == "T")
    begun = time.monotonic()
    assert frozen.stop(5.0, 5.0) == -signal.SIGKILL
    assert time.monotonic() - begun < 2.0

    stubborn = start("entry:stubborn")
    wait_for(lambda: "ready" in (tmp_path / "rank.log").read_text())
    assert stubborn.stop(0.2, 5.0) == -signal.SIGKILL
    # The process that it had started was in its group, and is gone and reaped as well.
    with pytest.raises(ProcessLookupError):
        os.killpg(stubborn.pid, 0)


def test_ranks_outlive_the_warm_process(warm_of: Callable[[str], Warm], tmp_path: Path) -> None:
    warm = warm_of("entry:sleep")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = RankProcess(warm.fork({"X": "1"}, theirs, "CONTROL", tmp_path / "rank.log"))
        warm.close()

        assert process.wait(0.3) is None
        assert process.stop(1.0, 5.0) == -signal.SIGTERM


def test_a_rank_that_is_born_when_the_nursery_closes_is_known_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PROGRAMS), prepend=os.pathsep)

    async def close_after_birth() -> int:
        nursery = Nursery("late:sleep", tmp_path / "warm.log")
        ours, theirs = socket.socketpair()
        with ours, theirs:
            born = asyncio.create_task(nursery.fork({}, theirs, "CONTROL", tmp_path / "rank.log"))
            await asyncio.sleep(0)  # it begins
            known = before | {nursery.pid}
            # The rank comes to us before it says that it lives.
            await asyncio.to_thread(wait_for, lambda: bool(set(linux.children()) - known), 30)
            nursery.close()
            async with asyncio.timeout(10):
                return await born

    linux.adopt_orphans()
    before = set(linux.children())
    try:
        pid = asyncio.run(close_after_birth())
        assert set(linux.children()) - before == {pid}
        RankProcess(pid).stop(0.1, 10)
    finally:
        linux.end_strays(before)
        linux.adopt_orphans(on=False)


def test_a_trainer_that_can_not_be_imported_is_reported_with_its_traceback(
    warm_of: Callable[[str], Warm],
) -> None:
    with pytest.raises(WarmUpError, match="ModuleNotFoundError") as caught:
        warm_of("no_such_module:main").wait_ready()

    assert caught.value.answer is not None
    assert "no_such_module" in caught.value.answer.traceback


AGENT = """
import socket, sys, time
from pathlib import Path
from orchestrator.agent import linux
from orchestrator.agent.warm import Warm
linux.adopt_orphans()
with open(sys.argv[1], "ab") as log:
    warm = Warm("entry:sleep", log)
ours, theirs = socket.socketpair()
pid = warm.fork({"X": "1"}, theirs, "CONTROL", Path(sys.argv[1]))
print(pid, warm._process.pid, flush=True)
time.sleep(60)
"""


def test_neither_rank_nor_warm_process_outlives_an_agent_that_is_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PROGRAMS), prepend=os.pathsep)
    command = [sys.executable, "-c", AGENT, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        pids = [int(word) for word in agent.stdout.readline().split()]
        assert len(pids) == 2

        agent.kill()
        agent.wait(10)

        for pid in pids:
            wait_for(lambda pid=pid: (v := linux.vitals(pid)) is None or v.state == "Z")


@contextlib.contextmanager
def warm_process(agent: int, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """Start one that takes `agent` for its agent; yield it and the agent's end of its orders."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(10)
    with ours, log.open("ab") as output:
        with theirs:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    Warm.__module__,
                    "entry:sleep",
                    f"{theirs.fileno()}",
                    f"{agent}",
                ],
                pass_fds=[theirs.fileno()],
                stderr=output,
            )
        try:
            yield process, ours
        finally:
            process.kill()
            process.wait(10)


@pytest.fixture
def gone() -> int:
    """Return the number of a process that is no more."""
    with subprocess.Popen(["true"]) as process:
        return process.pid


def test_a_warm_process_whose_agent_is_gone_before_it_runs_ends_and_says_nothing(
    gone: int, tmp_path: Path
) -> None:
    with warm_process(gone, tmp_path / "log") as (process, orders):
        assert orders.recv(MESSAGE_MAX_BYTES) == b""
        assert process.wait(10) == EXIT_ORPHANED

    assert (tmp_path / "log").read_text() == ""


def test_a_rank_whose_agent_is_gone_when_it_is_born_ends_at_once_and_says_nothing(
    monkeypatch: pytest.MonkeyPatch, gone: int, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PROGRAMS), prepend=os.pathsep)
    linux.adopt_orphans()
    before = linux.children()
    with warm_process(os.getpid(), tmp_path / "log") as (process, orders):
        assert orders.recv(MESSAGE_MAX_BYTES)
        order = Fork(agent=gone, environment={}, control_variable="CONTROL")
        with (tmp_path / "log").open("ab") as output:
            socket.send_fds(orders, [msgspec.json.encode(order)], [output.fileno()] * 2)
        orders.shutdown(socket.SHUT_WR)
        ordered = time.monotonic()

        # Closed when the last process has ended that had the other end: the rank.
        assert orders.recv(MESSAGE_MAX_BYTES) == b""
        assert time.monotonic() - ordered < 2.0
        assert process.wait(10) == 0

    linux.end_strays(before)
    linux.adopt_orphans(on=False)
    assert linux.children() == before
    assert (tmp_path / "log").read_text() == ""


def test_a_hundred_ranks_leave_no_descriptor_and_no_process(
    warm_of: Callable[[str], Warm], tmp_path: Path
) -> None:
    warm = warm_of("entry:say")
    warm.wait_ready()
    before = len(list(Path("/proc/self/fd").iterdir()))

    for _ in range(100):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            pid = warm.fork({"X": "1"}, theirs, "CONTROL", tmp_path / "rank.log")
        assert RankProcess(pid).wait(10) == 7

    assert len(list(Path("/proc/self/fd").iterdir())) == before
