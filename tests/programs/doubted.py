"""Three replicas train, and a step comes to wrong numbers, in each of some ways.

    python -m tests.programs.doubted FOLDER CUT SIZE WAY...

A replica is SIZE ranks, that of the dimension CUT, or of each of several that a comma parts; the
one that is wrong is in the first.

Each rank leaves FOLDER/RANK.json: of each way, losses of all steps as exact text, which steps
were looked at again, who was said to be wrong, which detectors were said to be off, and in which
steps it said that what it computed for another rank came out the same.
"""

import contextlib
import itertools
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.protocol import runfile
from orchestrator.protocol.digests import Kind, Taken
from orchestrator.protocol.layout import Layout
from orchestrator.worker import RankPhase
from tests.programs import forked
from trainer import digest, gradients, parallel, processors, readings, strikes, train
from trainer.config import ModelConfig
from trainer.data import Batch, Samples, Tokens
from trainer.prefetch import Prefetch
from trainer.reporter import Unheard
from trainer.shares import Place, slices
from trainer.step import Training

NUMBERS = itertools.count(1)
REPLICAS, WRONG = 3, 1
STEPS, AT = 8, 6
"""Of steps before, there are enough to be compared with."""
CONFIG = ModelConfig(dim=16, layers=1, heads=2, kv_heads=2, ffn_dim=16, vocab=16)
STAGED = ModelConfig(dim=16, layers=4, heads=2, kv_heads=2, ffn_dim=16, vocab=16)
TOKENS = Tokens(np.arange(2048, dtype=np.uint32) * 7 % 16, "d16e57000000", 63)
JOB = runfile.Trainer(steps=STEPS, seq_len=8, global_batch=6, warmup_steps=1, micro_batch=1)
OWN = JOB.global_batch // REPLICAS
"""Micro-batches of a rank."""
LOOKING = runfile.Detection(digest_share=1.0, replay_share=0.001, norm_share=1.0)
"""Replays that are due never come."""
REPLAYING = runfile.Detection(digest_share=1.0, replay_share=1.0, norm_share=1.0)
"""They come in every step."""
BLIND = runfile.Detection(digest_share=0.0, replay_share=0.0)
UNKNOWN = runfile.Detection(
    digest_share=1.0, replay_share=1.0, norm_share=1.0, replays_on_gpus=True
)
"""As on GPUs."""
UNDIGESTED = runfile.Detection(digest_share=0.0, replay_share=1.0)
INTERLEAVED = {"pipeline_schedule": "interleaved"}
WAYS: dict[str, dict[str, Any]] = {
    "nothing looks": {"detection": BLIND},
    "nothing stands out": {},
    "deterministic": {"job": {"reduction": "deterministic"}},
    "huge once": {"factor": 1e6, "ranks": {WRONG}},
    "no number once": {"factor": math.nan, "ranks": {WRONG}, "at": 3},
    "huge once, deterministic": {
        "factor": 1e6,
        "ranks": {WRONG},
        "job": {"reduction": "deterministic"},
    },
    "huge always": {"factor": 1e6, "ranks": set(range(REPLICAS)), "always": True},
    "huge once, between turns": {"factor": 1e6, "ranks": {WRONG}, "turns": 4},
    "huge always, between turns": {
        "factor": 1e6,
        "ranks": set(range(REPLICAS)),
        "always": True,
        "turns": 4,
    },
    "huge always, and nothing looks": {
        "factor": 1e6,
        "ranks": set(range(REPLICAS)),
        "always": True,
        "detection": BLIND,
    },
    "always replayed": {"detection": REPLAYING},
    "always replayed, and nothing digested": {"detection": UNDIGESTED},
    "a little off once, and replayed": {
        "factor": 1.001,
        "ranks": {WRONG},
        "call": OWN,
        "detection": REPLAYING,
    },
    "a low bit once, and replayed": {
        "low bit": "attention.wo",
        "ranks": {WRONG},
        "detection": REPLAYING,
    },
    "the first stage, forward": {"slips": "forward", "ranks": {0}, "detection": REPLAYING},
    "the last stage, forward": {"slips": "forward", "ranks": {WRONG}, "detection": REPLAYING},
    "the first stage, back": {"slips": "back", "ranks": {0}, "detection": REPLAYING},
    "the last stage, back": {"slips": "back", "ranks": {WRONG}, "detection": REPLAYING},
    "interleaved": {"job": INTERLEAVED, "detection": REPLAYING},
    "interleaved, the last stage, back": {
        "slips": "back",
        "ranks": {WRONG},
        "job": INTERLEAVED,
        "detection": REPLAYING,
    },
    "interleaved, and nothing looks": {"job": INTERLEAVED, "detection": BLIND},
    "deterministic, and nothing looks": {
        "job": {"reduction": "deterministic"},
        "detection": BLIND,
    },
    "deterministic, the first stage, forward": {
        "slips": "forward",
        "ranks": {0},
        "job": {"reduction": "deterministic"},
        "detection": REPLAYING,
    },
    "other tokens once": {"tokens": "once", "ranks": {WRONG}},
    "other tokens on its disk": {"tokens": "always", "ranks": {WRONG}},
    "tokens that can not be read again": {"tokens": "no", "ranks": {WRONG}},
    "a wrong sum once": {"sums": 1},
    "a wrong sum once, deterministic": {"sums": 1, "job": {"reduction": "deterministic"}},
    "sums that are wrong in other ways": {"sums": 100, "factor_each": 4.0},
    "sums that stay far off": {"sums": 100},
    "sums that stay wrong": {"sums": 100, "off_by": 1e-4},
    "sums that stay wrong, and nothing looks": {"sums": 100, "off_by": 1e-4, "detection": BLIND},
    "blind": {"blind": True},
    "other bits each time": {"chance": True},
    "other bits on each rank": {"own_bits": True, "detection": REPLAYING},
    "raises when computed once more": {"factor": 1e6, "ranks": {WRONG}, "raises": "forward"},
    "raises on the way back": {"factor": 1e6, "ranks": {WRONG}, "raises": "backward"},
    "raises on the way back, deterministic": {
        "factor": 1e6,
        "ranks": {WRONG},
        "raises": "backward",
        "job": {"reduction": "deterministic"},
    },
    "huge once, and nothing looks": {"factor": 1e6, "ranks": {WRONG}, "detection": BLIND},
    "huge once, deterministic, and nothing looks": {
        "factor": 1e6,
        "ranks": {WRONG},
        "job": {"reduction": "deterministic"},
        "detection": BLIND,
    },
    "huge once, read ahead": {"factor": 1e6, "ranks": {WRONG}, "ahead": True},
    "another processor": {"processor": True, "detection": REPLAYING},
    "not known to repeat": {"unknown": True},
    "not known to repeat, a little off once": {
        "unknown": True,
        "factor": 1.001,
        "ranks": {WRONG},
        "call": OWN,
    },
    "not known to repeat, a little off again and again": {
        "unknown": True,
        "factor": 1.001,
        "ranks": {WRONG},
        "call": OWN,
        "steps": {3, 5, 7},
    },
    "not known to repeat, others off each time": {
        "unknown": True,
        "factor": 1.001,
        "ranks": {3: 0, 5: 1, 7: 2},
        "call": OWN,
        "steps": {3, 5, 7},
    },
    "not known to repeat, other kernels on a rank": {
        "unknown": True,
        "factor": 1.001,
        "ranks": {WRONG},
        "always": True,
        "at": 2,
    },
    "not known to repeat, other kernels later on": {
        "unknown": True,
        "factor": 1.001,
        "ranks": {WRONG},
        "always": True,
    },
    "not known to repeat, other bits each time": {"unknown": True, "chance": True},
    "not known to repeat, and not asked for": {"unknown": True, "detection": REPLAYING},
    "blind when tested": {"blind_at": 2, "factor": 1e6, "ranks": {WRONG}},
    "always wrong from the test on": {
        "factor": 1.001,
        "ranks": {WRONG},
        "always": True,
        "at": 2,
        "detection": REPLAYING,
    },
    "always wrong at first": {
        "factor": 1e6,
        "ranks": {WRONG},
        "call": "first",
        "detection": REPLAYING,
    },
}


