"""Looks where ranks stand, from outside: a rank that stands still answers nobody.

py-spy reads the memory of a process. The plain look does not stop the process, works on one that is
frozen, and takes a tenth of a second; for native frames the process is held for a moment, and
frozen ones can not be looked at that way, so those are asked for suspects only and may fail.
Source: py-spy 0.4, `dump --json`, with `--nonblocking` or `--native`.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from orchestrator.agent.threads import DaemonThreads
from orchestrator.protocol.ids import Rank
from orchestrator.protocol.messages import Inspect, StacksTaken
from orchestrator.protocol.stacks import FRAME_MAX, FRAMES_MAX, Stack

SPY = Path(sys.executable).with_name("py-spy")
OUTPUT_MAX = 4 << 20
"""Bytes. A process with a hundred threads says a tenth of that."""
GRACE_S = 0.5
"""To end what did not answer in time."""
DENIED = "Permission Denied"
MAY_TRACE = (
    "an agent may not look into its ranks here: a container needs the capability SYS_PTRACE, "
    "a machine kernel.yama.ptrace_scope of 1 at most"
)
_PLAIN, _NATIVE = "--nonblocking", "--native"


class _Frame(msgspec.Struct, frozen=True):
    name: str
    short_filename: str | None = None
    filename: str = ""
    line: int = 0


class _Thread(msgspec.Struct, frozen=True):
    os_thread_id: int | None
    frames: list[_Frame]


_threads: msgspec.json.Decoder[list[_Thread]] = msgspec.json.Decoder(list[_Thread])


def take(order: Inspect, pids: Mapping[Rank, int], deadline: float) -> StacksTaken:
    """Return where these processes stand, no later than `GRACE_S` after a moment.

    Args:
        order: names those of whom native frames are wanted, if they can be had.
        pids: process of each rank.
        deadline: on the monotonic clock.
    """
    looks = {(rank, _PLAIN): pid for rank, pid in pids.items()}
    looks |= {(rank, _NATIVE): pids[rank] for rank in order.suspects if rank in pids}
    spies: dict[tuple[Rank, str], subprocess.Popen[bytes]] = {}
    seen: dict[tuple[Rank, str], tuple[str, ...] | str] = {}
    try:
        for key, pid in looks.items():
            spies[key] = _spy(pid, key[1])
        for key, spy in spies.items():
            seen[key] = _read(spy, deadline, looks[key])
    except OSError as error:
        return StacksTaken(generation=order.generation, stacks=(), problem=f"no py-spy: {error}")
    finally:
        _end(spies.values())
    return _told(order, sorted(pids), seen)


def _told(
    order: Inspect, ranks: list[Rank], seen: Mapping[tuple[Rank, str], tuple[str, ...] | str]
) -> StacksTaken:
    """Return what was seen, the native frames where there are any."""
    ranks_of: dict[tuple[str, ...], list[Rank]] = {}
    problems: dict[str, list[str]] = {}
    for rank in ranks:
        plain, native = seen[rank, _PLAIN], seen.get((rank, _NATIVE), "")
        best = plain if isinstance(native, str) else native
        if isinstance(best, str):
            problems.setdefault(best, []).append(str(rank))
        else:
            ranks_of.setdefault(best, []).append(rank)
    return StacksTaken(
        generation=order.generation,
        stacks=tuple(Stack(tuple(of), frames) for frames, of in ranks_of.items()),
        problem="; ".join(f"rank {', '.join(of)}: {why}" for why, of in problems.items()),
    )


def _spy(pid: int, how: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [str(SPY), "dump", "--json", how, "--pid", str(pid)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def _read(spy: subprocess.Popen[bytes], deadline: float, pid: int) -> tuple[str, ...] | str:
    """Return the frames of the main thread that a spy has found, or why it has not."""
    try:
        said, problem = spy.communicate(timeout=max(deadline - time.monotonic(), 0.001))
    except subprocess.TimeoutExpired:
        return "not seen in time"
    if len(said) > OUTPUT_MAX:
        return f"py-spy says {len(said)} bytes, expected {OUTPUT_MAX} at most"
    try:
        threads = _threads.decode(said)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _first_cause(problem) or "py-spy says nothing that can be read"
    main = next((thread for thread in threads if thread.os_thread_id == pid), None)
    if main is None or not main.frames:
        return "its main thread has no frames"
    return frames(main.frames[:FRAMES_MAX])


def _end(spies: Iterable[subprocess.Popen[bytes]]) -> None:
    """End those that have not answered; one that can not be ended (state D) is left to init."""
    left = [spy for spy in spies if spy.poll() is None]
    for spy in left:
        spy.kill()
    deadline = time.monotonic() + GRACE_S
    for spy in left:
        with contextlib.suppress(subprocess.TimeoutExpired):
            spy.communicate(timeout=max(deadline - time.monotonic(), 0.001))


def frames(found: Sequence[_Frame]) -> tuple[str, ...]:
    """Return frames in words, in their order."""
    return tuple(_word(f) for f in found)


def _word(frame: _Frame) -> str:
    # A native function without debugging symbols has no line.
    line = f":{frame.line}" if frame.line else ""
    text = f"{frame.name} ({frame.short_filename or frame.filename}{line})"
    return text if len(text) <= FRAME_MAX else "..." + text[3 - FRAME_MAX :]


def _first_cause(problem: bytes) -> str:
    """Return the line of an error of py-spy that says why: "Error: ..." says only that.

    Where it may not look, what it says is for who types it (`sudo !!`); an operator's way is told.
    """
    if DENIED.encode() in problem:
        return f"{DENIED}: {MAY_TRACE}"
    lines = [line.strip() for line in problem.decode(errors="replace").splitlines()]
    causes = [line for line in lines if line and not line.startswith(("Error:", "Caused by:"))]
    return (causes or lines or [""])[0][:200]


class Inspector:
    """Looks in a thread of its own, so that the agent goes on beating meanwhile."""

    def __init__(self) -> None:
        # Not the one of the event loop: what resolves names there may take as long as it likes.
        self._thread = DaemonThreads(1, "stacks")
        self._looking: asyncio.Future[StacksTaken] | None = None
        self._until = 0.0

    async def look(self, order: Inspect, pids: Mapping[Rank, int]) -> StacksTaken:
        """Return where processes stand; see `take`."""
        deadline = time.monotonic() + order.within_s
        self._until = deadline + GRACE_S
        self._looking = asyncio.wrap_future(self._thread.submit(take, order, pids, deadline))
        return await self._looking

    async def settled(self) -> None:
        """Wait until nobody looks: whoever is to make ranks move comes after that, but in time."""
        if self._looking is not None and not self._looking.done():
            await asyncio.wait([self._looking], timeout=max(self._until - time.monotonic(), 0.0))

    def close(self) -> None:
        """Take no more orders."""
        self._thread.shutdown(wait=False)
