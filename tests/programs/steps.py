"""A trainer without torch: its steps are naps, its collectives nothing.

Its state is three numbers: how many steps it has, which shard it is, which generation saved it.

`options` of the job: steps, step_s, save_every, durable_every, and ways to misbehave: refuse,
garbage, spawn, stubborn, raise_at, linger_s, nap_at and nap_s, gate_at and gate, restore_s,
await_persisted, replay_every (steps between two that ranks say to have come out the same when they
were computed once more), busy (blocks to hash in a step), busier_rank and busier (how many times as
many), stuck_rank and stuck_in (a phase), lockstep (a folder where all ranks wait for each other in
every step) and pairs (one where each waits for its neighbour first).
"""

import atexit
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.protocol.digests import Taken
from orchestrator.protocol.ids import Step
from orchestrator.worker import JobAhead, MisconfiguredError, RankPhase, Seat, Worker, serve
from storage.shard import Chunk, ShardMeta, decode_index, encode_index, open_views, plan, seal

_PLAN = plan(
    [Chunk(fqn="w", state="param", dtype="I64", shape=(64,), global_shape=(64,), offset=(0,))]
)


STUCK_AT = 12
_BLOCK = bytes(1 << 20)


def main() -> int:
    return serve(train, rehearse, prepare)


def rehearse() -> None:
    print(f"rehearsed by {os.getpid()}", flush=True)
    if os.environ.get("STEPS_DIE_PARKED"):
        sys.exit(9)


def prepare(ahead: JobAhead, _check: Callable[[], None]) -> None:
    print(f"prepared {ahead.cache_dir} by {os.getpid()}", flush=True)


def warm_up() -> None:
    if text := os.environ.get("STEPS_CAN_NOT_IMPORT"):
        raise ImportError(text)


def train(worker: Worker, seat: Seat) -> None:
    options = seat.job["trainer"]["options"]
    print(f"pid {os.getpid()} generation {seat.generation} rank {seat.rank}", flush=True)
    if options.get("refuse"):
        raise MisconfiguredError("vocabulary is 10, expected 20", hint="choose another tokenizer")
    _form(worker, seat, options)
    step = _restored(worker, seat)
    worker.reached("restored")
    _misbehave(options)
    while step < options["steps"]:
        step += 1
        begun = time.monotonic()
        worker.phase(RankPhase.FORWARD)
        # Like a collective that can not be interrupted: nothing is heard meanwhile.
        napping = step == options.get("nap_at")
        time.sleep(options["nap_s"] if napping else options.get("step_s", 0.005))
        while step == options.get("gate_at") and not Path(options["gate"]).exists():
            worker.check()
            time.sleep(0.001)
        if step == options.get("raise_at"):
            raise ArithmeticError(f"step {step} does not work out")
        busy_s = time.thread_time()
        compute_s = _compute(seat, options)
        busy_s = time.thread_time() - busy_s if compute_s else 0.0
        if seat.rank == options.get("stuck_rank") and seat.generation == 1 and step == STUCK_AT:
            worker.phase(RankPhase[options["stuck_in"]])
            threading.Event().wait()  # a loader that waits for itself, a collective never entered
        _keep_step(worker, seat, step, options)
        _replay(worker, step, options)
        seconds = time.monotonic() - begun if compute_s else 0.005
        worker.step_done(
            step,
            loss=1.0 / step,
            grad_norm=1.0,
            tokens=8,
            seconds=seconds,
            compute_s=compute_s,
            busy_s=busy_s,
        )
        if step < options["steps"]:
            _save_if_due(worker, seat, step)
    # Here, not in the loop: a rank that was restored behind the last step still owes that save.
    _save_if_due(worker, seat, step)
    if options.get("await_persisted"):
        assert worker.await_persisted(step, 10)
    worker.finished(step, (step, _shard(seat)))


def _shard(seat: Seat) -> int:
    """Replicas repeat each other's shards, however many there are."""
    return seat.rank % _shards(seat)


def _shards(seat: Seat) -> int:
    return int(seat.job.get("parallelism", {}).get("dpShard", seat.world_size))


def _compute(seat: Seat, options: dict[str, Any]) -> float:
    """Compute for real, and return for how long; one rank may have more to do than it says."""
    begun = time.monotonic()
    more = options.get("busier", 1) if seat.rank == options.get("busier_rank") else 1
    for _ in range(options.get("busy", 0) * more):
        hashlib.sha256(_BLOCK).digest()
    return time.monotonic() - begun if options.get("busy") else 0.0


