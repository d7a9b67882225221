"""A rank of a campaign's world: does what the conductor orders, and says what came of it.

It takes steps with the trainer's own `Training`, and reports digests through a beacon, as a rank of
a run does. States that were remembered make trials cheap: a trial costs the steps until something
is noticed, and no start of a process.
"""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedRWPair
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch._C._distributed_c10d import FileStore

from orchestrator.protocol.digests import KINDS, NONE, Kind, Taken
from orchestrator.protocol.ids import Generation, Rank
from orchestrator.protocol.ids import Step as StepNumber
from orchestrator.protocol.injections import Injection
from orchestrator.protocol.rank import Diverged
from orchestrator.protocol.trials import (
    Drift,
    Order,
    Quiet,
    Resume,
    Return,
    Said,
    Setup,
    Step,
    StepRow,
    Train,
)
from orchestrator.worker import Aborted, RankPhase
from orchestrator.worker.beacon import BeaconWriter, DigestRecord
from storage.address import open_store
from storage.contents import read_contents
from storage.errors import StorageError
from storage.manifest import read_manifest
from trainer import hold, parallel, readings
from trainer.checkpoint import Checkpointer
from trainer.data import Batch, Batches, Samples, open_data
from trainer.job import read_job
from trainer.outliers import Outliers
from trainer.replays import Replays
from trainer.reporter import Unheard
from trainer.step import Training
from trainer.train import stamp_of
from trainer.trials import copies, drift
from trainer.trials.striking import Striking, replace, striking
from trainer.updates import Updates

TIMEOUT_S = 60.0
"""Of a collective: nobody is ever away from this world for long."""


class Voice(Unheard):
    """Hears of steps in place of a `Worker`: what is digested goes to a beacon."""

    def __init__(self, beacon: Path) -> None:
        self._beacon = BeaconWriter(beacon)
        self.generation = Generation(0)
        self.striking: Striking | None = None
        self.loss = self.grad_norm = math.nan
        self._diverged: list[Diverged] = []
        self._looked_again: list[int] = []

    def phase(self, phase: RankPhase, *, micro_batch: int = 0) -> None:
        """Leave at once if ranks wait for orders: in a run, the controller would have some.

        Raises:
            Aborted: as a worker does.
        """
        del micro_batch
        if phase is RankPhase.WAITING:
            raise Aborted("this trial is over")

    def detector_failed(self, detector: str, reason: str) -> None:
        """Fail: there is no trial of a detector that does not work."""
        raise RuntimeError(f"detector {detector} raised: {reason}")

    def diverged(
        self,
        step: int,
        *,
        since: int,
        ranks: Sequence[int],
        proven: bool,
        evidence: str,
        of_data: bool = False,
    ) -> None:
        """Keep what ranks found together until the next answer."""
        self._diverged.append(
            Diverged(
                generation=self.generation,
                step=StepNumber(step),
                since=StepNumber(since),
                ranks=tuple(map(Rank, ranks)),
                proven=proven,
                evidence=evidence,
                of_data=of_data,
            )
        )

    def threw_away(self, step: int, *, because: str) -> None:
        """Keep it like what ranks found that name nobody."""
        self.diverged(step - 1, since=step - 1, ranks=(), proven=False, evidence=because)

    def repaired(
        self, step: int, *, rank: int, source: int, tensors: Sequence[str], seconds: float
    ) -> None:
        """Keep it like what ranks found together, of who is proven to have held something else."""
        del seconds
        what = ", ".join(tensors) or "no state, after all"
        words = f"before step {step}, rank {rank} was given that of rank {source}: {what}"
        if rank == source:
            words = f"in step {step}, rank {rank} computed once more: {what}"
        self.diverged(step - 1, since=step - 1, ranks=(rank,), proven=True, evidence=words)

    def looked_again(self, step: int, *, because: str) -> None:
        """Keep that a step was in doubt until the next answer."""
        del because
        self._looked_again.append(step)

    def told(self, said: Said) -> Said:
        """Add to an answer what ranks found since the last one."""
        found, self._diverged = tuple(self._diverged), []
        steps, self._looked_again = tuple(self._looked_again), []
        return msgspec.structs.replace(said, diverged=found, looked_again=steps)

    def digested(self, taken: Taken, digests: Mapping[Kind, int]) -> None:
        """Report digests, as a worker does; or others, if that is what goes wrong."""
        values = {kind: digests.get(kind, NONE) for kind in KINDS}
        it = self.striking
        if it is not None and it.how.site == "digest" and values["weights"] and it.due():
            values["weights"] ^= 1 << it.how.bits[0]
            it.struck += 1
        self._beacon.digest(DigestRecord(self.generation, taken, tuple(values.values())))

    def step_done(  # noqa: PLR0913 - what there is to tell of a step
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        tokens: int,
        seconds: float,
        compute_s: float | None = None,
        busy_s: float = 0.0,
        work: float = 0.0,
    ) -> None:
        """Keep what a step came to."""
        del step, tokens, seconds, compute_s, busy_s, work
        self.loss, self.grad_norm = loss, grad_norm


