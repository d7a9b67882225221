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
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from orchestrator.protocol.ids import Rank
from orchestrator.protocol.messages import Inspect, StacksTaken
from orchestrator.protocol.stacks import FRAME_MAX, FRAMES_MAX, Stack

SPY = Path(sys.executable).with_name("py-spy")
OUTPUT_MAX = 4 << 20
"""Bytes. A process with a hundred threads says a tenth of that."""
GRACE_S = 0.5
"""To end what did not answer in time."""
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


def take(order: Inspect, pids: Mapping[Rank, int]) -> StacksTaken:
    """Return where these processes stand. Takes `order.within_s` and `GRACE_S` at most.

    Args:
        order: names those of whom native frames are wanted, if they can be had.
        pids: process of each rank.
    """
    deadline = time.monotonic() + order.within_s
    looks = {(rank, _PLAIN): pid for rank, pid in pids.items()}
    looks |= {(rank, _NATIVE): pids[rank] for rank in order.suspects if rank in pids}
    try:
        spies = {key: _spy(pid, key[1]) for key, pid in looks.items()}
    except OSError as error:
        return StacksTaken(generation=order.generation, stacks=(), problem=f"no py-spy: {error}")
    seen = {key: _read(spy, deadline, looks[key]) for key, spy in spies.items()}
    ranks_of: dict[tuple[str, ...], list[Rank]] = {}
    problems = []
    for rank in sorted(pids):
        plain, native = seen[rank, _PLAIN], seen.get((rank, _NATIVE), "")
        best = plain if isinstance(native, str) else native
        if isinstance(best, str):
            problems.append(f"rank {rank}: {best}")
        else:
            ranks_of.setdefault(best, []).append(rank)
    return StacksTaken(
        generation=order.generation,
        stacks=tuple(Stack(tuple(ranks), frames) for frames, ranks in ranks_of.items()),
        problem="; ".join(problems),
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
        spy.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            spy.communicate(timeout=GRACE_S)
        return "not seen in time"
    if len(said) > OUTPUT_MAX:
        return f"py-spy says {len(said)} bytes, expected {OUTPUT_MAX} at most"
    try:
        threads = _threads.decode(said)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _first_cause(problem) or "py-spy says nothing that can be read"
    main = next((thread for thread in threads if thread.os_thread_id == pid), None)
    return (
        frames(main.frames[:FRAMES_MAX])
        if main and main.frames
        else "its main thread has no frames"
    )


def frames(found: Sequence[_Frame]) -> tuple[str, ...]:
    """Return frames in words, in their order."""
    return tuple(_word(f) for f in found)


def _word(frame: _Frame) -> str:
    # A native function without debugging symbols has no line.
    line = f":{frame.line}" if frame.line else ""
    text = f"{frame.name} ({frame.short_filename or frame.filename}{line})"
    return text if len(text) <= FRAME_MAX else "..." + text[3 - FRAME_MAX :]


def _first_cause(problem: bytes) -> str:
    """Return the line of an error of py-spy that says why: "Error: ..." says only that."""
    lines = [line.strip() for line in problem.decode(errors="replace").splitlines()]
    causes = [line for line in lines if line and not line.startswith(("Error:", "Caused by:"))]
    return (causes or lines or [""])[0][:200]


class Inspector:
    """Looks in a thread of its own, so that the agent goes on beating meanwhile."""

    def __init__(self) -> None:
        self._looking: asyncio.Future[StacksTaken] | None = None

    async def look(self, order: Inspect, pids: Mapping[Rank, int]) -> StacksTaken:
        """Return where processes stand; see `take`."""
        self._looking = asyncio.get_running_loop().run_in_executor(None, take, order, pids)
        return await self._looking

    async def settled(self) -> None:
        """Wait until nobody looks: whoever is to make ranks move comes after that."""
        if self._looking is not None and not self._looking.done():
            await asyncio.wait([self._looking])
