"""The conductor's end of the small live world: starts its ranks, orders, and hears of digests.

What ranks digest takes the way that it takes in a run: beacons, the account of an agent, beats as
they go over the wire, the columns of the world, and the pure comparison behind them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from io import BufferedRWPair
from pathlib import Path
from typing import NamedTuple, Self

import msgspec

from orchestrator.agent.account import Account
from orchestrator.agent.hearing import said_of
from orchestrator.protocol.ids import Generation, Rank, Seconds, Step
from orchestrator.protocol.messages import Beat, StateDiverged
from orchestrator.protocol.phases import RankPhase
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.protocol.trials import Order, Resume, Return, Said, Setup
from orchestrator.worker import beacon
from orchestrator.worker.beacon import BeaconReader
from orchestrator.worlds.machine import node_names
from orchestrator.worlds.telemetry import Columns

ANSWER_WITHIN_S = 120.0
"""A rank that has not answered by then never will; its collectives give up before that."""
END_WITHIN_S = 10.0
LOG = "ranks.log"
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""As ranks of a run have it: threads that spin for work make steps ten times slower."""


class WorldBrokenError(Exception):
    """A rank of the small world is gone, or raised something."""

    def __init__(self, message: str, log: Path) -> None:
        super().__init__(message)
        self.hint = f"its ranks printed what they had to say: {log}"


class Heard(NamedTuple):
    """What came of listening."""

    found: list[StateDiverged]
    """What follows from what was digested, and what ranks found together."""
    thrown: list[int]
    """The steps that ranks threw away for that, before they moved anything."""


