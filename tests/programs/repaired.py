"""Three replicas train, and the state of one goes bad in each of some ways.

    python -m tests.programs.repaired FOLDER CUT SIZE WAY...

A replica is SIZE ranks, that of the dimension CUT; the rank that goes bad is in the second.

Each rank leaves FOLDER/RANK.json: of each way, losses of all steps as exact text, a fingerprint of
the state that it ends with, what was repaired, and what was not and why.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from orchestrator.protocol import runfile
from orchestrator.protocol.layout import Layout
from orchestrator.worker import RankPhase
from tests.programs import forked
from tests.programs.doubted import (
    CONFIG,
    JOB,
    REPLICAS,
    STAGED,
    TOKENS,
    WaitsError,
)
from trainer import hold, parallel, readings, repair, train, updates
from trainer.data import Samples
from trainer.injected import flip_bit
from trainer.prefetch import Prefetch
from trainer.reporter import Unheard
from trainer.shares import Place, slices
from trainer.step import Training

STEPS, AT = 6, 4
BAD = 1
"""The replica that goes bad, in its first rank."""
LOOKING = runfile.Detection(digest_share=1.0, replay_share=0.001)
REPLAYING = runfile.Detection(digest_share=1.0, replay_share=1.0)
WITHOUT_REPLAYS = runfile.Detection(digest_share=1.0, replay_share=0.0)
IN_PARTS = runfile.Detection(digest_share=0.65, replay_share=0.0)
"""In a step a fourth of the state is looked at."""
DETERMINISTIC = {"job": {"reduction": "deterministic"}}
LENGTH = 16
"""Of samples: enough for all of the state to be looked at in a step, if it may take that long."""
RAMP = {"batch_ramp": (runfile.BatchChange(tokens=(AT - 1) * 6 * LENGTH, global_batch=12),)}
"""The batch is another one from step AT on."""
UPDATING = runfile.Detection(digest_share=0.0, replay_share=0.0, update_share=1.0)
"""All of them are updated twice in one of three steps, or of two."""
UPDATE = 6
"""A step in which one of two, and of three, is."""
WAYS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "nothing, deterministic": DETERMINISTIC,
    "a weight": {"flips": {AT: "weights"}},
    "a weight, and replayed": {"flips": {AT: "weights"}, "detection": REPLAYING},
    "a weight while it computes": {"flips": {AT: "weights"}, "late": True},
    "a weight, deterministic": {"flips": {AT: "weights"}, "detection": REPLAYING} | DETERMINISTIC,
    "a weight, read ahead": {"flips": {AT: "weights"}, "detection": WITHOUT_REPLAYS},
    "a moment": {"flips": {AT: "exp_avg"}},
    "the other moment": {"flips": {AT: "exp_avg_sq"}},
    "in the first step, in parts": {"flips": {1: "weights"}, "detection": IN_PARTS},
    "later, in parts": {"flips": {2: "weights"}, "detection": IN_PARTS},
    "the sum of gradients": {"gradient": True},
    "a digest": {"digest": True},
    "the count of steps": {"counter": True},
    "of one rank twice": {"flips": {AT: "weights", AT + 1: "exp_avg"}},
    "of two ranks at once": {"flips": {AT: "weights"}, "both": True},
    "an update, and nothing is compared": {"update": True, "detection": UPDATING},
    "digests of all, one after the other": {"every": True, "mistaken": True},
    "digests of all, whoever looks": {"every": True, "mistaken": True, "looks": True},
    "right after a restore": {"flips": {AT: "weights"}, "forgets": True},
    "nothing, with a ramp": {"job": RAMP, "detection": WITHOUT_REPLAYS},
    "right after a ramp": {"flips": {AT: "weights"}, "job": RAMP, "detection": WITHOUT_REPLAYS},
    "dies of it": {"flips": {AT: "weights"}, "dies": True},
    "what it was given": {"flips": {AT: "weights"}, "deaf": True},
}


class Heard(Unheard):
    def __init__(self) -> None:
        self.losses: list[str] = []
        self.repairs: list[Any] = []
        self.refused: list[Any] = []
        self.begun: list[Any] = []
        self.broken = ""
        self.accused: list[Any] = []
        self.off: list[Any] = []
        self.state = ""

    def phase(self, phase: RankPhase, *, micro_batch: int = 0) -> None:
        if phase is RankPhase.WAITING:
            raise WaitsError

    def repaired(
        self, step: int, *, rank: int, source: int, tensors: Sequence[str], seconds: float
    ) -> None:
        assert (seconds > 0) is (rank != source)
        self.repairs.append([step, rank, source, list(tensors)])

    def repairing(self, step: int, *, rank: int, source: int, tensors: Sequence[str]) -> None:
        self.begun.append([step, rank, source, list(tensors)])

    def not_repaired(self, step: int, *, because: str) -> None:
        self.refused.append([step, because])

    def detector_failed(self, detector: str, reason: str) -> None:
        self.off.append([detector, reason])

    def diverged(self, step: int, **told: object) -> None:
        self.accused.append([step, told])

    def step_done(self, step: int, *, loss: float, grad_norm: float, **_: object) -> None:
        self.losses.append(f"{step} {loss.hex()} {grad_norm.hex()}")


class Bad:
    """What goes bad in one rank, and when: in step AT unless `flips` says otherwise."""

    def __init__(self, training: Training, way: dict[str, Any]) -> None:
        self._training, self._way, self.step = training, way, 0
        self._left = dict(way.get("flips", {}))
        self._undo = contextlib.ExitStack()
        for name in ("late", "gradient", "digest", "counter", "update", "deaf", "mistaken", "dies"):
            if way.get(name):
                getattr(self, f"_{name}")()

    def begin(self, step: int) -> None:
        self.step = step
        if not self._way.get("late"):
            self._strike()

    def close(self) -> None:
        self._undo.close()

    def _strike(self) -> None:
        kind = self._left.pop(self.step, None)
        if kind is not None:
            held = next(each for each in self._training.state() if each.kind == kind)
            # Two ranks that go bad do so in different ways.
            flip_bit(held.tensors[2][1], self._training.world.rank, 22)

    def _instead(self, owner: Any, name: str, other: Callable[..., Any]) -> None:
        self._undo.enter_context(mock.patch.object(owner, name, other))

    def _late(self) -> None:
        real = self._training.loss

        def computed(*args: Tensor) -> Tensor:
            self._strike()
            return real(*args)

        self._instead(self._training, "loss", computed)

    def _gradient(self) -> None:
        real, left = self._training.optimizer.set_gradients, [AT]

        def arrived(gradients: list[Tensor]) -> Tensor:
            if self.step in left:
                left.clear()
                flip_bit(gradients[0], 3, 20)
            return real(gradients)

        self._instead(self._training.optimizer, "set_gradients", arrived)

    def _digest(self) -> None:
        real, left = self._training._digest, [AT]

        def looked(*args: Any, **named: Any) -> Any:
            found = real(*args, **named)
            if self.step in left:
                left.clear()
                found["weights"] = found["weights"] + 1
            return found

        self._instead(self._training, "_digest", looked)

    def _mistaken(self) -> None:
        """Have digests be wrong once: in step 3 of the first rank, then of the next one."""
        wrong = [AT - 1 + self._training.world.rank]
        own, whole, anew = self._training._digest, repair.digest, self._training._begin_anew

        def looked(*args: Any, **named: Any) -> Any:
            found = own(*args, **named)
            if self.step in wrong:
                found["weights"] = found["weights"] + 1
            return found

        def begun_anew() -> None:
            wrong.clear() if self.step in wrong else None
            anew()

        self._instead(self._training, "_digest", looked)
        self._instead(self._training, "_begin_anew", begun_anew)
        if self._way.get("looks"):
            self._instead(repair, "digest", lambda *args: whole(*args) + int(self.step in wrong))

    def _dies(self) -> None:
        self._instead(dist, "broadcast", lambda *_, **__: os._exit(7))

    def _counter(self) -> None:
        optimizer = self._training.optimizer
        real = optimizer.step

        def moved(number: int, grad_norm: float) -> None:
            if number == AT - 1:
                optimizer.set_steps(number + 5)
            real(number, grad_norm)

        self._instead(optimizer, "step", moved)

    def _update(self) -> None:
        optimizer = self._training.optimizer
        real = optimizer.step

        def moved(number: int, grad_norm: float) -> None:
            real(number, grad_norm)
            if number == UPDATE:
                flip_bit(optimizer.shards[2].param, 5, 20)

        self._instead(optimizer, "step", moved)

    def _deaf(self) -> None:
        """Have what it was given go bad at once."""
        real = self._training.optimizer.set_steps

        def counted(steps: int) -> None:
            real(steps)
            flip_bit(self._training.state()[0].tensors[2][1], 5, 22)

        self._instead(self._training.optimizer, "set_steps", counted)


def taken(name: str, world: parallel.World) -> dict[str, Any]:
    way = WAYS[name]
    own = {field: getattr(JOB, field) for field in JOB.__struct_fields__}
    own |= {"global_batch": own["global_batch"] * world.layout.dp_shard, "seq_len": LENGTH}
    job = runfile.Trainer(**own | way.get("job", {}))
    config = STAGED if world.layout.pp > 1 else CONFIG
    detection = way.get("detection", LOOKING)
    training = Training(job, config, Samples(TOKENS, job), world, detection=detection)
    if training._replays is not None:
        training._replays.pace.fixed = True  # how busy the machine is does not matter here
    first = BAD * world.layout.shard_count
    bad = way.get("every") or world.rank in ((first, 0) if way.get("both") else (first,))
    gone = Bad(training, way) if bad else None
    heard = Heard()
    at, shards = world.position, world.layout.dp_shard
    place = Place(at.dp_replicate, REPLICAS, at.dp_shard, shards)
    ahead = slices(job, place, range(1, STEPS + 1))
    with (
        contextlib.suppress(WaitsError),
        Prefetch(training.samples, ahead, 2, lambda: None, 30.0) as training.samples,
    ):
        for step in range(1, STEPS + 1):
            if gone is not None:
                gone.begin(step)
            if step == AT and way.get("forgets") and training.repairs is not None:
                training.repairs.forget()
            try:
                training.step(step, heard)
            except RuntimeError as error:
                if not way.get("dies"):
                    raise
                heard.broken = str(error)
                break
    if gone is not None:
        gone.close()
    total = xxhash.xxh3_64()
    for tensor in itertools.chain.from_iterable(shard[2:] for shard in training.optimizer.shards):
        total.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
    heard.state = total.hexdigest()
    return vars(heard)


def main(folder: Path, cut: str, size: int, ways: Sequence[str]) -> int:
    train.warm_up()
    updates.FLOPS_PER_WORD["cpu"] = 500.0  # else not one of the few steps would have its turn
    readings.WITHIN_S = 60.0  # how busy the machine is does not matter here
    hold.HOLD_S = 0.0
    layout = Layout(dp_replicate=REPLICAS)._replace(**{cut: size})
    return forked.conduct(folder, layout, lambda world: {way: taken(way, world) for way in ways})


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]))
