"""What a checkpoint belongs to: a run, a model, and a place in its data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from orchestrator.protocol.ramp import Change, Ramp
from orchestrator.worker import MisconfiguredError
from storage import shard
from trainer.mixing import Mixture


class Cursor(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a run stands in its data, and what that number of samples is counted in.

    Columns with an entry for each source are empty if there is only one: its offset is `samples`.
    """

    samples: int
    """Samples consumed."""
    seed: int
    """Of the permutations."""
    seq_len: int
    global_batch: int
    data: str
    """Digest of all tokens."""
    ramp_tokens: list[int] = []
    ramp_batches: list[int] = []
    """Samples of a step once so many tokens were trained on."""
    length_tokens: list[int] = []
    lengths: list[int] = []
    """Tokens of a sample, likewise."""
    shuffle: bool = True
    sources: list[str] = []
    digests: list[str] = []
    """Of the tokens of each source."""
    weights: list[float] = []
    offsets: list[int] = []
    """Samples consumed of each source, over all epochs."""

    def after(self, steps: int) -> Cursor:
        """Return the cursor after so many steps: it follows from their number."""
        batches = zip(self.ramp_tokens, self.ramp_batches, strict=True)
        lengths = zip(self.length_tokens, self.lengths, strict=True)
        changes = [Change(tokens, batch=batch) for tokens, batch in batches]
        changes += [Change(tokens, length=length) for tokens, length in lengths]
        samples = Ramp(self.global_batch, self.seq_len, changes).consumed(steps)
        offsets = list(Mixture(self.weights).offsets(samples)) if self.weights else []
        return msgspec.structs.replace(self, samples=samples, offsets=offsets)


class Stamp(NamedTuple):
    """What a checkpoint of this generation belongs to."""

    run_id: str
    model: str
    """Fingerprint of the sizes."""
    generation: int
    start: Cursor
    """Of a run that has not begun."""

    def cursor(self, step: int) -> Cursor:
        """Return where the run stands in its data after `step` steps."""
        return self.start.after(step)

    def require_run(self, index: shard.ShardIndex) -> str:
        """Refuse a shard of another run, model or data set; return which it is, in words.

        Raises:
            MisconfiguredError: naming the first thing that differs.
        """
        where = f"{shard.describe(index)} of run {index.run_id}"
        elsewhere = "choose another folder for this run's checkpoints"
        require_same("run", index.run_id, self.run_id, where, elsewhere)
        changed = "sizes, initFrom and continueFrom must not change within a run"
        require_same("model", index.model, self.model, where, changed)
        require_same_data(self.cursor(index.step), index.extra, where)
        return where


def require_same(what: str, found: object, expected: object, where: str, hint: str) -> None:
    """Refuse a checkpoint of which something is not what it is here. Raises MisconfiguredError."""
    if found != expected:
        raise MisconfiguredError(
            f"checkpoint's {what} is {found}, expected {expected}: {where}", hint=hint
        )


def require_same_data(cursor: Cursor, found: Mapping[str, object], where: str) -> None:
    """Refuse a checkpoint whose run stood elsewhere in its data.

    Args:
        cursor: where this run stands after as many steps.
        found: where that one stood, as builtins.
        where: which checkpoint it is, in words.

    Raises:
        MisconfiguredError: naming the first thing that differs.
    """
    expected = msgspec.to_builtins(cursor)
    for name in dict.fromkeys([*expected, *found]):
        value = expected.get(name)
        if found.get(name) != value:
            raise MisconfiguredError(
                f"checkpoint's {name} is {found.get(name)}, expected {value}: {where}",
                hint="data and its weights, seed, seqLen and globalBatch must not change "
                "within a run",
            )
