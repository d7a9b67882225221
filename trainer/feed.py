"""What one rank trains on and is evaluated on in one generation, and what is told of it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec

from orchestrator.protocol import runfile
from orchestrator.protocol.ramp import Ramp
from orchestrator.protocol.steps import EVALUATIONS_FILE, EvaluationLine
from orchestrator.worker import MisconfiguredError, RankPhase, Worker
from storage import shard
from trainer.data import Batches, Samples, open_data, settings
from trainer.evaluation import Evaluation, Held, evaluate
from trainer.job import Job
from trainer.prefetch import Prefetch
from trainer.shares import Place, slices
from trainer.stamp import Cursor
from trainer.step import Training
from trainer.text import FileAccount
from trainer.tokens import Account, Tokens, account_of

CHANGED_SHOWN = 3
"""Of the files that changed, so many are named."""


class Feed:
    """The data of a generation.

    Args:
        job: what to train.
        cache_dir: where this node keeps tokens; "" keeps none.
        check: called while sources are read; may raise.

    Raises:
        MisconfiguredError: if the data can not be used as the run file wants it to be.
        SourceUnavailableError: if a source does not answer.
    """

    def __init__(self, job: Job, cache_dir: str, check: Callable[[], None]) -> None:
        self._job, self._cache_dir = job, cache_dir
        sources = open_data(job.trainer.data, job.tokenizer, cache_dir, check)
        self.samples = Samples(sources, job.trainer)
        self._held = Held(sources, job.trainer) if job.trainer.eval_every_steps else None

    def require_same(self, index: shard.ShardIndex) -> None:
        """Refuse to go on from a checkpoint of other text, and say which file has changed.

        Raises:
            MisconfiguredError: naming source and files, as far as this node can tell.
        """
        found = self.samples.sources
        digests = index.extra.get("digests")
        expected = digests if isinstance(digests, list) else [str(index.extra.get("data"))]
        if len(expected) != len(found):
            return  # other sources altogether; who compares the whole cursor says so
        for source, was in zip(found, expected, strict=True):
            if source.digest != was:
                raise MisconfiguredError(
                    f"spec.trainer.data{_of(source)} has changed since {shard.describe(index)}: "
                    f"digest of its tokens is {source.digest}, expected {was}"
                    f"{self._changes(source, str(was))}",
                    hint="put the text back as it was, or begin a new run",
                )

    def _changes(self, source: Tokens, was: str) -> str:
        """Say which files differ, if this node has read the source before it changed."""
        before = account_of(Path(self._cache_dir), was) if self._cache_dir else None
        if before is None:
            return ""
        changed = changes(before, source.account)
        more = f"; {len(changed) - CHANGED_SHOWN} more" if len(changed) > CHANGED_SHOWN else ""
        return "".join(f"; {words}" for words in changed[:CHANGED_SHOWN]) + more

    def ahead(self, steps: range, place: Place, worker: Worker) -> AbstractContextManager[Batches]:
        """Read ahead what this rank takes of some steps, for as long as the block lasts.

        Args:
            steps: their numbers.
            place: of this rank.
            worker: hears that the rank waits for data, if it does.
        """
        how = settings(self._job.trainer.data)
        if _is_first(worker):
            _say("\n".join(self.words()))
        if how.prefetch == 0:
            return contextlib.nullcontext(self.samples)
        return Prefetch(
            self.samples,
            slices(self._job.trainer, place, steps),
            how.prefetch,
            # Each is a sign of life: a rank that waits for data does not hang.
            lambda: worker.phase(RankPhase.DATA),
            runfile.seconds(how.wait_max),
        )

    def after(self, step: int, training: Training, worker: Worker) -> None:
        """Evaluate if that is due after this step, and tell what source begins again."""
        trainer = self._job.trainer
        ramp = Ramp.of(trainer)
        epochs = (self.samples.epochs(ramp.consumed(steps)) for steps in (step - 1, step))
        for source, before, now in zip(self.samples.sources, *epochs, strict=True):
            if now > before and _is_first(worker):
                _say(f"data{_of(source)}: epoch {now + 1} begins, at step {step}")
        if self._held is None or step % (trainer.eval_every_steps or step + 1):
            return
        found = evaluate(training, self._held, worker)
        if _is_first(worker):
            _say(
                f"evaluation after step {step}: loss {found.loss:.6f} over {found.samples} samples"
            )
            _note(found, step, worker)

    def words(self) -> list[str]:
        """Say what each source came to."""
        lines = []
        for source, count in zip(self.samples.sources, self.samples.counts, strict=True):
            files = source.account.files
            plural = "s" * (len(files) > 1)
            told = [
                f"{_sum(files, 'documents')} documents of {len(files)} file{plural}",
                f"{count} samples an epoch",
                f"{source.account.held} held back" if source.account.held else "",
                f"{_sum(files, 'empty')} empty" if _sum(files, "empty") else "",
                f"{_sum(files, 'bad')} bad and skipped" if _sum(files, "bad") else "",
            ]
            lines.append(f"data{_of(source)}: {', '.join(filter(None, told))}")
            lines += [f"data: skipped {words}" for words in source.account.bad_shown]
        return lines


def cursor_of(samples: Samples, job: runfile.Trainer) -> Cursor:
    """Return where a run stands in its data that has not begun."""
    several = samples.sources if len(samples.sources) > 1 else []
    start = Cursor(
        samples=0,
        seed=job.seed,
        seq_len=job.seq_len,
        global_batch=job.global_batch,
        data=samples.digest,
        ramp_tokens=[change.tokens for change in job.batch_ramp],
        ramp_batches=[change.global_batch for change in job.batch_ramp],
        length_tokens=[change.tokens for change in job.length_ramp],
        lengths=[change.seq_len for change in job.length_ramp],
        shuffle=settings(job.data).shuffle,
        sources=[source.name for source in several],
        digests=[source.digest for source in several],
        weights=[source.weight for source in several],
    )
    return start.after(0)


def _note(found: Evaluation, step: int, worker: Worker) -> None:
    """Write a line beside the log."""
    seat = worker.seat
    if seat is None or not seat.log:
        return
    line = EvaluationLine(
        generation=seat.generation,
        step=step,
        loss=found.loss,
        samples=found.samples,
        sources=found.of_sources if len(found.of_sources) > 1 else {},
    )
    # In one piece and without a buffer: a rank that is killed leaves whole lines.
    with Path(seat.log).with_name(EVALUATIONS_FILE).open("ab", buffering=0) as file:
        file.write(msgspec.json.encode(line) + b"\n")


def changes(before: Account, now: Account) -> list[str]:
    """Return which files of a source differ, what was expected, and what was found."""
    old = {file.path: file for file in before.files}
    new = {file.path: file for file in now.files}
    words = []
    for path in sorted(old.keys() | new.keys()):
        was, found = old.get(path), new.get(path)
        if was != found:
            words.append(f"{path}: {_state(found)}, expected {_state(was)}")
    return words


def _state(file: FileAccount | None) -> str:
    if file is None:
        return "no file"
    return f"{file.documents} documents with digest {file.digest}"


def _sum(files: tuple[FileAccount, ...], what: str) -> int:
    return sum(getattr(file, what) for file in files)


def _of(source: Tokens) -> str:
    return f", source {source.name}" if source.name else ""


def _is_first(worker: Worker) -> bool:
    return worker.seat is not None and worker.seat.rank == 0


def _say(words: str) -> None:
    print(words, file=sys.stderr)  # noqa: T201 - the rank's log