class WaitsError(Exception):
    """A rank waits for orders."""


class Raising(torch.autograd.Function):
    """Passes on, and raises on the way back."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # noqa: ARG004 - the signature of torch
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:  # noqa: ARG004 - the same
        raise RuntimeError("no second time")


class Heard(Unheard):
    def __init__(self) -> None:
        self.losses: list[str] = []
        self.again: list[int] = []
        self.diverged_: list[Any] = []
        self.off: list[tuple[str, str]] = []
        self.thrown: list[tuple[int, str]] = []
        self.replayed: list[int] = []
        self.waits = 0

    def phase(self, phase: RankPhase, *, micro_batch: int = 0) -> None:
        if phase is RankPhase.WAITING:
            raise WaitsError

    def digested(self, taken: Taken, digests: dict[Kind, int]) -> None:
        del digests
        if taken.shift:
            self.replayed.append(taken.step)

    def looked_again(self, step: int, *, because: str) -> None:
        self.again.append(step)

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
        self.diverged_.append([step, since, list(ranks), proven, evidence, *["data"] * of_data])

    def threw_away(self, step: int, *, because: str) -> None:
        self.thrown.append((step, because))

    def detector_failed(self, detector: str, reason: str) -> None:
        self.off.append((detector, reason))

    def step_done(self, step: int, *, loss: float, grad_norm: float, **_: object) -> None:
        self.losses.append(f"{step} {loss.hex()} {grad_norm.hex()}")


class Loss:
    """The loss of a training; of one step a wrong one, the first time or every time."""

    def __init__(self, training: Training, rank: int, way: dict[str, Any]) -> None:
        self._real, self._way, self._rank = training.loss, way, rank
        self.step, self._calls = 0, 0
        self._first = torch.empty(0)
        """Targets of the first micro-batch of a step."""

    def begin(self, step: int) -> None:
        self.step, self._calls = step, 0

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        self._calls += 1
        if self._calls == 1:
            self._first = targets.clone()
        loss, way = self._real(logits, targets), self._way
        if self.step not in way.get("steps", {way.get("at", AT)}) or "factor" not in way:
            return loss
        if way.get("raises") and self._rank == 0 and self._calls > OWN:
            if way["raises"] == "backward":
                return Raising.apply(loss)  # type: ignore[no-any-return, no-untyped-call]
            raise RuntimeError("no second time")
        call = way.get("call", 1)
        called = torch.equal(targets, self._first) if call == "first" else self._calls == call
        ranks = way["ranks"]
        here = ranks[self.step] == self._rank if isinstance(ranks, dict) else self._rank in ranks
        wrong = here and (way.get("always") or called)
        return loss * way["factor"] if wrong else loss


class Slip:
    """A layer that is wrong once: in what it computes, or on the way back."""

    def __init__(self, stage: nn.Module, way: dict[str, Any], loss: Loss) -> None:
        self._way, self._loss, self._calls, self._step = way, loss, 0, 0
        layers = stage.get_submodule("layers").children()
        next(layers).register_forward_hook(lambda _, __, out: self._slip(out))

    def _slip(self, out: Tensor) -> Tensor:
        if self._loss.step != self._step:
            self._step, self._calls = self._loss.step, 0
        self._calls += 1
        if self._step == AT and self._calls == OWN:
            if self._way["slips"] == "forward":
                return out * 1.001
            out.register_hook(lambda gradient: gradient * 1.001)
        return out


class LowBit:
    """A product that is wrong once, by a bit that is rounded away before any gradient shows it."""

    def __init__(self, model: nn.Module, layer: str, loss: Loss) -> None:
        self._loss, self._calls, self._step = loss, 0, 0
        last = [module for name, module in model.named_modules() if name.endswith(layer)][-1]
        last.register_forward_hook(lambda _, __, out: self._strike(out.data))

    def _strike(self, out: Tensor) -> None:
        if self._loss.step != self._step:
            self._step, self._calls = self._loss.step, 0
        self._calls += 1
        if self._step == AT and self._calls == OWN:
            flat = out.view(-1)
            flat.view(torch.int32)[flat.abs().argmin()] ^= 1


def go_wrong(stage: nn.Module, way: dict[str, Any], loss: Loss) -> None:
    """Have layers of this rank be wrong once, if that is the way."""
    if "slips" in way:
        Slip(stage, way, loss)
    if "low bit" in way:
        LowBit(stage, way["low bit"], loss)


class OtherTokens:
    """Samples of which a rank is handed other ones than it should be, or none to look at."""

    def __init__(self, samples: Samples, loss: Loss, how: str) -> None:
        self._samples, self._loss, self._how, self._struck = samples, loss, how, False
        self.mark = samples.mark

    def batch(self, step: int, indices: range) -> Batch:
        batch = self._samples.batch(step, indices)
        if step != AT or self._struck:
            return batch
        if self._how == "no":
            raise OSError("no data")
        self._struck = self._how == "once"
        return batch._replace(inputs=batch.inputs[:, ::-1].copy())


def deliver_wrong(training: Training, loss: Loss, way: dict[str, Any]) -> None:
    """Have one number of the gradient be another one on all ranks alike, so many times."""
    real, left = training.optimizer.set_gradients, [way["sums"]]
    each, first = way.get("factor_each", 1.0), way.get("off_by", 1e-3)
    off = itertools.accumulate(itertools.repeat(each), lambda by, each: by * each, initial=first)

    def arrived(gradients: list[Tensor]) -> Tensor:
        if loss.step == AT and left[0]:
            left[0] -= 1
            gradients[0].view(-1)[0] += next(off)
        return real(gradients)

    training.optimizer.set_gradients = arrived  # type: ignore[method-assign]


def other_each_time(*args: Any) -> Tensor:
    return digest.digest(*args) + next(NUMBERS)


def bits_of(rank: int, *args: Any) -> Tensor:
    return digest.digest(*args) + rank


def taken(name: str, world: parallel.World) -> dict[str, Any]:
    if not WAYS[name].get("unknown"):
        return took(name, world)
    with (
        mock.patch.object(processors, "known_to_repeat", return_value=False),
        mock.patch.object(strikes, "ODDS", REPLICAS**2),  # so that three are proof
    ):
        return took(name, world)


def took(name: str, world: parallel.World) -> dict[str, Any]:
    way = WAYS[name]
    own = {field: getattr(JOB, field) for field in JOB.__struct_fields__}
    # Each rank has as many micro-batches, whatever the layout.
    own["global_batch"] *= world.layout.dp_shard
    job = runfile.Trainer(**own | way.get("job", {}))
    detection = way.get("detection", UNKNOWN if way.get("unknown") else LOOKING)
    config = STAGED if world.layout.pp > 1 else CONFIG
    training = Training(job, config, Samples(TOKENS, job), world, detection=detection)
    heard, loss = Heard(), Loss(training, world.rank, way)
    training.loss = loss
    if world.rank in way.get("ranks", ()):
        go_wrong(training.stages[-1], way, loss)
    if world.rank in way.get("ranks", ()) and "tokens" in way:
        other: Any = OtherTokens(training.samples, loss, way["tokens"])
        assert training._replays is not None
        if way["tokens"] != "no":
            training.samples = other
        if way["tokens"] != "once":
            training._replays.ring.samples = other
    if "sums" in way:
        deliver_wrong(training, loss, way)
    if training._replays is not None:
        training._replays.pace.fixed = True  # how busy the machine is does not matter here
        if "turns" in way:
            training._replays.turns.every = way["turns"]
    place = Place(world.position.dp_replicate, REPLICAS, 0, 1)
    ahead = slices(job, place, range(1, STEPS + 1)) if way.get("ahead") else ()
    with Prefetch(training.samples, ahead, 2, lambda: None, 30.0) as read_ahead:
        if ahead:
            training.samples = read_ahead
        try:
            take(training, heard, loss, way, world.rank)
        except WaitsError:
            heard.waits += 1
    return vars(heard)


def take(training: Training, heard: Heard, loss: Loss, way: dict[str, Any], rank: int) -> None:
    """Take all steps."""
    for step in range(1, STEPS + 1):
        loss.begin(step)
        blind = way.get("blind") and step == AT and rank == WRONG
        broken: Any = mock.patch.object(
            gradients, "local", side_effect=RuntimeError("no norm today")
        )
        other: Any = mock.patch.object(gradients, "digest", other_each_time)
        no_digest: Any = mock.patch.object(gradients, "digest", side_effect=OSError("no digest"))
        with contextlib.ExitStack() as wrong:
            if blind:
                wrong.enter_context(broken)
            if way.get("chance"):
                wrong.enter_context(other)
            if way.get("own_bits") and step >= AT:
                own: Any = mock.patch.object(gradients, "digest", partial(bits_of, rank))
                wrong.enter_context(own)
            if way.get("blind_at") == step and rank == WRONG:
                wrong.enter_context(no_digest)
            if way.get("processor") and rank == WRONG:
                wrong.enter_context(mock.patch.object(processors, "kind", return_value="another"))
            training.step(step, heard)


def main(folder: Path, cut: str, size: int, ways: Sequence[str]) -> int:
    train.warm_up()
    readings.WITHIN_S = 60.0  # how busy the machine is does not matter here
    layout = Layout(dp_replicate=REPLICAS)._replace(**dict.fromkeys(cut.split(","), size))
    return forked.conduct(folder, layout, lambda world: {way: taken(way, world) for way in ways})


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]))
