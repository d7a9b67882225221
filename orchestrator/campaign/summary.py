"""What all trials of a campaign come to: shares with exact intervals, by class and in all."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypedDict

import msgspec
import numpy as np

from orchestrator.campaign.baselines import BASELINES
from orchestrator.campaign.catalogue import GROUPS, Group
from orchestrator.campaign.intervals import LEVEL, clopper_pearson, of_median, of_quantile
from orchestrator.campaign.judging import Count, Result
from orchestrator.campaign.timed import WITHIN_STEPS

TIMED: tuple[Group, ...] = ("hang", "straggler")
"""What is a matter of time."""
NAMES_ONE: frozenset[Group] = frozenset(
    {"state", "persistent", "intermittent", "rare", "oneshot", "data", "detector"}
)
"""Of which one rank is the culprit, and is to be named."""
INTERVALS = f"{LEVEL:.0%} intervals, Clopper-Pearson; that of overhead by order statistics"


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """How many of how many, and between what limits the probability behind it lies."""

    value: float | None
    """None of none."""
    low: float
    high: float
    count: int
    of: int


class Overhead(msgspec.Struct, frozen=True, kw_only=True):
    """What detectors cost, as a share of the time of a step without them."""

    value: float
    low: float
    high: float
    pairs: int
    """Stretches of steps with and without, taken in turn."""


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds within which 95 % are noticed, and between what limits that is."""

    value: float | None
    """None if more were missed."""
    low: float | None
    high: float | None
    """None, as of `low`, if there are too few to say, or it may be that more are missed."""
    of: int


class Resized(msgspec.Struct, frozen=True, kw_only=True):
    """What was said of a run without a fault of a rank, whose world shrank and grew back."""

    steps: Count
    resized: bool
    """Whether it did: a node that comes back too late has nobody wait for it."""
    alarms: tuple[str, ...] = ()
    """What detectors said of it."""
    false_triggers: Count = 0
    """Steps that were computed once more, for nothing."""


class Clean(NamedTuple):
    """What became of steps without a fault."""

    steps: int
    alarms: Sequence[str] = ()
    """What detectors said of them."""
    false_triggers: int = 0
    """How many were computed once more for nothing."""
    resizes: Sequence[Resized] = ()
    """Whole runs besides."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers that a release is judged by."""

    state_recall: Share
    state_unharmed: Share
    """Of what was noticed of state, but for checkpoints: after which ranks had, some steps later,
    the bits that they would have had, without a restart."""
    persistent_compute_recall: Share
    intermittent_recall: Share
    rare_recall: Share
    oneshot_recall: Share
    sum_recall: Share
    """Of gradients that were wrong behind a rank's products."""
    data_recall: Share
    state_harmful_recall: Share
    """As of those below, of what would have done harm if nobody had looked (campaign.harm)."""
    persistent_compute_harmful_recall: Share
    intermittent_harmful_recall: Share
    rare_harmful_recall: Share
    oneshot_harmful_recall: Share
    sum_harmful_recall: Share
    data_harmful_recall: Share
    digest_recall: Share
    """Of digests that were wrong themselves."""
    whole_run_recall: Share
    """Of what was let loose in whole runs."""
    false_alarms_per_1000_steps: Share
    """`count` of them in `of` steps; value and limits are per 1,000."""
    false_triggers_per_1000_steps: Share
    """The same of steps that were computed once more for their numbers, for nothing."""
    culprit_exact: Share
    """Of all that was noticed in the small world, but for sums, which no rank has wrong alone."""
    overhead: Overhead | None
    hang_recall: Share
    hang_culprit_exact: Share
    """Of all single ranks that stood still, noticed or not."""
    hang_latency_p95_s: Latency | None
    """From the fault until it was noticed, of all of them; to be compared with the run's
    `detectWithin`."""
    hang_false_kills_per_1000_steps: Share
    """Of the steps of all runs with a rank that stood still or was slow: how often one was begun
    again for nothing."""
    straggler_recall: Share
    """Of ranks with a slow device."""
    straggler_within_20_steps: Share
    """Of the same: how many were found so soon."""
    straggler_precision: Share
    """Of all devices that were said to be slow, also where none was, and where a rank stood still:
    how many were."""
    straggler_verdict_right: Share
    """Of all slow ranks that were found and judged: how often device and work were told apart."""


class ClassRow(msgspec.Struct, frozen=True, kw_only=True):
    """One class of faults."""

    name: str
    group: Group
    trials: int
    masked: int
    """That left no trace, and do not count."""
    crashed: int
    """That ended in what ranks raised, before a detector had said anything."""
    recall: Share
    judged: int
    """Of the effective ones: of how many it is known whether they would have done harm."""
    harmful: Share
    """How many were noticed of those that would."""
    harmful_loss: Share
    """And of those whose loss alone would say so."""
    exact: Share
    latency_median: float | None
    """Steps; of those that were noticed."""
    latency_max: int | None
    seconds_max: float | None
    """Of whole runs: until one was noticed."""
    right: int | None
    """Of slow ranks: how many were found to have what makes them slow; None of others."""
    baselines: dict[str, int]
    """How many of the effective ones each noticed."""