class _Ear:
    """Hears what ranks digest, and compares it, as the controller's side of a run does."""

    def __init__(self, run: TrainingRun, pages: list[Path]) -> None:
        names, per_node = node_names(run), run.spec.nodes.ranks_per_node
        self._layout = run.layout
        self._seats = tuple(names[rank // per_node] for rank in range(run.world_size))
        self._beacons = [BeaconReader(page) for page in pages]
        self._accounts = {name: Account() for name in dict.fromkeys(self._seats)}
        self._columns = Columns(run.world_size)
        self._encode, self._decode = msgspec.json.Encoder(), msgspec.json.Decoder(Beat)

    def begin(self, generation: Generation) -> None:
        """Forget what was said before this generation."""
        for name, account in self._accounts.items():
            account.begin(generation, [Rank(r) for r, s in enumerate(self._seats) if s == name])
        self._columns.begin(generation, Step(0), len(self._seats))
        self._columns.ballots.begin(generation, self._layout, self._seats)

    def listen(self, at: Seconds) -> list[StateDiverged]:
        """Return what follows from all that was digested since the last time."""
        for rank, page in enumerate(self._beacons):
            account = self._accounts[self._seats[rank]]
            for record in page.new_digests():
                if record.generation == account.generation:
                    account.record_digests(Rank(rank), record.taken, record.values)
        for name, account in self._accounts.items():
            self._columns.take(name, self._decode.decode(self._encode.encode(_beat(account))))
        found = []
        for event in self._columns.compared(at):
            assert isinstance(event.fact, StateDiverged), event.fact.reason
            found.append(event.fact)
        return found

    def parts(self, at: Seconds) -> tuple[tuple[Step, str], ...]:
        """Return what was told of steps in which all ranks digested the same, as a journal does."""
        told = self._columns.telemetry(at)
        return told.parts if told is not None else ()

    def close(self) -> None:
        """Let go of the beacons."""
        for page in self._beacons:
            page.close()


def _beat(account: Account) -> Beat:
    """Return a beat that has what was digested, and else says that all is well."""
    count = len(account.ranks)
    return Beat(
        generation=account.generation,
        ranks=account.ranks,
        phases=(int(RankPhase.OPTIMIZER),) * count,
        steps=(0,) * count,
        progress=(0,) * count,
        states="R" * count,
        cpu_s=(0.0,) * count,
        stall_s=(0.0,) * count,
        digests=account.unsent_digests(),
    )


class LiveWorld:
    """The ranks of one run file, each a process, between trials as well.

    Use it as a context: no process is left behind, whatever ends the block.

    Args:
        run: the run file; it is checked.
        folder: for what the world needs, new for each world.
        cache_dir: where tokens are kept from one world to the next.
    """

    def __init__(self, run: TrainingRun, folder: Path, cache_dir: Path) -> None:
        self._run, self._folder, self._cache_dir = run, folder, cache_dir
        self._generation = Generation(0)
        self._told: list[StateDiverged] = []
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._resources.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def order(self, order: Order) -> list[Said]:
        """Have all ranks do something; return what each says, by rank.

        Raises:
            WorldBrokenError: if one of them does not.
        """
        if isinstance(order, Return | Resume):
            self._ear.begin(order.generation)
            self._told = []
        text = self._encode(order) + b"\n"
        for lines in self._lines:
            try:
                lines.write(text)
                lines.flush()
            except OSError as error:
                raise WorldBrokenError(f"a rank is gone: {error}", self._log) from error
        said = self._answers()
        for message in (each for one in said for each in one.diverged):
            self._told.append(said_of(message, self._generation))
        return said

    def next_generation(self) -> Generation:
        """Return the number of a generation that there has not been."""
        self._generation = Generation(self._generation + 1)
        return self._generation

    def listen(self, at: float) -> Heard:
        """Return what the detectors found since the last time; `at` is in seconds, or steps."""
        told, self._told = self._told, []
        return Heard(told + self._ear.listen(Seconds(at)), [fact.step + 1 for fact in told])

    def parts(self, at: float) -> dict[Step, str]:
        """Return of each step since the last time what its digests are made of, as in a journal.

        Raises:
            WorldBrokenError: if ranks that hold the same came to other bits: this world can not say
                what is right.
        """
        heard = self.listen(at)
        if heard.found:
            raise WorldBrokenError(
                f"its own ranks do not come to the same bits: {heard.found[0].evidence}", self._log
            )
        return dict(self._ear.parts(Seconds(at)))

    @property
    def _log(self) -> Path:
        return self._folder / LOG

    def _start(self) -> None:
        size = self._run.world_size
        self._folder.mkdir(parents=True)
        pages = [self._folder / f"beacon-{rank}" for rank in range(size)]
        for page in pages:
            beacon.create(page)
        setup = Setup(
            job=self._run.job(),
            world_size=size,
            cache_dir=str(self._cache_dir),
            meeting=str(self._folder / "meeting"),
            beacons=tuple(map(str, pages)),
        )
        file = self._folder / "setup.json"
        file.write_bytes(msgspec.json.encode(setup))
        self._ear = _Ear(self._run, pages)
        self._resources.callback(self._ear.close)
        self._encode = msgspec.json.Encoder().encode
        self._decode = msgspec.json.Decoder(Said).decode
        self._spawn(file, size)
        self._answers()

    def _spawn(self, setup: Path, size: int) -> None:
        pairs = [socket.socketpair() for _ in range(size)]
        theirs = [their for _, their in pairs]
        command = [sys.executable, "-P", "-m", "trainer.trials", str(setup)]
        command += [str(their.fileno()) for their in theirs]
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[their.fileno() for their in theirs],
                # A group of its own: Ctrl-C is for the conductor, which ends this in order.
                start_new_session=True,
                env=os.environ | dict.fromkeys(_ONE_THREAD, "1"),
            )
        self._resources.callback(_end, process)
        self._lines: list[BufferedRWPair] = []
        for own, their in pairs:
            their.close()
            own.settimeout(ANSWER_WITHIN_S)
            self._lines.append(self._resources.enter_context(own.makefile("rwb")))
            own.close()  # the file keeps it open

    def _answers(self) -> list[Said]:
        said = []
        for rank, lines in enumerate(self._lines):
            try:
                line = lines.readline()
            except OSError as error:
                raise WorldBrokenError(
                    f"rank {rank} does not answer: {error}", self._log
                ) from error
            if not line:
                raise WorldBrokenError(f"rank {rank} is gone", self._log)
            answer = self._decode(line)
            if answer.broken:
                raise WorldBrokenError(f"rank {rank} raised {answer.broken}", self._log)
            said.append(answer)
        return said


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the ranks and who has forked them; they have nothing to lose."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(END_WITHIN_S)