def _replay(worker: Worker, step: int, options: dict[str, Any]) -> None:
    """Say that another rank's work came out the same here, in some steps."""
    if step % options.get("replay_every", 1 << 30) == 0:
        worker.digested(Taken(step=Step(step), shift=1), {})


def _form(worker: Worker, seat: Seat, options: dict[str, Any]) -> None:
    if seat.rank == 0:
        worker.offer(f"127.0.0.1:{20_000 + seat.generation}")
    worker.rendezvous(30)
    if options.get("pairs"):
        worker.in_groups([_pair(seat)])
    worker.reached("formed")


def _keep_step(worker: Worker, seat: Seat, step: int, options: dict[str, Any]) -> None:
    """Wait for the neighbour, and then for everybody, if that is wanted."""
    if pairs := options.get("pairs"):
        with worker.waiting(_pair(seat)):
            _await_others(worker, seat, step, Path(pairs), _neighbours(seat))
    if lockstep := options.get("lockstep"):
        with worker.waiting():
            _await_others(worker, seat, step, Path(lockstep), range(seat.world_size))


def _neighbours(seat: Seat) -> range:
    first = seat.rank // 2 * 2
    return range(first, first + 2)


def _pair(seat: Seat) -> str:
    return f"pair@{_neighbours(seat).start}"


def _await_others(worker: Worker, seat: Seat, step: int, folder: Path, ranks: range) -> None:
    """Be held up by the slowest rank, as by a collective; a rank that is told to leaves."""
    mine = folder / f"{seat.generation}.{seat.rank}"
    mine.write_text(str(step))
    while True:
        worker.check()
        files = [folder / f"{seat.generation}.{rank}" for rank in ranks]
        # A file that is being replaced reads as empty for a moment.
        steps = [int(file.read_text() or 0) if file.exists() else 0 for file in files]
        if min(steps) >= step:
            return
        time.sleep(0.001)


def _misbehave(options: dict[str, Any]) -> None:
    if options.get("garbage"):
        os.write(int(os.environ["HOLDFAST_CONTROL_FD"]), b"\x05\x00\x00\x00hello")
    if options.get("spawn"):
        nap = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print("child", nap.pid, flush=True)
        # An orphan in a session of its own: nobody waits for it but whoever adopts it.
        script = "import os; os.fork() or (os.setsid(), print('stray', os.getpid(), flush=True))"
        subprocess.run([sys.executable, "-c", script], check=True)
    if options.get("linger_s"):
        atexit.register(time.sleep, options["linger_s"])
    if options.get("stubborn"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def _restored(worker: Worker, seat: Seat) -> int:
    if seat.restore is None:
        return 0
    worker.phase(RankPhase.RESTORING)
    time.sleep(seat.job["trainer"]["options"].get("restore_s", 0))
    index = decode_index(seat.restore.index.encode(), staged=True)
    words = open_views(index, worker.restore_view(seat.restore))["param/w"].cast("q")
    assert words[0] == seat.restore.step, (words[0], seat.restore.step)
    assert words[1] == _shard(seat)
    print(f"restored generation {seat.generation} step {words[0]} of {words[2]}", flush=True)
    return seat.restore.step


def _save_if_due(worker: Worker, seat: Seat, step: int) -> None:
    options = seat.job["trainer"]["options"]
    durable = step % options.get("durable_every", 1 << 30) == 0
    if durable or step % options.get("save_every", 1 << 30) == 0:
        _save(worker, seat, step, durable=durable)


def _save(worker: Worker, seat: Seat, step: int, *, durable: bool) -> None:
    slot = worker.slot(_PLAN.size)
    while slot is None:
        if step < seat.job["trainer"]["options"]["steps"]:
            return
        # The last one is what the run is for.
        worker.phase(RankPhase.FINISHING)
        time.sleep(0.01)
        slot = worker.slot(_PLAN.size)
    words = _PLAN.views(slot.buffer)["param/w"].cast("q")
    words[0], words[1], words[2] = step, _shard(seat), seat.generation
    meta = ShardMeta(
        run_id=seat.run_id,
        model="steps",
        step=step,
        epoch=seat.generation,
        shard=_shard(seat),
        shards=_shards(seat),
    )
    index = encode_index(seal(_PLAN, slot.buffer, meta)).decode()
    worker.staged(slot, generation=seat.generation, step=step, index=index, durable=durable)
