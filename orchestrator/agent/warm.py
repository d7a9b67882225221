"""The warm process: has imported the trainer already, and forks a rank within milliseconds.

Importing torch takes over a second, and so does what its first optimizer imports lazily; a fork
of a process that has done both costs a hundredth of that (measured: 2.5 s cold, 0.13 s forked).

A rank is forked twice and its middle parent ends at once, so that the kernel hands the rank to
the agent, which adopts orphans. The agent then reaps it directly and for good, whatever becomes
of the warm process; and the rank dies with the agent, whatever becomes of everything else.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, NoReturn

import msgspec

from orchestrator.agent import linux
from orchestrator.worker.errors import EXIT_ORPHANED

MESSAGE_MAX_BYTES = 1 << 17
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Ranks share a machine, and spinning worker threads of each made a step ten times slower."""


class Fork(msgspec.Struct, frozen=True, kw_only=True):
    """Order to the warm process; two descriptors come along: control socket, output file."""

    agent: int
    environment: dict[str, str]
    control_variable: str
    """Name of the variable that tells the rank the number of its control socket."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """From the warm process when it is ready, from a rank when it lives, from both on failure."""

    pid: int
    kind: str = ""
    """Class of the exception if the trainer can not be imported, else ""."""
    message: str = ""
    traceback: str = ""


class WarmUpError(Exception):
    """The trainer could not be imported, or the warm process is gone.

    Attributes:
        answer: what it still said.
    """

    hint = "Import the entrypoint by hand to see what is missing."

    def __init__(self, message: str, answer: Answer | None = None) -> None:
        super().__init__(message)
        self.answer = answer


class Warm:
    """The agent's handle on its warm process.

    Make it on the agent's main thread: the kernel ends the warm process with the *thread* that
    started it. Call it from one thread at a time; a fork blocks for milliseconds, at most
    `timeout_s`.
    """

    def __init__(self, entrypoint: str, log: IO[bytes], *, timeout_s: float = 20.0) -> None:
        linux.require()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._timeout_s = timeout_s
        environment = dict.fromkeys(_ONE_THREAD, "1") | dict(os.environ)
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    __name__,
                    entrypoint,
                    str(theirs.fileno()),
                    str(os.getpid()),
                ],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        self._ready = False

    def wait_ready(self, within_s: float = 60.0) -> None:
        """Wait until the trainer is imported.

        Raises:
            WarmUpError: with the traceback if it can not be; without one if it takes longer.
        """
        if not self._ready:
            self._receive("importing the trainer", within_s)
            self._ready = True

    def fork(
        self, environment: dict[str, str], control: socket.socket, control_variable: str, log: Path
    ) -> int:
        """Start a rank; return its process id, a child of the calling process.

        Args:
            environment: variables of the rank, besides those it inherits.
            control: the rank's end of its control socket; the caller closes its copy.
            control_variable: the variable that will tell the rank its number.
            log: what the rank prints is appended here.

        Raises:
            WarmUpError: if the warm process is gone.
        """
        self.wait_ready()
        order = Fork(agent=os.getpid(), environment=environment, control_variable=control_variable)
        with log.open("ab") as output:
            try:
                socket.send_fds(
                    self._socket, [msgspec.json.encode(order)], [control.fileno(), output.fileno()]
                )
            except OSError as error:
                raise WarmUpError(f"warm process is gone: {error}") from error
        return self._receive("forking a rank", self._timeout_s).pid

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def end(self) -> None:
        """End the warm process and reap it; its ranks live on.

        A fork under way in another thread still hears of a rank that was born, or raises.
        """
        self._process.kill()
        self._process.wait(10)

    def close(self) -> None:
        """End it for good. Not while a call is under way: a rank just born would go unheard."""
        self.end()
        self._socket.close()

    def _receive(self, doing: str, within_s: float) -> Answer:
        try:
            self._socket.settimeout(within_s)
            data = self._socket.recv(MESSAGE_MAX_BYTES)
        except OSError as error:
            raise WarmUpError(f"warm process did not answer while {doing}: {error}") from error
        if not data:
            raise WarmUpError(f"warm process ended while {doing}")
        answer = msgspec.json.decode(data, type=Answer)
        if answer.kind:
            raise WarmUpError(f"{doing}: {answer.kind}: {answer.message}", answer)
        return answer


def serve(entrypoint: str, orders: socket.socket) -> None:
    """Import the entrypoint, then fork a rank per order until the agent closes its end."""
    try:
        main = load(entrypoint)
    except BaseException as error:
        answer = Answer(
            pid=os.getpid(),
            kind=type(error).__qualname__,
            message=str(error)[:2000],
            traceback="".join(traceback.format_exception(error))[-32_000:],
        )
        orders.send(msgspec.json.encode(answer))
        raise
    orders.send(msgspec.json.encode(Answer(pid=os.getpid())))
    while True:
        data, descriptors, _, _ = socket.recv_fds(orders, MESSAGE_MAX_BYTES, 2)
        if not data:
            return
        order = msgspec.json.decode(data, type=Fork)
        problem = _fork_twice(main, order, descriptors, orders)
        if problem:
            answer = Answer(pid=os.getpid(), kind="OSError", message=problem)
            orders.send(msgspec.json.encode(answer))
        for descriptor in descriptors:
            os.close(descriptor)


def _fork_twice(
    main: Callable[[], int | None], order: Fork, descriptors: list[int], orders: socket.socket
) -> str:
    """Start a rank; return why there is none, "" if there is. The rank answers by itself."""
    try:
        middle = os.fork()
    except OSError as error:
        return f"fork: {error}"
    if middle == 0:
        own = os.getpid()
        try:
            rank = os.fork()
        except OSError as error:
            os._exit(error.errno or 1)
        if rank == 0:
            _become_rank(main, order, descriptors, orders, born_to=own)
        os._exit(0)
    _, status = os.waitpid(middle, 0)
    number = os.waitstatus_to_exitcode(status)
    return f"fork: {os.strerror(number)}" if number > 0 else ""


def load(entrypoint: str) -> Callable[[], int | None]:
    """Import `module:function`, let the module warm up, and return the function.

    Raises:
        RuntimeError: if warming up left threads running: a fork would copy their locks, held.
    """
    module_name, _, function = entrypoint.partition(":")
    # Nothing that is imported becomes garbage, and to look for some in between takes a sixth of
    # what it takes to import torch.
    gc.disable()
    module = importlib.import_module(module_name)
    main: Callable[[], int | None] = getattr(module, function)
    warm_up = getattr(module, "warm_up", None)
    if warm_up is not None:
        warm_up()
    gc.enable()
    if threading.active_count() > 1:
        names = ", ".join(thread.name for thread in threading.enumerate())
        raise RuntimeError(f"threads are {names}, expected the main thread only")
    return main


def _become_rank(
    main: Callable[[], int | None],
    order: Fork,
    descriptors: list[int],
    orders: socket.socket,
    *,
    born_to: int,
) -> NoReturn:
    code = 1
    try:
        os.setsid()
        _die_with(order.agent, after=born_to)
        linux.let_look(order.agent)
        control, output = descriptors
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.set_inheritable(control, True)
        os.environ.update(order.environment)
        os.environ[order.control_variable] = str(control)
        faulthandler.enable()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _announce(orders)
        code = main() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:  # noqa: BLE001 - a rank must never fall back into the server's loop
        traceback.print_exception(error)
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        # Without destructors: those of communication libraries wait for peers that have left.
        os._exit(code)


def _announce(orders: socket.socket) -> None:
    """Say that this rank lives; end it, and say nothing, if nobody wants to know any more."""
    try:
        orders.send(msgspec.json.encode(Answer(pid=os.getpid())))
    except OSError:
        os._exit(EXIT_ORPHANED)
    orders.close()


def _die_with(agent: int, *, after: int = 0) -> None:
    """Tie this process to the agent; end it, and say nothing, if that is gone already."""
    try:
        linux.die_with(agent, after=after)
    except ProcessLookupError:
        os._exit(EXIT_ORPHANED)


if __name__ == "__main__":
    _die_with(int(sys.argv[3]))
    # Last, where `-m` puts it first: the trainer may be a module in the user's folder, and what
    # else is there is not to stand in for modules of ours.
    with contextlib.suppress(FileNotFoundError):  # removed: there is nothing to import from it
        sys.path.append(str(Path.cwd()))
    with socket.socket(fileno=int(sys.argv[2])) as inherited:
        serve(sys.argv[1], inherited)
