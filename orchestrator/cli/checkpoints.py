"""What a run could be continued from: checkpoints of the durable tier, and copies in memory."""

from __future__ import annotations

from orchestrator.cli.tables import Column, Kind, Row, span, text
from orchestrator.core.records import Committed
from orchestrator.core.state import RunState
from orchestrator.core.trust import why_not
from orchestrator.protocol.ids import Rank, Step
from orchestrator.worlds.folder import RunFolder


def checkpoint_rows(state: RunState, folder: RunFolder) -> list[Row]:
    """Return what the run could be continued from, newest first: durable tier and memory.

    When a run has ended, its nodes have given their memory back.
    """
    del folder
    durable = [
        {
            "name": f"step-{commit.step}",
            "step": commit.step,
            "tier": "durable",
            "state": condition(state, commit),
            "shards": state.shard_count(),
            "copies": 1,
            "epoch": commit.epoch,
            "age_s": round(state.now - commit.at, 6),
            "key": commit.key,
            "why": commit.rejected or why_untrusted(state, commit) or _why_expired(state, commit),
        }
        for commit in state.commits
    ]
    memory = [
        {
            "name": f"step-{step}",
            "step": step,
            "tier": "memory",
            "state": "Whole" if _has_every_shard(state, step) else "Partial",
            "shards": len(counts),
            "copies": min(counts),
            "epoch": None,
            "age_s": None,
            "key": "",
            "why": "",
        }
        for step in ([] if state.phase.final else state.holdings)
        if (counts := copies(state, step))
    ]
    return sorted(durable + memory, key=lambda row: (-int(str(row["step"])), str(row["tier"])))


def _has_every_shard(state: RunState, step: Step) -> bool:
    """Whether there is a copy of each, whichever replica staged it."""
    counts = state.holdings.of(step).count_R(state.unfit).tolist()
    held = {state.shard_of(Rank(rank)) for rank, count in enumerate(counts) if count}
    return len(held) == state.shard_count()


def condition(state: RunState, commit: Committed) -> str:
    """Return the condition of a checkpoint of the durable tier in one word."""
    if commit.rejected:
        return "Rejected"
    if why_untrusted(state, commit):
        return "Untrusted"
    return "Expired" if _why_expired(state, commit) else "Committed"


def why_untrusted(state: RunState, commit: Committed) -> str:
    """Say that a checkpoint came after a silent corruption; "" if none is known to have been."""
    return why_not(state.onsets, commit.step, commit.epoch)


def _why_expired(state: RunState, commit: Committed) -> str:
    """Say that a checkpoint is too old to have been kept; the journal does not see deletions."""
    keep, every = state.run.spec.checkpoint.keep_last, state.run.spec.checkpoint.keep_every_steps
    sound = sorted(
        (c.step, c.epoch) for c in state.commits if not (c.rejected or why_untrusted(state, c))
    )
    older = (commit.step, commit.epoch) < min(sound[-keep:], default=(0, 0))
    if not older or (every and commit.step % every == 0):
        return ""
    return f"older than the newest {keep} (spec.checkpoint.keepLast), kept as an anchor at most"


def copies(state: RunState, step: Step) -> list[int]:
    """Return, for each rank whose shard of a step is in memory anywhere, on how many nodes."""
    counts = state.holdings.of(step).count_R(state.unfit).tolist()
    return [count for count in counts if count]


CHECKPOINT = Kind(
    "checkpoint",
    (
        Column("NAME", "name"),
        Column("TIER", "tier"),
        Column("STATE", "state"),
        Column("SHARDS", "shards"),
        Column("COPIES (min)", "copies"),
        Column("AGE (s)", "age_s", span),
        Column("EPOCH (generation)", "epoch", text, wide=True),
        Column("KEY", "key", text, wide=True),
        Column("WHY", "why", text, wide=True),
    ),
    checkpoint_rows,
)
