"""What came of a trial: was it effective, was it noticed, when, and who was named.

The ground truth is a twin, which took the same steps from the same state without the fault. A
trial counts only if it left a trace there: a bit that flips in a number that is overwritten before
anybody reads it does not exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from orchestrator.campaign.baselines import Seen, flagged
from orchestrator.campaign.catalogue import Blame, Group, Trial
from orchestrator.protocol.ids import Rank
from orchestrator.protocol.injections import Injection
from orchestrator.protocol.messages import StateDiverged

Count = Annotated[int, msgspec.Meta(ge=0)]
Named = Literal["exact", "among others", "wrong", "nobody"]
"""Whether the culprit was named: alone and as proven, as one of several or without proof, or
another one was."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one trial."""

    number: int
    name: str
    group: Group
    site: str = ""
    form: str = ""
    trainer_seed: int | None = None
    """Of the trajectory that it struck; None of a whole run."""
    snapshot: int = 0
    """Which of its states that was, 0 the earlier."""
    effective: bool
    noticed: bool = False
    """Whether a detector did, within the horizon."""
    crashed: bool = False
    """Whether ranks raised something and were gone before one did. A run would be begun again, and
    nobody would know that anything was wrong: it counts as if it had been missed."""
    latency: int | None = None
    """Steps whose bad result moved the weights before it was noticed, 0 for none."""
    seconds: float | None = None
    """Of a whole run: from the fault until it was noticed."""
    named: Named = "nobody"
    evidence: str = ""
    unharmed: bool = False
    """Whether the ranks went on with the bits of the twin, with nobody coming to their help."""
    harmful: bool | None = None
    """Whether it would have done harm if nobody had looked; None if that was not looked at."""
    loss_gap: float | None = None
    """What it would have been off by then, in multiples of the largest gap between two clean runs;
    None, as of `weight_gap`, if it is not finite, or was not looked at."""
    weight_gap: float | None = None
    baselines: dict[str, int | None] = {}
    """Of each, the same steps that it took; None if it noticed nothing."""
    steps: Count = 0
    """That were watched."""
    expected: Blame = ""
    """Of a slow rank: what makes it slow."""
    verdict: Blame = ""
    """And what it was said to be."""
    accused: Count = 0
    """Of a run with a slow rank: how often a device was said to be slow."""
    rightly: Count = 0
    """And how often it was that of the rank which had a slow one."""
    false_kills: Count = 0
    """Of a run that is a trial: how often it was begun again for nothing."""
    alarms: tuple[str, ...] = ()
    """What detectors said of its steps before the fault was let loose, or of a fault that had left
    no trace, but for bits of the culprit that had changed in the meantime."""


class Watched(msgspec.Struct, kw_only=True):
    """What came of a trial while it was under way."""

    steps: list[Seen] = []
    found: list[StateDiverged] = []
    """What the detectors said."""
    thrown: list[int] = []
    """Steps that ranks threw away, once the injection had changed something."""
    refused: list[str] = []
    """Of each rank, why it did not go on from bytes of a checkpoint; "" if it did."""
    crash: str = ""
    """What ended the world, if anything did."""


def onset(twin: Sequence[Seen], steps: Sequence[Seen]) -> int | None:
    """Return the first step after which a rank had other bits than in the twin; None if none."""
    for clean, dirty in zip(twin, steps, strict=False):
        if not _same(clean, dirty):
            return dirty.of_ranks[0].step
    return None


