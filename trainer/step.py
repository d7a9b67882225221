"""An optimizer step: a sharded model, its optimizer, and who hears how they get on."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from orchestrator.protocol import runfile
from orchestrator.protocol.digests import SHARED, Kind, Taken
from orchestrator.protocol.ids import Step
from orchestrator.protocol.ramp import Ramp, Stage, at_stage
from orchestrator.worker import MisconfiguredError, RankPhase
from trainer import apply, parallel, readings, sums, tensor, waiting
from trainer.aside import Aside
from trainer.config import ModelConfig
from trainer.data import Batch, Batches, settings
from trainer.digest import fuse
from trainer.documents import pairs, sent
from trainer.flops import train_flops
from trainer.guard import Guard
from trainer.hold import Hold
from trainer.injected import Injected
from trainer.metrics import Figures
from trainer.model import Llama
from trainer.optim import Optimizer, global_norm, learning_rate
from trainer.pipeline import Micro, Pipeline
from trainer.reduction import Reduction
from trainer.repair import Repairs
from trainer.replay import halves
from trainer.replays import COSTS, Replays
from trainer.reporter import Reporter
from trainer.shares import share_of
from trainer.turns import Turns
from trainer.updates import Pace as UpdatesPace
from trainer.updates import Updates
from trainer.watch import Held, Watch, period_of, read


class Word(NamedTuple):
    """What a rank says to all others in a step: small whole numbers, which come back as they were.

    Attributes:
        ready: how well it could save its state after this step.
        memory: after how many steps it was told to save to memory; 0 for no word of that.
        durable: the same of the durable tier.
    """

    ready: int = 0
    memory: int = 0
    durable: int = 0


WORD_AT = 2
"""Where what a rank says begins in what it sends to all: behind a sum of squares and a mark."""
OFF_AT = WORD_AT + len(Word._fields)
"""And behind that, whether it digests nothing any more; then doubts, digests and losses."""
DIGESTING_AT = OFF_AT + 1
"""What digesting takes it (trainer.turns)."""
CLAIM_AT = DIGESTING_AT + 1
"""Whether it has something against its own device (trainer.updates)."""
DOUBT_AT = CLAIM_AT + 1
"""What it says of its own numbers in this step (trainer.doubts), and what such looks cost it."""
COSTS_AT = DOUBT_AT + 1
READ_AT = COSTS_AT + COSTS
"""And which samples it was handed, and another one should have been (trainer.readings)."""
SUMS_AT = READ_AT + readings.WORDS
"""And what the gradient adds up to, before ranks added up and after (trainer.sums)."""
DIGESTS_AT = SUMS_AT + sums.WORDS
GRADIENT_AT = DIGESTS_AT + 2 * SHARED.index("gradient")
LOSSES_AT = DIGESTS_AT + 2 * len(SHARED)
UNWATCHED = runfile.Detection(digest_share=0.0, replay_share=0.0, update_share=0.0)
"""Looks for nothing."""


class Training:
    """A sharded model, its optimizer, and the steps that they take.

    Args:
        job: what to train.
        samples: what to train on.
        world: with whom.
        empty: leave the weights without values, for a restore to fill in.
        note: hears what each step came to, on every rank.
        detection: how much of a step's time goes into looking for wrong state; default none.
        watched: whether there are replays in every step, if there are any at all.
    """

    def __init__(  # noqa: PLR0913 - what a training is made of
        self,
        job: runfile.Trainer,
        config: ModelConfig,
        samples: Batches,
        world: parallel.World,
        *,
        empty: bool = False,
        note: Callable[[Figures], None] = lambda _: None,
        detection: runfile.Detection = UNWATCHED,
        watched: bool = False,
    ) -> None:
        self.job, self.samples, self.world = job, samples, world
        self.config, self._note = config, note
        self._hold = Hold(world.layout.shards().tolist())
        with torch.device("meta"):
            model = Llama(config)
        # Whole and on the CPU: weights then depend neither on sharding nor on the device. Memory
        # that nobody has written to does not exist yet, so an empty model costs next to nothing.
        model.to_empty(device="cpu")
        if not empty:
            model.init_weights(job.seed)
        self._ramp = Ramp.of(job)
        self.warm = False
        """Whether it has taken a step of the present shapes."""
        self.stage = self._ramp.stage(1)
        """What the present step is of."""
        self._share(self.stage)
        self.stages = apply.to_model(model, world, job)
        """The model, or of a pipeline what this rank has of it."""
        self.loss = apply.loss_function(job, world)
        self.optimizer = Optimizer(self.stages, job)
        self.pipeline: Pipeline | None = None
        if world.layout.pp > 1:
            compute = apply.precision(job, world.device)
            self.pipeline = Pipeline(self.stages, world, job, compute)
        self._flops = 0.0
        self._waited = waiting.count()
        self._nothing = torch.zeros((), dtype=torch.int64, device=world.device)
        self._not_shown = halves(self._nothing.repeat(len(SHARED)))
        self.injected = Injected(self.stages, samples)
        self._guard, self._fusing = Guard("digests"), Guard("digests in one pass")
        self._watch: Watch | None = None
        self.repairs: Repairs | None = None
        self.until_copied: Callable[[], float] = _at_once
        """Called right before anything writes to the state: waits for whoever copies it for a save,
        and returns for how many seconds. What evaluates or replays only reads it."""
        self._held_up_s = 0.0
        self._samples_anew, self._anew = samples, False
        """What to read a step from that is begun anew: what was read ahead of it is used up."""
        self._aside = Aside()
        """Reads that: apart from what is read for others, which may not come."""
        if detection.digest_share and world.layout.dp_replicate > 1:
            self._watch = self._watch_of(detection.digest_share)
            if detection.repair:
                of_state = GRADIENT_AT - DIGESTS_AT
                self.repairs = Repairs(self, self._watch.period, of_state, self._guard)
        self._updates: Updates | None = None
        if share := detection.update_share:
            whole = sum(shard.param.numel() for shard in self.optimizer.shards)
            pace = UpdatesPace.of(share, self._flops_each, world.device.type, whole)
            self._updates = Updates(self.optimizer, pace, world.rank)
        self._replays: Replays | None = None
        if detection.replay_share and world.layout.readers > 1:
            self._replays = Replays(
                self,
                samples,
                detection.replay_share,
                detection.norm_share,
                watched=watched,
                untested=detection.replays_on_gpus,
            )

    def step(self, step: int, reporter: Reporter, say: Callable[[], Word] = Word) -> list[Word]:
        """Take optimizer step `step` (1-based) together with the other ranks, and report it.

        Args:
            step: its number.
            reporter: who hears of it.
            say: returns what this rank has to say; called when its gradients are computed.

        Returns:
            What each rank said; every rank gets the same answer.
        """
        begun, waited_s = time.monotonic(), self._waited.seconds
        spent_s = time.thread_time()
        self._waited.counter = reporter
        self._held_up_s = 0.0
        self._strike(step)
        if (now := self._ramp.stage(step)) != self.stage:
            self._share(now)
            if self._replays is not None:
                self._replays.doubts.forget()
                self._replays.readings.forget()
        self._announce(reporter, RankPhase.DATA)
        self._fuse_digests(reporter)
        if self.repairs is not None:
            self.repairs.begin(step)
        word: Word | None = None
        while True:
            losses, gradients = self._sound_gradients(step, reporter)
            word = word or say()
            self._announce(reporter, RankPhase.OPTIMIZER)
            rows, digests = self._exchange(step, word, losses, gradients, reporter)
            told = [None if row[OFF_AT] else row[DIGESTS_AT:LOSSES_AT] for row in rows]
            if self.repairs is not None and self.repairs.differ(step, told, reporter):
                self._begin_anew()
                continue
            # Every rank adds the same numbers in the same way: they report, and clip by, equal
            # bits, and are in doubt about the same steps.
            loss = math.fsum(loss for row in rows for loss in row[LOSSES_AT:]) / self.tokens
            replica = self.world.layout.ranks_of(replica=0)
            grad_norm = global_norm(rows[rank][0] for rank in replica)
            if not self._is_thrown_away(step, rows, loss, grad_norm, reporter):
                break
        self._anew = False
        if self._updates is not None:
            self._updates.agree([row[CLAIM_AT] for row in rows], reporter)
        self._say_what_was_found(step, digests, reporter)
        if self._watch is not None:
            self._hold(told, lambda: self._announce(reporter, RankPhase.OPTIMIZER))
        self.before_write()
        self._move(step, grad_norm, reporter)
        # Without what saves held it up for, which counts as a stall.
        seconds = time.monotonic() - begun - self._held_up_s
        busy_s = time.thread_time() - spent_s
        if self.warm:
            self._count(step, rows, seconds, busy_s)
        self.warm = True
        rate = learning_rate(step, self.job)
        self._note(Figures(step, loss, grad_norm, rate, self.tokens, seconds, self._flops))
        reporter.step_done(
            step,
            loss=loss,
            grad_norm=grad_norm,
            tokens=self.tokens,
            seconds=seconds,
            compute_s=self._computed_s(seconds - (self._waited.seconds - waited_s)),
            busy_s=self._busy_s(busy_s),
            work=self._flops,
        )
        return [Word(*map(int, row[WORD_AT:OFF_AT])) for row in rows]

    def _fuse_digests(self, reporter: Reporter) -> None:
        """Compile digests with all else that is compiled in a first step, which may take its time.

        They are slower where that fails, and the same.
        """
        looks = self._watch is not None or self._replays is not None
        if self.warm or not looks or not apply.compiles(self.job, self.world.device):
            return
        types = {torch.float32, apply.precision(self.job, self.world.device)}
        self._fusing.call(lambda: fuse(self.world.device, types), None)
        self._fusing.tell(reporter)

    def _say_what_was_found(
        self, step: int, digests: dict[Kind, Tensor], reporter: Reporter
    ) -> None:
        """Report what a step is about to move, and whether other ranks came to it, too."""
        replayed = 0
        if self._replays is not None:
            self._replays.done()
            replayed = self._replays.passed
        if (self._watch is not None and self._watch.due(step)) or replayed:
            period = self._watch.period(step) if self._watch is not None else 1
            self._report(Taken(step=Step(step), period=period, shift=replayed), digests, reporter)

    def _count(self, step: int, rows: list[list[float]], seconds: float, spent_s: float) -> None:
        """Hear what a step took, and what ranks said that looking takes: it keeps to its share."""
        if self._watch is not None:
            self._watch.agree(step, [row[DIGESTING_AT] for row in rows])
            self._watch.turns.stepped(spent_s)
        if self._replays is not None:
            self._replays.agree([row[COSTS_AT:READ_AT] for row in rows])
            self._replays.stepped(seconds, spent_s)

    def _strike(self, step: int) -> None:
        """Have happen to the state what a fault plan says, which is a write like others."""
        if self.injected.is_due(step):
            self.before_write()
        self.injected.strike(step, self._held())

    def before_write(self) -> None:
        """Have whoever copies the state be done with it; for whoever is about to write to it."""
        self._held_up_s += self.until_copied()

    def _move(self, step: int, grad_norm: float, reporter: Reporter) -> None:
        """Have the optimizer move the weights, and look at a part of that."""
        updates = self._updates
        if updates is not None:
            updates.before(step)
        self.optimizer.step(step, grad_norm)
        if updates is not None:
            updates.after(step, grad_norm, reporter)

    def _exchange(
        self, step: int, word: Word, losses: Tensor, gradients: list[Tensor], reporter: Reporter
    ) -> tuple[list[list[float]], dict[Kind, Tensor]]:
        """Return what each rank has to tell of a step, and the digests of this rank's state."""
        squares = self.optimizer.set_gradients(gradients)
        held = list(self._held(gradients))
        self.injected.strike(step, held[-1:])
        digests = self._digest(step, held)
        words = (0.0,) * (DIGESTS_AT - DOUBT_AT)
        if self._replays is not None:
            # Of another rank: a disk may be slow.
            words = self._replays.words(
                step, gradients, lambda: self._announce(reporter, RankPhase.DATA)
            )
            self._announce(reporter, RankPhase.OPTIMIZER)
        digesting = self._watch.turns.word() if self._watch is not None else 0.0
        claim = self._updates.word() if self._updates is not None else 0.0
        own_words = [self.samples.mark, *word, self._guard.off, digesting, claim, *words]
        said = torch.tensor(own_words, dtype=torch.float64)
        shown = self._not_shown
        if digests:
            shown = halves(torch.stack([digests.get(k, self._nothing) for k in SHARED]))
        own = torch.cat((squares.view(1), self._sent(said), shown, losses))
        # On a GPU, this is where the host waits for the step, and the only place.
        rows = self.world.gather(own)
        self._require_same_data([row[1] for row in rows])
        return rows, digests

    def _is_thrown_away(
        self,
        step: int,
        rows: list[list[float]],
        loss: float,
        grad_norm: float,
        reporter: Reporter,
    ) -> bool:
        """Have other ranks look at a step, at its samples and at what stands out in it."""
        if self._replays is None:
            return False
        read = [row[READ_AT:SUMS_AT] for row in rows]
        if self._replays.readings.differ(step, read, reporter):
            return True
        added = [row[SUMS_AT:DIGESTS_AT] for row in rows]
        if self._replays.sums.differ(step, added, reporter):
            return True
        words = [row[DOUBT_AT] for row in rows]
        return self._replays.doubts.differ(step, words, loss, grad_norm, reporter)

    def _computed_s(self, seconds: float) -> float:
        """Return for how long this rank computed, 0 for not known: a GPU waits by itself."""
        return max(seconds, 0.0) if self.world.device.type == "cpu" else 0.0

    def _busy_s(self, seconds: float) -> float:
        """Return what computing took of the processor, of what this thread took; 0 for not known.

        A wait for peers takes next to nothing. Threads that torch has beside this one may spin for
        work that they do not have, so that nobody knows what computing took.
        """
        alone = self.world.device.type == "cpu" and torch.get_num_threads() == 1
        return seconds if alone else 0.0

    def _sound_gradients(self, step: int, reporter: Reporter) -> tuple[Tensor, list[Tensor]]:
        """Return losses and gradients of a step in which nothing was found wrong so far."""
        losses, gradients = self._gradients(step, reporter)
        while self._replays is not None and self._replays.differ(step, reporter, self._mended):
            # Thrown away before it moved anything; of a device that is wrong at times, it may
            # come out well now.
            losses, gradients = self._gradients(step, reporter)
        return losses, gradients

    def _mended(self, step: int, reporter: Reporter) -> bool:
        """Return whether ranks had other state, which is repaired: then nobody computed wrongly."""
        mended = self.repairs is not None and self.repairs.state_differs(step, reporter)
        if mended:
            self._begin_anew()
        return mended

    def _begin_anew(self) -> None:
        self._anew = True
        if self._replays is not None:
            self._replays.ring.again = True
        for stage in self.stages:
            parallel.let_go(stage)

    def _gradients(self, step: int, reporter: Reporter) -> tuple[Tensor, list[Tensor]]:
        """Return losses as `_accumulate` does, and this rank's part of the whole gradient."""
        if self._replays is not None:
            self._replays.begin(step)
        with tensor.losses(self.world.layout.tp):
            losses = self._accumulate(step, reporter)
        if self.world.position.tp != 0:
            losses.zero_()  # all ranks of tp have the same, which count once
        self._announce(reporter, RankPhase.OPTIMIZER)
        if self.reduction is not None:
            return losses, self.reduction.finish()
        return losses, self.optimizer.take_gradients()

    def settle(self) -> None:
        """Look as often as now from now on, whatever it takes."""
        if self._watch is not None:
            self._watch.turns.settle()
        if self._replays is not None:
            self._replays.turns.settle()

    def look_at_the_end(self, steps: int, reporter: Reporter) -> None:
        """Report digests of all that the run ends with, after its last step."""
        if self._updates is not None:
            self._updates.tell(reporter)
        if self._watch is not None:
            taken = Taken(step=Step(steps + 1), period=self._watch.period(steps + 1))
            self._report(taken, self._digest(steps + 1, list(self._held()), whole=True), reporter)

    def _digest(self, step: int, held: list[Held], *, whole: bool = False) -> dict[Kind, Tensor]:
        watch = self._watch
        if watch is None or not (whole or watch.due(step)):
            return {}
        return self._guard.call(lambda: watch.look(step, held, whole=whole), {})

    def _report(self, taken: Taken, digests: dict[Kind, Tensor], reporter: Reporter) -> None:
        # Of who digests nothing any more, too: others are compared without waiting for it.
        reporter.digested(taken, self._guard.call(lambda: read(digests), {}))
        self._guard.tell(reporter)

    def state(self) -> list[Held]:
        """Return this rank's part of the state."""
        return list(self._held())

    def _held(self, gradients: list[Tensor] | None = None) -> Iterator[Held]:
        """Yield this rank's part of the state, and of the gradient if it is there."""
        shards = self.optimizer.shards
        yield Held("weights", [(shard.name, shard.param) for shard in shards])
        yield Held("exp_avg", [(shard.name, shard.exp_avg) for shard in shards])
        yield Held("exp_avg_sq", [(shard.name, shard.exp_avg_sq) for shard in shards])
        if gradients is not None:
            named = zip((shard.name for shard in shards), gradients, strict=True)
            yield Held("gradient", list(named))

    def _watch_of(self, share: float) -> Watch:
        words = len(SHARED) * self.config.parameters / self.world.layout.shard_count
        device = self.world.device.type
        fused = apply.compiles(self.job, self.world.device)
        how = device if fused or device == "cpu" else f"{device}, not fused"
        period = period_of(words, self._flops_each, how, share)
        held = self._held([shard.param for shard in self.optimizer.shards])
        return Watch(held, Turns(share, period, measured=device == "cpu"))

    @property
    def _flops_each(self) -> float:
        """About how many operations a rank does in a step."""
        return 6.0 * self.config.parameters * self.tokens / self.world.layout.world_size

    def _share(self, stage: Stage) -> None:
        """Share out the global batches of a stage."""
        before, self.stage = self.stage, stage
        if (stage.length, stage.micro) != (before.length, before.micro):
            # The first step of other shapes is compiled and tuned as the very first one is.
            self.warm = False
        self.share = share_of(at_stage(self.job, stage), self.world.place)
        self.reduction: Reduction | None = None
        """What adds up gradients in a fixed order; None leaves that to FSDP."""
        if self.job.reduction == "deterministic":
            self.reduction = Reduction(self.share.rounds, self.world.twins, self.world.wait)

    def _require_same_data(self, marks: list[float]) -> None:
        others = [rank for rank, mark in enumerate(marks) if mark != marks[0]]
        if others:
            raise MisconfiguredError(
                f"spec.trainer.data is not the same text on every node: rank 0 has other tokens "
                f"than rank {', '.join(map(str, others))}",
                hint="copy it from one node to the others; the demo reads this Python's library",
            )

    @property
    def adds_up_in_place(self) -> bool:
        """Whether the micro-batches of a step are added up in the gradients of the weights."""
        return self.reduction is None and apply.precision(self.job, self.world.device) is (
            torch.float32
        )

    @property
    def tokens(self) -> int:
        """Tokens of the global batch."""
        return self.stage.batch * self.stage.length

    @property
    def parts(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Yield the name of every weight, the weight, and this rank's part of it."""
        for shard in self.optimizer.shards:
            yield shard.name, shard.weight, shard.param

    def _accumulate(self, step: int, reporter: Reporter) -> Tensor:
        """Leave the gradient of the mean loss in the model, or with what adds it up.

        Returns:
            Losses, float64, as many on every rank: their sum, or with deterministic reduction one
            by one, since only whoever has all of them can add them up without rounding twice.
        """
        if self.pipeline is not None:
            micros = [
                self._micro(step, micro, reporter) for micro in range(len(self.share.micro_batches))
            ]
            self._flops = math.fsum(map(self._flops_of, micros))
            losses = self.pipeline.step(
                micros,
                self.tokens,
                lambda phase, micro: self._announce(reporter, phase, micro),
                self._add_round if self.reduction is not None else None,
                self._replays.trace() if self._replays is not None else None,
            )
            if self._replays is not None:
                self._replays.after_pipeline(micros[-1])
            # Ranks without the last stage have none.
            nothing = self._sent(torch.zeros(()))
            if self.reduction is not None:
                return torch.stack([*losses, *[nothing] * (self.share.most - len(losses))]).double()
            return torch.stack([*losses, nothing]).double().sum().view(1)
        (model,) = self.stages
        fixed = self.reduction is not None
        losses = []
        self._flops = 0.0
        for micro in range(len(self.share.micro_batches)):
            self._announce(reporter, RankPhase.DATA, micro)
            batch = self._micro(step, micro, reporter)
            self._announce(reporter, RankPhase.FORWARD, micro)
            last = micro == len(self.share.micro_batches) - 1
            with self._following(last=last):
                loss = self.loss(model(batch.inputs, batch.cuts), batch.targets)
            self._announce(reporter, RankPhase.BACKWARD, micro)
            if self._replays is not None:
                self._replays.before(last=last)
            parallel.last_of_step(model, self.world, last=last, apart=fixed)
            torch.autograd.backward(loss / self.tokens)
            if fixed:
                self._add_round()
            losses.append(loss.detach())
            if self._replays is not None:
                self._replays.after(losses[-1], batch, last=last)
            self._flops += self._flops_of(batch)
        of_each = torch.stack(losses).double()
        if fixed:
            return torch.cat((of_each, of_each.new_zeros(self.share.most - len(losses))))
        # Exact whatever the order: a float64 has 29 bits more than a loss.
        return of_each.sum().view(1)

    def _following(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Return a block in which a micro-batch is computed forward, with who looks at that."""
        return self._replays.following(last=last) if self._replays else contextlib.nullcontext()

    def _add_round(self) -> None:
        assert self.reduction is not None
        self.reduction.add(self.optimizer.take_gradients())

    def _micro(self, step: int, number: int, reporter: Reporter) -> Micro:
        """Return a micro-batch of this rank."""
        replays, indices = self._replays, self.share.micro_batches[number]
        if self._anew if replays is None else replays.ring.again:
            samples = self._samples_anew if replays is None else replays.ring.samples
            batch = self._read_anew(samples, step, number, reporter)
        else:
            batch = self.samples.batch(step, indices)
        if replays is not None:
            replays.readings.read(batch)
        return self.micro(batch)

    def _read_anew(self, samples: Batches, step: int, number: int, reporter: Reporter) -> Batch:
        """Return a micro-batch that nobody has read ahead, showing signs of life meanwhile."""
        asked = self._aside.ask(lambda: samples.batch(step, self.share.micro_batches[number]))
        wait_s = runfile.seconds(settings(self.job.data).wait_max)
        asked.over(lambda: self._announce(reporter, RankPhase.DATA, number), wait_s)
        return asked.result()

    def micro(self, batch: Batch) -> Micro:
        """Return this rank's part of some samples, on the device."""
        size = batch.inputs.shape[1] // self.world.layout.cp
        first = self.world.position.cp * size
        inputs, targets = (
            sent(ids[:, first : first + size], self.world.device)
            for ids in (batch.inputs, batch.targets)
        )
        return Micro(inputs, targets, batch.cuts)

    def look(self, micro: Micro) -> float:
        """Return the sum of losses of some samples, 0 if other ranks have it; learn nothing."""
        if self.pipeline is not None:
            return math.fsum(map(float, self.pipeline.look(micro)))
        (model,) = self.stages
        return float(self.loss(model(micro.inputs, micro.cuts), micro.targets))

    def _flops_of(self, micro: Micro) -> float:
        """Return this rank's share of what a micro-batch takes."""
        layout = self.world.layout
        whole = train_flops(self.config, micro.inputs.numel() * layout.cp, pairs(micro.cuts))
        return whole / (layout.pp * layout.cp * layout.tp)

    def _sent(self, tensor: Tensor) -> Tensor:
        """Return it on the device, without waiting for what the device still has to do."""
        if self.world.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.world.device, non_blocking=True)

    def _announce(self, reporter: Reporter, phase: RankPhase, micro_batch: int = 0) -> None:
        # The first step allocates, and on a GPU compiles and tunes: it may take its time.
        reporter.phase(phase if self.warm else RankPhase.WARMING, micro_batch=micro_batch)


def _at_once() -> float:
    return 0.0
