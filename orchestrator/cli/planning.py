"""What `holdfast plan` answers, and how it says so: the closed form, with all that it assumes.

Nothing is simulated here. A fault model gives means (`orchestrator.faults.expected`), and
`orchestrator.policy.arithmetic` does the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, isfinite
from typing import Any

from orchestrator import compose
from orchestrator.cli import units
from orchestrator.cli.answers import Answer
from orchestrator.cli.errors import CliError, Exit
from orchestrator.cli.tables import Column, Row, text
from orchestrator.faults.cluster import Cluster
from orchestrator.faults.expected import Expected, expected
from orchestrator.faults.model import FaultModel
from orchestrator.faults.quantities import span_s
from orchestrator.policy import arithmetic
from orchestrator.policy.arithmetic import Leaving

REPAIRS = ("4h", "12h", "1d", "3d", "7d")
"""Of which a table is made while nobody says how long repairs take."""
HOUR_S = 3600.0
RESTART_S = 45.0
"""At 16,384 GPUs: stop 5 (assumed), warm swap 5, start 10 (assumed), communicators 17 (FT-HSDP,
arXiv 2602.00277), state from a peer's memory 5; the first step ends it."""
STALL_S = 0.05
"""Assumed; ByteRobust's Table 8 has 0.01 to 0.04 s, others 0.2 to 13 s."""
PER_DAY_LEAST = 1 / 365_250
COUNTED_MAX = 10_000
"""Nodes out at once on average; of more than that nobody has spares."""
ALONG = 0.9
STEPS = (0.25, 0.5, 1.0, 2.0, 4.0, 10.0)
"""Multiples of the best interval, to show what missing it costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The job and what befalls it."""

    cluster: Cluster
    mtti_s: float
    means: Expected
    removals_per_day: float
    together: bool
    """Whether it is known how many leave at once; else they leave one by one."""
    known_from: str
    """Where the rates come from, in words."""
    removed: str
    """What takes nodes out of service, in words."""

    @property
    def leaving(self) -> list[Leaving]:
        """By how many nodes leave at once, and for how long, as the fault model has it."""
        if self.together:
            return [Leaving(*each) for each in self.means.together]
        return [Leaving(1, self.removals_per_day, self.means.out_s)]

    @property
    def given(self) -> dict[str, float]:
        """What every answer rests on."""
        return {
            "gpus": self.cluster.gpus,
            "mtti_s": self.mtti_s,
            "removals_per_day": self.removals_per_day,
        }

    @property
    def headline(self) -> str:
        """The job in a line."""
        return f"{self.cluster.gpus} GPUs, interrupted every {units.seconds(self.mtti_s)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """What one interruption and one checkpoint cost."""

    detect_s: float
    restart_s: float
    stall_s: float
    known_from: tuple[str, ...]
    """Where the costs come from, and what is taken to be so, in words."""

    @property
    def whole_s(self) -> float:
        """From the fault to the first step."""
        return self.detect_s + self.restart_s


def faults(name: str) -> FaultModel:
    """Return the fault model of that name or in that file. Raises BadFileError."""
    return compose.named(name, compose.read_model, compose.packaged_model)


def site(*, gpus: int, model: FaultModel, mtti: str | None, rates: float) -> Site:
    """Return the job with its rates, from a fault model or from what an option says.

    Raises:
        CliError: if an option is not what it should be, or nothing ever fails.
    """
    try:
        cluster = Cluster(gpus=gpus)
    except ValueError as error:
        raise CliError(f"--gpus: {error}", "whole nodes of 8 GPUs", Exit.USAGE) from error
    means = expected(model, cluster, factor=rates)
    per_day, removals = means.interruptions_per_day, means.removals_per_day
    words = (
        f"fault model {model.name!r}: a day has {means.unexpected_per_day:.3g} faults and "
        f"{means.planned_per_day:.3g} planned operations that interrupt the job"
    )
    removed = f"{removals:.1f} nodes a day are taken out of service, slow ones too"
    if mtti is not None:
        per_day = removals = arithmetic.DAY_S / _span("--mtti", mtti, least=1.0)
        words = f"--mtti {mtti}: interruptions of any kind"
        removed = f"every interruption takes a node out of service: {removals:.1f} a day"
    if not PER_DAY_LEAST <= per_day <= arithmetic.DAY_S:
        raise CliError(
            f"model {model.name!r} has {per_day:g} interruptions a day at --rates {rates:g}, "
            "expected one in a thousand years to one a second",
            "choose another --rates, or hand in --mtti",
            Exit.USAGE,
        )
    return Site(
        cluster=cluster,
        mtti_s=arithmetic.DAY_S / per_day,
        means=means,
        removals_per_day=removals,
        together=mtti is None and bool(means.together),
        known_from=words,
        removed=removed,
    )


def outage(site: Site, *, detect: str | None, restart: str | None, stall: str | None) -> Outage:
    """Return what one interruption costs. Raises CliError for what is no span."""
    detect_s = site.means.detect_s if detect is None else _span("--detect", detect, least=0)
    restart_s = RESTART_S if restart is None else _span("--restart", restart, least=0)
    stall_s = STALL_S if stall is None else _span("--stall", stall, least=1e-3)

    def told(span_s: float, given: str | None, otherwise: str) -> str:
        return f"{units.seconds(span_s)} ({otherwise if given is None else 'as given'})"

    return Outage(
        detect_s=detect_s,
        restart_s=restart_s,
        stall_s=stall_s,
        known_from=(
            f"detection takes {told(detect_s, detect, 'mean of the classes of the fault model')}",
            f"a restart takes {told(restart_s, restart, 'published phases, not measured')}",
            f"a checkpoint stalls training for {told(stall_s, stall, 'assumed, not measured')}",
            "every interruption costs that, and half an interval of work; planned ones too",
            "interruptions are independent, at a constant rate; the job restarts as a whole",
            "a spare and a copy of the state in memory are at hand",
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """When spares are enough."""

    quantile: float
    """For this share of the time."""
    days: float
    """From the first to the last of so many days, with ALONG."""


def spares(site: Site, *, repair: str | None, refill: str, quantile: float, days: float) -> Answer:
    """Return how many nodes are out at once. Raises CliError for options that can not be."""
    if not 0 < quantile < 1:
        raise CliError(
            f"--quantile is {quantile:g}, expected more than 0 and less than 1",
            "0.99 is enough for all but one hour in a hundred",
            Exit.USAGE,
        )
    if not 0 < days < inf:
        raise CliError(f"--days is {days}, expected more than 0", "for example 54", Exit.USAGE)
    asked = Asked(quantile=quantile, days=days)
    times_s = [(each, span_s(each)) for each in REPAIRS]
    if repair is not None:
        times_s = [(repair, _span("--repair", repair, least=1.0))]
    refill_s = _span("--refill", refill, least=1.0)
    rows = [
        _row(site, f"repair-{name}", [e._replace(out_s=time_s) for e in site.leaving], asked)
        for name, time_s in times_s
    ]
    if repair is None and site.means.out_s:
        rows.append(_row(site, "repair-model", site.leaving, asked))
    if repair is not None and rows[0]["spares"] is None:
        most = min(site.cluster.nodes, COUNTED_MAX)
        raise CliError(
            f"{rows[0]['mean_nodes']:.4g} nodes would be out on average, expected fewer than "
            f"{most} of the {site.cluster.nodes} there are",
            "a shorter --repair, a longer --mtti or lower --rates",
            Exit.USAGE,
        )
    rows.append(_hot(site, refill_s, asked))
    return Answer(
        question="spares",
        headline=site.headline,
        given=site.given | {"quantile": quantile, "refill_s": refill_s, "days": days},
        columns=(
            Column("FOR", "name"),
            Column("AWAY (h)", "away_s", lambda value: f"{value / HOUR_S:.1f}"),
            Column("MEAN (nodes)", "mean_nodes", lambda value: f"{value:.2f}"),
            Column("ALONE (nodes)", "independent", text),
            Column(f"P{quantile * 100:g} (nodes)", "spares", text),
            Column("ALL ALONG (nodes)", "all_along", text),
        ),
        rows=rows,
        assumptions=(
            site.known_from,
            site.removed,
            (
                "nodes that leave together (switch, power, neighbours) do so as the model says"
                if site.together
                else "nodes leave one by one: --mtti says nothing of what takes several"
            ),
            "faults are independent of each other (compound Poisson, M/G/inf)",
            f"all along: never too few in {days:g} days, in {ALONG:.0%} of such runs at least",
            f"alone: for P{quantile * 100:g} if nodes left one by one (Poisson)",
            f"hot: until a used one is replaced, {refill}; alone: binomial (arXiv 2509.16293)",
        ),
    )


def _row(site: Site, name: str, leaving: Sequence[Leaving], asked: Asked) -> Row:
    """Return how many are out at once; no number if there would be more than can be counted.

    Args:
        site: the job and what befalls it.
        name: of the row.
        leaving: by how many nodes leave at once, and for how long.
        asked: what enough is.
    """
    per_day = sum(each.nodes * each.per_day for each in leaving)
    mean = sum(each.nodes * each.per_day * each.out_s for each in leaving) / arithmetic.DAY_S
    away_s = arithmetic.DAY_S * mean / per_day if per_day else leaving[0].out_s
    nodes = site.cluster.nodes
    row: Row = {
        "name": name,
        "away_s": away_s,
        "mean_nodes": mean,
        "independent": None,
        "spares": None,
        "all_along": None,
    }
    if mean < min(nodes, COUNTED_MAX):
        quantile, days = asked.quantile, asked.days
        row["independent"] = arithmetic.spares_poisson(
            removals_per_day=per_day, out_s=away_s, quantile=quantile
        )
        row["spares"] = arithmetic.spares_together(leaving, most=nodes, quantile=quantile)
        row["all_along"] = arithmetic.spares_all_along(leaving, days=days, most=nodes)
    return row | {"method": "compound"}


def _hot(site: Site, refill_s: float, asked: Asked) -> Row:
    """Return the row of spares that are replaced once they are used; alone: ByteRobust's way."""
    nodes = site.cluster.nodes
    row = _row(site, "hot", [each._replace(out_s=refill_s) for each in site.leaving], asked)
    probability = 1 - exp(-site.removals_per_day * refill_s / arithmetic.DAY_S / nodes)
    row["independent"] = arithmetic.spares_binomial(
        machines=nodes, probability=probability, quantile=asked.quantile
    )
    return row