def judged(
    trial: Trial, *, before: Sequence[Seen], twin: Sequence[Seen], watched: Watched
) -> Result:
    """Return what came of a trial.

    Args:
        trial: what it was.
        before: the steps that led to the snapshot.
        twin: the steps after it without the fault, at least as many.
        watched: those with it, and what was said of them.
    """
    how, steps, refused = trial.injection, watched.steps, watched.refused
    assert how is not None
    first = before[-1].of_ranks[0].step + 1
    began = _began(how, onset(twin, steps), first, watched)
    base = Result(
        number=trial.number,
        name=trial.name,
        group=trial.group,
        trainer_seed=trial.trainer_seed,
        snapshot=trial.snapshot,
        site=how.site,
        form=how.form,
        effective=began is not None or bool(watched.crash),
        steps=len(steps),
        alarms=tuple(
            fact.evidence
            for fact in watched.found
            if is_early(how, before, fact)
            or (began is None and not watched.crash and not _was_there(how, steps, fact))
        ),
    )
    if any(refused):
        ranks = tuple(Rank(rank) for rank, why in enumerate(refused) if why)
        evidence = next(filter(None, refused))
        named = _named(ranks, how.rank, proven=True)
        return msgspec.structs.replace(
            base, noticed=True, latency=0, named=named, evidence=evidence
        )
    if began is None:
        return _crashed(base, watched)
    told, rules = _told_in_time(trial, began, watched.found), _rules(before, steps, began)
    if not told:
        return _crashed(msgspec.structs.replace(base, baselines=rules), watched)
    # Several detectors may speak up between two looks, each in its own way.
    fact = told[0]
    accused = [_named(each.ranks, how.rank, proven=True) for each in told if each.proven]
    return msgspec.structs.replace(
        base,
        noticed=True,
        latency=fact.step + 1 - began,
        # Who is right once and then accuses somebody else has not named the culprit.
        named="wrong" if "wrong" in accused else _named(fact.ranks, how.rank, proven=fact.proven),
        evidence=fact.evidence,
        unharmed=_same(twin[len(steps) - 1], steps[-1]) if steps else False,
        baselines=rules,
    )


def _told_in_time(trial: Trial, began: int, found: Sequence[StateDiverged]) -> list[StateDiverged]:
    """Return what was said within the horizon, of the earliest step first."""
    told = [fact for fact in found if 0 <= fact.step + 1 - began < trial.horizon]
    return sorted(told, key=lambda fact: fact.step)


def _rules(before: Sequence[Seen], steps: Sequence[Seen], began: int) -> dict[str, int | None]:
    """Return after how many wrong steps each baseline speaks up; None if it does not."""
    clean = [step for step in steps if step.of_ranks[0].step < began]
    wrong = flagged([*before, *clean], steps[len(clean) :])
    return {name: None if at is None else at - began + 1 for name, at in wrong.items()}


def _crashed(result: Result, watched: Watched) -> Result:
    if not watched.crash:
        return result
    return msgspec.structs.replace(
        result, crashed=True, evidence=f"the world broke: {watched.crash}"
    )


def is_early(how: Injection, before: Sequence[Seen], fact: StateDiverged) -> bool:
    """Whether something was said of a step before the fault was let loose: a false alarm.

    Bytes of a checkpoint are struck before the first step.
    """
    taken = 0 if how.site in ("staged", "copied") else how.step - 1
    return fact.step < before[-1].of_ranks[0].step + taken


def _was_there(how: Injection, steps: Sequence[Seen], fact: StateDiverged) -> bool:
    """Whether what was said of a fault that left no trace was so: other things are said of nothing.

    The sign of a zero is another bit in memory, and gone as soon as something is added to it.
    """
    rows = [row for seen in steps for row in seen.of_ranks if row.step <= fact.step + 1]
    return tuple(fact.ranks) == (how.rank,) and any(row.struck for row in rows)


def _same(clean: Seen, dirty: Seen) -> bool:
    pairs = zip(clean.of_ranks, dirty.of_ranks, strict=True)
    return all(one.state == other.state for one, other in pairs)


def _began(how: Injection, differs: int | None, first: int, watched: Watched) -> int | None:
    """Return the first step that was wrong, also of faults that leave no trace in the state.

    Those are: bytes that nobody goes on from, digests that are wrong themselves, and steps that
    were thrown away before they moved anything.
    """
    if any(watched.refused):
        return first
    loose = first - 1 + how.step
    if how.site == "digest" and any(row.struck for seen in watched.steps for row in seen.of_ranks):
        return loose
    thrown = [step for step in watched.thrown if step >= loose]
    return min([*thrown, *([differs] if differs is not None else [])], default=None)


def _named(ranks: Sequence[Rank], culprit: Rank, *, proven: bool) -> Named:
    if not ranks:
        return "nobody"
    if culprit not in ranks:
        return "wrong"
    return "exact" if proven and tuple(ranks) == (culprit,) else "among others"