class Garbage:
    """Samples that are no text at some steps, the same ones on whichever rank asks."""

    def __init__(self, samples: Batches, vocab: int, every: int) -> None:
        self._samples, self._vocab, self._every = samples, vocab, every

    @property
    def mark(self) -> float:
        """Of what lies on disk."""
        return self._samples.mark

    def batch(self, step: int, indices: range) -> Batch:
        """Return the samples at these indices of the global batch of `step`."""
        batch = self._samples.batch(step, indices)
        if step % self._every:
            return batch
        for row, index in enumerate(indices):
            chance = np.random.Generator(np.random.Philox(key=[step, index]))
            shape = batch.inputs.shape[1]
            batch.inputs[row] = chance.integers(self._vocab, size=shape)
            batch.targets[row] = chance.integers(self._vocab, size=shape)
        return batch


class TrialRank:
    """One rank.

    Args:
        setup: of the world.
        rank: which.
    """

    def __init__(self, setup: Setup, rank: int) -> None:
        job = read_job(setup.job, setup.world_size)
        self._world = parallel.World(rank, job.layout, parallel.device_of("cpu", 0))
        store = FileStore(setup.meeting, setup.world_size)
        self._world.join(store, TIMEOUT_S)
        sources = open_data(job.trainer.data, job.tokenizer, setup.cache_dir, lambda: None)
        self._samples = Samples(sources, job.trainer)
        self._vocab = job.config.vocab
        self._training = Training(
            job.trainer,
            job.config,
            self._samples,
            self._world,
            detection=job.detection,
        )
        # Nobody comes with orders: ranks that differ go on, and show what becomes of it.
        hold.HOLD_S = 0.0
        # What is noticed is not to depend on how busy the machine was.
        readings.WITHIN_S = TIMEOUT_S
        if (replays := _replays(self._training)) is not None:
            replays.pace.fixed = True
        self._stamp = stamp_of("campaign", Generation(1), job, self._samples)
        self._voice = Voice(Path(setup.beacons[rank]))
        self._room = Path(setup.beacons[rank]).with_suffix(".slot")
        self._rank, self._done = rank, 0
        self._snapshots: dict[int, copies.Snapshot] = {}
        self._known: dict[int, tuple[Outliers, Outliers]] = {}
        """What was usual in the steps before each."""
        self._ends: dict[int, list[drift.End]] = {}
        """What clean runs from each came to."""
        self._returned = 0
        """To which it did last."""
        self._wrong = contextlib.ExitStack()

    def carry_out(self, order: Order) -> Said:
        """Do what is ordered; return what came of it."""
        match order:
            case Train(steps=steps, snapshot=number):
                said = Said(rows=self._steps(steps))
                # Nor what is noticed after one snapshot on how long it is since the other.
                self._training.settle()
                self._snapshots[number] = copies.take(self._training, self._done)
                if (replays := _replays(self._training)) is not None:
                    self._known[number] = replays.doubts.remembered()
            case Return():
                said = self._return(order)
            case Resume():
                said = self._resume(order)
            case Step(steps=steps):
                said = Said(rows=self._steps(steps))
            case Quiet():
                said = self._quiet(order)
            case Drift():
                said = self._drift(order)
        it = self._voice.striking
        struck = it.struck if it is not None else 0
        return msgspec.structs.replace(self._voice.told(said), struck=struck)

    def _return(self, order: Return) -> Said:
        self._wrong.close()
        self._voice.striking = None
        snapshot, self._returned = self._snapshots[order.snapshot], order.snapshot
        copies.put_back(self._training, snapshot)
        self._done, self._voice.generation = snapshot.step, order.generation
        if (replays := _replays(self._training)) is not None:
            replays.forget()
            replays.doubts.remember(self._known[order.snapshot])
        if self._training.repairs is not None:
            self._training.repairs.forget()
        if (updates := _updates(self._training)) is not None:
            updates.forget()
        how = order.injection
        if how is None:
            return Said()
        if how.site in ("staged", "copied"):
            return self._reload(how)
        if how.rank == self._rank or how.site == "delivered":
            entered = striking(self._training, how, snapshot.step)
            self._voice.striking = self._wrong.enter_context(entered)
        return Said()

    def _resume(self, order: Resume) -> Said:
        store = open_store(order.store)
        manifest = read_manifest(store, order.commit)
        # What it was saved as says whose it is; who asks for it has seen to that.
        stamp = self._stamp._replace(run_id=manifest.run_id, generation=manifest.epoch)
        checkpointer = Checkpointer(self._training.optimizer.shards, self._world, stamp)
        # It may be from before the run was given other sizes.
        self._done = checkpointer.recut(store, read_contents(store, manifest))
        self._training.optimizer.set_steps(self._done)
        self._voice.generation = order.generation
        return Said()

    def _reload(self, how: Injection) -> Said:
        """Go on from bytes of a checkpoint, which may be wrong."""
        try:
            own = how if how.rank == self._rank else None
            changed = copies.reload(self._training, self._stamp, self._done, self._room, own)
        except StorageError as error:
            return Said(refused=f"{type(error).__name__}: {error}")
        if changed:
            it = Striking(self._training, how, self._done)
            it.struck = 1
            self._voice.striking = it
        return Said()

    def _steps(self, count: int) -> tuple[StepRow, ...]:
        rows: list[StepRow] = []
        with contextlib.suppress(Aborted):
            while len(rows) < count:
                rows.append(self._step())
        return tuple(rows)

    def _step(self) -> StepRow:
        self._done += 1
        it, voice = self._voice.striking, self._voice
        if it is not None:
            it.begin(self._done)
        self._training.step(self._done, voice)
        return StepRow(
            step=self._done,
            loss=voice.loss if math.isfinite(voice.loss) else None,
            grad_norm=voice.grad_norm if math.isfinite(voice.grad_norm) else None,
            weights=copies.weights(self._training),
            state=copies.everything(self._training),
            struck=it.struck if it is not None else 0,
        )

    def _quiet(self, order: Quiet) -> Said:
        self._wrong.close()
        self._voice.striking = None
        seconds = []
        with self._otherwise(order):
            for _ in range(order.steps):
                self._done += 1
                begun = time.monotonic()
                self._training.step(self._done, self._voice)
                seconds.append(time.monotonic() - begun)
                self._between(order)
        return Said(seconds=tuple(seconds))

    @contextlib.contextmanager
    def _otherwise(self, order: Quiet) -> Iterator[None]:
        """Train on other samples, and without what looks for corruption, if that is ordered."""
        training = self._training
        with contextlib.ExitStack() as undone:
            if order.garbage_every:
                # Whoever computes a micro-batch once more is given the same.
                garbage = Garbage(self._samples, self._vocab, order.garbage_every)
                undone.callback(replace(training, "samples", garbage))
                if (replays := _replays(training)) is not None:
                    undone.callback(replays.readings.forget)
                    undone.callback(replace(replays.ring, "samples", garbage))
                    replays.readings.forget()
            if not order.detectors:
                undone.enter_context(self._unwatched())
            yield

    @contextlib.contextmanager
    def _unwatched(self) -> Iterator[None]:
        """Look for nothing that is wrong."""
        with contextlib.ExitStack() as undone:
            for detector in ("_watch", "repairs", "_updates", "_replays"):
                undone.callback(replace(self._training, detector, None))
            yield

    def _drift(self, order: Drift) -> Said:
        training, it = self._training, self._voice.striking
        with contextlib.ExitStack() as undone:
            undone.enter_context(self._unwatched())
            if order.places:
                other = drift.Reordered(self._samples, training, order.places)
                undone.callback(replace(training, "samples", other))
            for _ in range(order.steps):
                self._done += 1
                if it is not None:
                    it.begin(self._done)
                training.step(self._done, self._voice)
            end = drift.end_of(training, self._samples)
        ends = self._ends.setdefault(self._returned, [])
        if order.places is None:
            return Said(gap=drift.gap(end, ends[:1]))
        ends.append(end)
        return Said(gap=drift.gap(end, ends))

    def _between(self, order: Quiet) -> None:
        if order.reload_every and self._done % order.reload_every == 0:
            copies.reload(self._training, self._stamp, self._done, self._room)
        if order.look_every and self._done % order.look_every == 0:
            with torch.no_grad():
                own = self._training.share.micro_batches[0]
                self._training.look(self._training.micro(self._samples.batch(self._done, own)))
            # As an evaluation does: whoever returns to other weights would else go on with these.
            for stage in self._training.stages:
                parallel.let_go(stage)


def _replays(training: Training) -> Replays | None:
    return training._replays  # noqa: SLF001 - trials reach into a training from outside


def _updates(training: Training) -> Updates | None:
    return training._updates  # noqa: SLF001 - the same


def serve(setup: Setup, rank: int, connection: socket.socket) -> None:
    """Be a rank until the conductor hangs up; what goes wrong is said before that."""
    encoder = msgspec.json.Encoder()
    decoder = msgspec.json.Decoder(Order)
    with connection, connection.makefile("rwb") as lines:
        try:
            own = TrialRank(setup, rank)
            _say(lines, encoder.encode(Said()))
            for line in lines:
                _say(lines, encoder.encode(own.carry_out(decoder.decode(line))))
        except Exception as error:
            _say(lines, encoder.encode(Said(broken=f"{type(error).__name__}: {error}")))
            raise


def _say(lines: BufferedRWPair, text: bytes) -> None:
    lines.write(text + b"\n")
    lines.flush()