def interval(site: Site, outage: Outage) -> Answer:
    """Return the best interval between checkpoints by both formulas, and others beside it."""
    best_s = arithmetic.daly_interval_s(outage.stall_s, site.mtti_s)
    young_s = arithmetic.young_interval_s(outage.stall_s, site.mtti_s)
    choices = [("young", young_s), *((_times(step), best_s * step) for step in STEPS)]
    rows: list[Row] = [
        {
            "name": name,
            "interval_s": every_s,
            "ettr": _renewal(site, outage, every_s),
            "saving": outage.stall_s / every_s,
            "lost_work": every_s / 2 / site.mtti_s,
        }
        for name, every_s in choices
    ]
    return Answer(
        question="interval",
        headline=site.headline,
        given=site.given | {"stall_s": outage.stall_s, "outage_s": outage.whole_s},
        columns=(
            Column("CHOICE", "name"),
            Column("INTERVAL (s)", "interval_s", lambda value: f"{value:.1f}"),
            Column("ETTR (%)", "ettr", _percent),
            Column("SAVING (%)", "saving", _percent),
            Column("LOST WORK (%)", "lost_work", _percent),
        ),
        rows=rows,
        assumptions=(site.known_from, *outage.known_from),
    )


def ettr(site: Site, outage: Outage, *, interval: str | None, days: float) -> Answer:
    """Return ETTR by three forms, and the parts of the loss. Raises CliError for no span."""
    every_s = (
        float(arithmetic.daly_interval_s(outage.stall_s, site.mtti_s))
        if interval is None
        else _span("--interval", interval, least=1e-3)
    )
    chosen = " (the best, by Daly)" if interval is None else ""
    costs = {
        "interval_s": every_s,
        "stall_s": outage.stall_s,
        "outage_s": outage.whole_s,
        "mtti_s": site.mtti_s,
    }
    reached = {
        "renewal": arithmetic.renewal_ettr(**costs),
        "small-loss": arithmetic.small_loss_ettr(**costs),
        "meta": arithmetic.expected_ettr(**costs),
    }
    costs_first = {
        "detection": outage.detect_s / site.mtti_s,
        "restart": outage.restart_s / site.mtti_s,
        "work": every_s / 2 / site.mtti_s,
        "saving": outage.stall_s / every_s,
    }
    # To first order they add up, to more than all time where restarts take hours.
    whole = (1 - reached["renewal"]) / sum(costs_first.values())
    lost = {part: share * whole for part, share in costs_first.items()}
    rows: list[Row] = [
        *({"name": f"ettr-{form}", "share": share} for form, share in reached.items()),
        *({"name": f"lost-{part}", "share": share} for part, share in lost.items()),
    ]
    if not isfinite(days):
        raise CliError(f"--days is {days}, expected a number", "for example 54", Exit.USAGE)
    for row in rows:
        row["hours"] = row["share"] * days * 24
    return Answer(
        question="ettr",
        headline=site.headline,
        given=site.given
        | {
            "days": days,
            "interval_s": every_s,
            "stall_s": outage.stall_s,
            "outage_s": outage.whole_s,
        },
        columns=(
            Column("WHAT", "name"),
            Column("SHARE (%)", "share", _percent),
            Column(f"OF {days:g} DAYS (h)", "hours", lambda value: f"{value:.2f}"),
        ),
        rows=rows,
        assumptions=(
            site.known_from,
            f"a checkpoint every {units.seconds(every_s)}{chosen}",
            *outage.known_from,
            "renewal is exact under these; small-loss adds losses up; meta: arXiv 2410.21680",
            "lost: what renewal leaves, shared out by what each part costs to first order",
        ),
    )


def _renewal(site: Site, outage: Outage, every_s: float) -> float:
    return arithmetic.renewal_ettr(
        interval_s=every_s,
        stall_s=outage.stall_s,
        outage_s=outage.whole_s,
        mtti_s=site.mtti_s,
    )


def _times(step: float) -> str:
    return "daly" if step == 1 else f"daly-x{step:g}"


def _percent(value: Any) -> str:  # noqa: ANN401 - a cell of a row
    return f"{value * 100:.2f}"


def _span(option: str, given: str, *, least: float) -> float:
    """Return a span in seconds. Raises CliError if it is none, or shorter than `least`."""
    try:
        found = span_s(given)
    except ValueError as error:
        raise CliError(f"{option}: {error}", "write for example `45s`", Exit.USAGE) from error
    if found < least:
        raise CliError(
            f"{option} is {given}, expected at least {units.seconds(least)}",
            "write for example `45s`",
            Exit.USAGE,
        )
    return found