class Campaign(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a campaign, or of as much of it as is done."""

    seed: int
    trials: int
    done: int
    ranks: int
    trajectories: int
    """That trials struck: runs with other weights and samples."""
    intervals: str
    summary: Summary
    by_class: list[ClassRow]
    misses: dict[str, int]
    """Classes with what was missed of them."""
    crashed: dict[str, int]
    """And with what ended in an error that says nothing of what was wrong; not noticed either."""
    baselines: dict[str, Share]
    """Of all effective trials that baselines could see, what each noticed."""
    alarms: list[str]
    """What detectors said of steps without a fault, those of trials before theirs included."""
    resizes: int
    """Runs, among the steps without a fault, whose world shrank and grew back."""


def share(count: int, of: int) -> Share:
    """Return a share with its interval."""
    low, high = clopper_pearson(count, of)
    return Share(value=count / of if of else None, low=low, high=high, count=count, of=of)


def per_thousand(alarms: int, steps: int) -> Share:
    """Return how many alarms there are in 1,000 steps, from how many there were in all."""
    found = share(min(alarms, steps), steps)
    value = None if found.value is None else 1_000 * found.value
    return Share(
        value=value, low=1_000 * found.low, high=1_000 * found.high, count=alarms, of=steps
    )


def overhead(pairs: Sequence[tuple[float, float]]) -> Overhead | None:
    """Return the overhead from times with and without detectors, taken in turn; None of none."""
    if not pairs:
        return None
    median, (low, high) = of_median([with_s / without_s - 1.0 for with_s, without_s in pairs])
    return Overhead(value=median, low=low, high=high, pairs=len(pairs))


def campaign(
    results: Iterable[Result],
    *,
    seed: int,
    trials: int,
    ranks: int,
    clean: Clean,
    pairs: Sequence[tuple[float, float]],
) -> Campaign:
    """Return what some results come to.

    Args:
        results: of the trials that are done.
        seed: of the campaign.
        trials: that it has in all.
        ranks: of its world.
        clean: what became of steps without a fault.
        pairs: seconds of steps with detectors and without.
    """
    done = sorted(results, key=lambda result: result.number)
    named = [r for r in done if r.effective and r.noticed and r.group in NAMES_ONE]
    compared = [r for r in done if r.effective and r.baselines]
    rows = [_row([r for r in done if r.name == name]) for name in _names(done)]
    # Those few steps of trials that come before the fault are not counted, and what is said is.
    alarms = [*clean.alarms, *(alarm for r in done for alarm in r.alarms)]
    alarms += [alarm for run in clean.resizes for alarm in run.alarms]
    steps = clean.steps + sum(run.steps for run in clean.resizes)
    triggers = clean.false_triggers + sum(run.false_triggers for run in clean.resizes)
    return Campaign(
        seed=seed,
        trials=trials,
        done=len(done),
        ranks=ranks,
        trajectories=len({r.trainer_seed for r in done if r.trainer_seed is not None}),
        intervals=INTERVALS,
        summary=Summary(
            state_recall=_recall(done, "state"),
            state_unharmed=_unharmed(done),
            persistent_compute_recall=_recall(done, "persistent"),
            intermittent_recall=_recall(done, "intermittent"),
            rare_recall=_recall(done, "rare"),
            oneshot_recall=_recall(done, "oneshot"),
            sum_recall=_recall(done, "sum"),
            data_recall=_recall(done, "data"),
            state_harmful_recall=_harmful(done, "state"),
            persistent_compute_harmful_recall=_harmful(done, "persistent"),
            intermittent_harmful_recall=_harmful(done, "intermittent"),
            rare_harmful_recall=_harmful(done, "rare"),
            oneshot_harmful_recall=_harmful(done, "oneshot"),
            sum_harmful_recall=_harmful(done, "sum"),
            data_harmful_recall=_harmful(done, "data"),
            digest_recall=_recall(done, "detector"),
            whole_run_recall=_recall(done, "live"),
            false_alarms_per_1000_steps=per_thousand(len(alarms), steps),
            false_triggers_per_1000_steps=per_thousand(triggers, steps),
            culprit_exact=share(sum(r.named == "exact" for r in named), len(named)),
            overhead=overhead(pairs),
            **_of_hangs([r for r in done if r.group == "hang" and r.effective]),
            hang_false_kills_per_1000_steps=_false_kills(done),
            **_of_slow([r for r in done if r.group in TIMED and r.effective]),
        ),
        by_class=rows,
        misses=dict(Counter(r.name for r in done if _missed(r))),
        crashed=dict(Counter(r.name for r in done if r.crashed)),
        baselines={
            name: share(sum(r.baselines[name] is not None for r in compared), len(compared))
            for name in BASELINES
        },
        alarms=alarms,
        resizes=sum(run.resized for run in clean.resizes),
    )


class _OfHangs(TypedDict):
    hang_recall: Share
    hang_culprit_exact: Share
    hang_latency_p95_s: Latency | None


def _of_hangs(hangs: Sequence[Result]) -> _OfHangs:
    # Who is never noticed has waited longer than all others.
    seconds = [math.inf if not r.noticed or r.seconds is None else r.seconds for r in hangs]
    return _OfHangs(
        hang_recall=share(sum(r.noticed for r in hangs), len(hangs)),
        hang_culprit_exact=share(sum(r.named == "exact" for r in hangs), len(hangs)),
        hang_latency_p95_s=_latency(seconds) if seconds else None,
    )


def _latency(seconds: Sequence[float]) -> Latency:
    value, low, high = (
        None if each is None or math.isinf(each) else each for each in of_quantile(seconds, 0.95)
    )
    return Latency(value=value, low=low, high=high, of=len(seconds))


class _OfSlow(TypedDict):
    straggler_recall: Share
    straggler_within_20_steps: Share
    straggler_precision: Share
    straggler_verdict_right: Share


def _of_slow(timed: Sequence[Result]) -> _OfSlow:
    slow = [r for r in timed if r.group == "straggler"]
    devices = [r for r in slow if r.expected == "hardware"]
    soon = [r for r in devices if r.noticed and (r.latency or 0) <= WITHIN_STEPS]
    judged = [r for r in slow if r.noticed and r.verdict]
    return _OfSlow(
        straggler_recall=share(sum(r.noticed for r in devices), len(devices)),
        straggler_within_20_steps=share(len(soon), len(devices)),
        straggler_precision=share(sum(r.rightly for r in timed), sum(r.accused for r in timed)),
        straggler_verdict_right=share(sum(r.verdict == r.expected for r in judged), len(judged)),
    )


def _false_kills(results: Sequence[Result]) -> Share:
    of_runs = [r for r in results if r.group in TIMED]
    return per_thousand(sum(r.false_kills for r in of_runs), sum(r.steps for r in of_runs))


def _recall(results: Sequence[Result], group: Group) -> Share:
    effective = [r for r in results if r.group == group and r.effective]
    return _recall_of(effective)


def _recall_of(results: Sequence[Result]) -> Share:
    return share(sum(r.noticed for r in results), len(results))


def _harmful(results: Sequence[Result], group: Group) -> Share:
    return _recall_of([r for r in results if r.group == group and r.harmful])


def _is_lossy(result: Result) -> bool:
    """Whether a fault that does harm shows in the loss, too."""
    return result.loss_gap is None or result.loss_gap > 1.0


def _missed(result: Result) -> bool:
    return result.effective and not (result.noticed or result.crashed)


def _unharmed(results: Sequence[Result]) -> Share:
    noticed = [
        r
        for r in results
        if r.group == "state" and r.noticed and r.site not in ("staged", "copied")
    ]
    return share(sum(r.unharmed for r in noticed), len(noticed))


def _row(results: Sequence[Result]) -> ClassRow:
    effective = [r for r in results if r.effective]
    noticed = [r for r in effective if r.noticed]
    latencies = [r.latency for r in noticed if r.latency is not None]
    return ClassRow(
        name=results[0].name,
        group=results[0].group,
        trials=len(results),
        masked=len(results) - len(effective),
        crashed=sum(r.crashed for r in effective),
        recall=share(len(noticed), len(effective)),
        judged=sum(r.harmful is not None for r in effective),
        harmful=_recall_of([r for r in effective if r.harmful]),
        harmful_loss=_recall_of([r for r in effective if r.harmful and _is_lossy(r)]),
        exact=share(sum(r.named == "exact" for r in noticed), len(noticed)),
        latency_median=float(np.median(latencies)) if latencies else None,
        latency_max=max(latencies, default=None),
        seconds_max=max((r.seconds for r in noticed if r.seconds is not None), default=None),
        right=(
            sum(r.verdict == r.expected for r in noticed)
            if results[0].group == "straggler"
            else None
        ),
        baselines={
            name: sum(r.baselines.get(name) is not None for r in effective) for name in BASELINES
        },
    )


def _names(results: Sequence[Result]) -> list[str]:
    """Return the classes that there are, by group, as they come."""
    pairs = dict.fromkeys((GROUPS.index(r.group), r.name) for r in results)
    return [name for _, name in sorted(pairs, key=lambda pair: pair[0])]
