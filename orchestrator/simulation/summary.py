"""What several seeds of one experiment come to: means, and how far they can be trusted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import sqrt
from typing import Any

import msgspec
import numpy as np

from orchestrator.simulation import constants
from orchestrator.simulation.experiment import Inputs, Outcome
from orchestrator.worlds.simulated.profile import Constant

INTERVAL = "95 % interval of the mean over seeds, Student's t"
_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantiles of Student's t for 1 to 30 degrees of freedom; any table has them."""
_Z_975 = 1.959964


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """The mean of a share over seeds, and where it lies with 95 % confidence."""

    mean: float
    low: float | None
    """None of one seed, which says nothing about others."""
    high: float | None
    per_seed: list[float]


class Lost(msgspec.Struct, frozen=True, kw_only=True):
    """What was lost to incidents of one kind after faults of one class; means of a run."""

    fault: str
    incident: str
    count: float
    lost_s: float
    buckets: dict[str, float]


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What an experiment came to. Means of a run, unless said otherwise; times in seconds."""

    experiment: dict[str, Any]
    """Settings, as they were asked for."""
    run: dict[str, Any]
    """What followed from them: nodes, spares, cadence, detection."""
    seeds: list[int]
    ettr: Estimate
    throughput: Estimate
    interval: str
    ledger: dict[str, float]
    lost: list[Lost]
    interruptions: dict[str, Any]
    incidents: dict[str, float]
    policies: dict[str, float]
    """Generations, by the rung of the ladder that started them."""
    spares: dict[str, float]
    daily: list[float]
    """Effective share of each day."""
    silent: dict[str, float]
    """Silent corruptions by kind, and whether a detector noticed them."""
    silent_s: float
    steps: float
    lost_steps: float
    failed: dict[int, str]
    """Seeds whose run was given up, and why."""
    controller: dict[str, float]
    wall_s: float
    """That all seeds took together, one after another."""
    profile: dict[str, Any]


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean and interval of the shares of some seeds. No share is below 0 or above 1.

    >>> e = estimate([0.98, 0.99, 0.99])
    >>> round(e.low, 4), round(e.mean, 4), round(e.high, 4)
    (0.9723, 0.9867, 1.0)
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean=mean, low=None, high=None, per_seed=list(values))
    half = student_t(len(values) - 1) * float(np.std(values, ddof=1)) / sqrt(len(values))
    low, high = max(mean - half, 0.0), min(mean + half, 1.0)
    return Estimate(mean=mean, low=low, high=high, per_seed=list(values))


def student_t(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t.

    Beyond the table by an expansion (Abramowitz and Stegun 26.7.5), good to four digits there.
    """
    if freedom <= len(_T_975):
        return _T_975[freedom - 1]
    z = _Z_975
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def summary(given: Inputs, outcomes: Sequence[Outcome]) -> Summary:
    """Return what some seeds of an experiment come to, at least one."""
    seeds = sorted(outcomes, key=lambda outcome: outcome.seed)
    return Summary(
        experiment=msgspec.to_builtins(given.settings),
        run=run_words(given),
        seeds=[each.seed for each in seeds],
        ettr=estimate([each.ettr for each in seeds]),
        throughput=estimate([each.throughput for each in seeds]),
        interval=INTERVAL,
        ledger=means(each.ledger for each in seeds),
        lost=_lost(seeds),
        interruptions={
            **means(each.interruptions for each in seeds),
            "by_class": means(each.by_class for each in seeds),
            "unseen": means(each.unseen for each in seeds),
            "missed": means(each.missed for each in seeds),
        },
        incidents=means(each.incidents for each in seeds),
        policies=means(each.rungs for each in seeds),
        spares=means(each.spares for each in seeds),
        daily=[float(day) for day in np.mean([each.daily for each in seeds], axis=0)],
        silent=means(each.silent for each in seeds),
        silent_s=_mean(seeds, lambda each: each.silent_s),
        steps=_mean(seeds, lambda each: each.steps),
        lost_steps=_mean(seeds, lambda each: each.lost_steps),
        failed={each.seed: each.reason for each in seeds if each.state == "Failed"},
        controller={
            "cpu_s": _mean(seeds, lambda each: each.controller_s),
            "max_rss_mb": max(each.max_rss_mb for each in seeds),
            "events": _mean(seeds, lambda each: each.events),
        },
        wall_s=sum(each.wall_s for each in seeds),
        profile=profile_words(given),
    )


def run_words(given: Inputs) -> dict[str, Any]:
    """Return what follows from the settings of an experiment, as plain data."""
    run = given.run_file().spec
    step_s = given.profile.step.value
    return {
        "nodes": run.nodes.count,
        "spares": run.nodes.spares,
        "replicas": run.parallelism.dp_replicate,
        "step_s": step_s,
        "memory_every_s": None
        if given.care.forgets
        else run.checkpoint.memory_every_steps * step_s,
        "durable_every_s": run.checkpoint.every_steps * step_s,
        "detect_within": run.detection.detect_within,
    }


def profile_words(given: Inputs) -> dict[str, Any]:
    """Return the constants of a profile with where each comes from, as plain data."""
    habits = given.profile.habits
    silent = habits.silent if habits is not None else None
    return {
        "name": given.profile.name,
        "constants": _told(given.profile.constants()),
        "cluster": _told(constants.BY_NAME),
        "habits": msgspec.to_builtins(habits),
        "silent": msgspec.to_builtins(silent),
    }


def _told(known: Mapping[str, Constant]) -> dict[str, Any]:
    return {
        name: {
            "value_s": constant.value,
            "origin": constant.origin,
            "source": constant.source,
            **({"varies": msgspec.to_builtins(constant.varies)} if constant.varies else {}),
        }
        for name, constant in known.items()
    }


def means(tables: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each key over tables; what a table has not is 0 there."""
    listed = list(tables)
    keys = dict.fromkeys(key for table in listed for key in table)
    return {key: sum(table.get(key, 0.0) for table in listed) / len(listed) for key in keys}


def _mean(seeds: Sequence[Outcome], of: Callable[[Outcome], float]) -> float:
    return sum(map(of, seeds)) / len(seeds)


def _lost(seeds: Sequence[Outcome]) -> list[Lost]:
    sums: dict[tuple[str, str], tuple[float, dict[str, float]]] = {}
    for each in seeds:
        for charge in each.charges:
            key = (charge.fault, charge.incident)
            count, buckets = sums.get(key, (0.0, {}))
            for bucket, lost_s in charge.seconds.items():
                buckets[bucket] = buckets.get(bucket, 0.0) + lost_s / len(seeds)
            sums[key] = (count + charge.count / len(seeds), buckets)
    told = [
        Lost(
            fault=fault,
            incident=incident,
            count=count,
            lost_s=sum(buckets.values()),
            buckets=dict(sorted(buckets.items())),
        )
        for (fault, incident), (count, buckets) in sums.items()
    ]
    return sorted(told, key=lambda lost: (-lost.lost_s, lost.fault, lost.incident))
