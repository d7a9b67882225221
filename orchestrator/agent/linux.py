"""What only the Linux kernel can do for us: adopting orphans, dying with a parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_PTRACER = 0x59616D61
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class UnsupportedSystemError(Exception):
    """This system lacks what an agent relies on."""

    hint = "Run agents on Linux 5.3 or newer; the CLI works anywhere."


class Vitals(NamedTuple):
    """What the kernel says of a process."""

    state: str
    """R running, S sleeping, D in an uninterruptible wait, T stopped, Z dead and not reaped."""
    cpu_s: float


def require() -> None:
    """Check that this is a Linux with process descriptors. Raises UnsupportedSystemError."""
    if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
        raise UnsupportedSystemError(f"system is {sys.platform}, expected linux with pidfd_open")


def adopt_orphans(*, on: bool = True) -> None:
    """Make this process the parent of every descendant whose own parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(on))


def die_with(parent: int, *, after: int = 0, within_s: float = 5.0) -> None:
    """Have the kernel kill this process when `parent` ends.

    Args:
        parent: whose child this process is, or will be once `after` has ended.
        after: the parent that this process was born to and is to be adopted from, if there is one.
        within_s: seconds to wait for that.

    Raises:
        ProcessLookupError: if another process is the parent then: `parent` is gone, and nothing
            would ever end this process.
    """
    deadline = time.monotonic() + within_s
    while os.getppid() == after and time.monotonic() < deadline:
        time.sleep(0.0005)
    if os.getppid() != parent:
        raise ProcessLookupError(f"parent is {os.getppid()}, expected {parent}")
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended between the two lines above
        os.kill(os.getpid(), signal.SIGKILL)


def let_look(agent: int) -> None:
    """Let `agent` and what it starts read this process; only where Yama forbids that it matters.

    Under its scope 1 a process is looked at by its ancestors only, and by whom it names. What the
    agent starts to look at ranks is a sister of theirs.
    Source: Linux, Documentation/admin-guide/LSM/Yama.rst.
    """
    with contextlib.suppress(OSError):  # there is no Yama, hence nothing that forbids it
        _prctl(_PR_SET_PTRACER, agent)


def vitals(pid: int) -> Vitals | None:
    """Return what the kernel says of `pid`, or None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may itself contain spaces and parentheses: cut behind the last one.
    fields = text.rpartition(")")[2].split()
    return Vitals(fields[0], (int(fields[11]) + int(fields[12])) / _TICKS_PER_S)


def children() -> list[int]:
    """Return the process ids of all children of this process, adopted ones included, ascending.

    Empty on a kernel that does not list them (no CONFIG_PROC_CHILDREN).
    """
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.update(int(word) for word in path.read_text(encoding="ascii").split())
    return sorted(found)


def await_readable(descriptors: Iterable[int], within_s: float | None = None) -> set[int]:
    """Wait until one of `descriptors` is readable, at most `within_s` seconds; None for ever.

    Returns:
        Those that are.
    """
    poll = select.poll()  # select() knows no descriptor above 1023
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return {ready for ready, _ in poll.poll(None if within_s is None else within_s * 1000)}


def end_strays(spared: Iterable[int]) -> set[int]:
    """Kill and reap every child that is none of `spared`; return those that are still there.

    For whoever adopts orphans: what a dead process left behind in sessions of its own.
    """
    left = set(children()) - set(spared)
    for pid in tuple(left):
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            if os.waitpid(pid, os.WNOHANG) != (0, 0):
                left.discard(pid)
    return left


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}, {value}): {os.strerror(error)}")
