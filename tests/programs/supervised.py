"""A real process that uses the SDK, and the agent's end of its socket for a test to play."""

import fcntl
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TypeVar

from orchestrator.protocol.ids import Generation, NodeId, Rank
from orchestrator.protocol.phases import RankPhase
from orchestrator.protocol.rank import (
    BEACON_VARIABLE,
    CONTROL_FD_VARIABLE,
    MEMORY_VARIABLE,
    STAND_BY_VARIABLE,
    Framer,
    FromRank,
    Seat,
    ToRank,
    frame,
    read_from_rank,
)
from orchestrator.worker.beacon import BeaconReader, create

M = TypeVar("M")
PROGRAM = """
import sys, threading, time
from pathlib import Path
from orchestrator.worker import Aborted, MisconfiguredError, PeerLostError, RankPhase, serve
from orchestrator.worker import UnrestorableError

def train(worker, seat):
    options = seat.job
    if options.get("misconfigured"):
        raise MisconfiguredError("vocabulary is 10, expected 20", hint="choose another tokenizer")
    if options.get("unrestorable"):
        raise UnrestorableError("AccessDenied: b/s0.st", hint="compare credentials")
    if options.get("callback_fails"):
        worker.on_abort(lambda: 1 / 0)
    worker.reached("formed")
    step = 0
    for step in range(1, options["steps"] + 1):
        worker.phase(RankPhase.FORWARD)
        time.sleep(0.005)
        if step == options.get("stuck_at"):
            time.sleep(60)
        if step == options.get("lose_peer_at"):
            raise PeerLostError("connection reset by peer")
        worker.step_done(step, loss=1.0 / step, grad_norm=1.0, tokens=8, seconds=0.005)
        due = step % options.get("save_every", 10) == 0
        slot = worker.slot(options.get("slot_bytes", 4096)) if due else None
        if slot is not None:
            slot.buffer[:4] = step.to_bytes(4, "little")
            if options.get("in_a_cycle"):
                ring = [slot]
                ring.append(ring)
            worker.staged(slot, generation=seat.generation, step=step, index="{}", durable=False)
    for line in filter(None, [options.get("say"), f"step {step}"]):
        print(line)
    if options.get("unfinished"):
        return
    worker.phase(RankPhase.FINISHING)
    worker.finished(options["steps"], (1, 2))

def train_beside_copies(worker, seat):
    # Saves after each step, beside the next one; the state is the number of its last update.
    state, computed = bytearray(4), threading.Event()
    for step in range(1, seat.job["steps"] + 1):
        worker.phase(RankPhase.FORWARD)
        late = seat.job["beside"] == "is late" and step == 2
        if not late:
            computed.set()
        if seat.job["beside"] != "forgets":
            worker.await_copied()
        if late:
            computed.set()
            assert worker._staging.ends(20)
        state[:] = step.to_bytes(4, "little")
        worker.step_done(step, loss=1.0 / step, grad_norm=1.0, tokens=8, seconds=0.005)
        computed = threading.Event()
        def copy(buffer, computed=computed):
            assert computed.wait(20)
            buffer[:4] = state
        last = step == seat.job["steps"]
        if last:
            computed.set()
        slot, seal = worker.slot(4096), lambda buffer: "{}"
        worker.stage(slot, copy, seal, step=step, durable=False, overlap=not last)
    worker.finished(step, (1, 2))

def train_or_swallow(worker, seat):
    try:
        (train_beside_copies if "beside" in seat.job else train)(worker, seat)
    except Aborted:
        if not seat.job.get("swallow"):
            raise

def rehearse():
    print("rehearsed", flush=True)
    Path("rehearsed").touch()

def prepare(ahead, check):
    Path("prepared").write_text(ahead.cache_dir)
    if ahead.job.get("prepare_fails"):
        raise OSError("no such data")
    while ahead.job.get("prepare_waits"):
        check()
        time.sleep(0.005)
    if text := ahead.job.get("tokenise"):
        from trainer.data import open_tokens
        from trainer.tokenizer import open_tokenizer
        open_tokens(text, open_tokenizer(None, 1280), ahead.cache_dir, check)

sys.exit(serve(train_or_swallow, rehearse, prepare))
"""


class Agent:
    """The agent's end of one rank.

    Args:
        folder: the rank's memory, beacon and working directory.
        seated: whether its seat lies there before it begins.
        wanted: whether it is made for a seat, which may come later than it begins.
        descriptor: the lowest number that its socket may have.
    """

    def __init__(
        self, folder: Path, *, seated: bool = False, wanted: bool = False, descriptor: int = 0
    ) -> None:
        self.folder = folder
        create(folder / "beacon")
        self.control, theirs = socket.socketpair()
        if descriptor:
            with theirs:
                theirs = socket.socket(fileno=fcntl.fcntl(theirs, fcntl.F_DUPFD, descriptor))
        self.control.settimeout(20)
        if seated:
            self.seat(steps=3)
        environment = dict(
            os.environ,
            **{
                CONTROL_FD_VARIABLE: str(theirs.fileno()),
                BEACON_VARIABLE: str(folder / "beacon"),
                MEMORY_VARIABLE: str(folder),
            },
        )
        if not wanted:
            environment[STAND_BY_VARIABLE] = "1"
        self.rank = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=environment,
            pass_fds=(theirs.fileno(),),
            cwd=folder,
        )
        theirs.close()
        self.beacon = BeaconReader(folder / "beacon")
        self.framer = Framer()
        self.heard: list[FromRank] = []

    def send(self, message: ToRank) -> None:
        self.control.sendall(frame(message))

    def seat(
        self,
        generation: int = 1,
        *,
        rank: int = 0,
        log: str = "",
        abort_within_s: float = 1.0,
        save_within_s: float = 60.0,
        **job: object,
    ) -> None:
        self.send(
            Seat(
                generation=Generation(generation),
                rank=Rank(rank),
                world_size=2,
                local_rank=0,
                node=NodeId("node-0"),
                run_id="r",
                job={"steps": 1_000_000, **job},
                free_slots=(0, 1),
                log=log,
                abort_within_s=abort_within_s,
                save_within_s=save_within_s,
            )
        )

    def hear(self, kind: type[M]) -> M:
        """Wait for the next message of a kind, at most the socket's timeout each."""
        while True:
            for index, message in enumerate(self.heard):
                if isinstance(message, kind):
                    del self.heard[: index + 1]
                    return message
            data = self.control.recv(1 << 16)
            assert data, f"the rank left before it said {kind.__name__}"
            self.heard += [read_from_rank(body) for body in self.framer.feed(data)]

    def until_waiting(self, within_s: float = 20) -> None:
        """Wait until the process waits for a seat."""
        deadline = time.monotonic() + within_s
        while self.beacon.read().phase is not RankPhase.WAITING:
            assert time.monotonic() < deadline, f"{self.beacon.read()} after {within_s} s"
            time.sleep(0.01)

    def close(self) -> None:
        self.rank.kill()
        self.rank.wait(10)
        self.control.close()
        self.beacon.close()
