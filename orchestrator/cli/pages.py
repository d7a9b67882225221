"""What came of experiments as a page that stands by itself: one file, no script, no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from orchestrator.cli import outcomes, plots, sweeping
from orchestrator.cli.choices import Told
from orchestrator.cli.sweeping import Results
from orchestrator.policy.arithmetic import DAY_S
from orchestrator.simulation.experiment import Outcome
from orchestrator.simulation.summary import Summary

BARS_MAX = 14
HOUR_S = 3_600.0
_STYLE = (
    "body{font:14px/1.5 sans-serif;max-width:900px;margin:2em auto;padding:0 1em;color:#222}"
    "pre{background:#f6f6f6;padding:1em;overflow-x:auto}svg{max-width:100%;height:auto}"
)


def of_experiment(told: Summary, seeds: Sequence[Outcome]) -> str:
    """Return a page about an experiment: plots, and below them all that is printed."""
    ordered = sorted(seeds, key=lambda seed: seed.seed)
    per_day = [[day * 100 for day in seed.daily] for seed in ordered]
    wall_s = sum(told.ledger.values())
    lost = [
        plots.Bar(name, spent_s, f"{spent_s / HOUR_S:.2f} h, {spent_s / wall_s * 100:.3f} %")
        for name, spent_s in sorted(told.ledger.items(), key=lambda item: -item[1])
        if name != "effective" and spent_s > 0
    ]
    doors = [
        plots.Bar(
            f"{each.fault}: {each.incident}",
            each.lost_s,
            f"{each.lost_s / HOUR_S:.2f} h, {each.count:.1f} times",
        )
        for each in told.lost[:BARS_MAX]
        if each.lost_s > 0
    ]
    first = ordered[0]
    dots = [
        plots.Dot(
            moment.at_s / DAY_S,
            moment.incident,
            f"{moment.fault}, {moment.rung}, {moment.lost_s:.1f} s lost",
        )
        for moment in first.moments
    ]
    title = outcomes.headline(told)
    parts = [
        f"<p><b>ETTR {escape(outcomes.ettr_words(told))}</b></p>",
        part("ETTR of each day", "Grey: each seed. Blue: their mean.",
              plots.lines(per_day, [day * 100 for day in told.daily], "%")),
        part("Lost time by bucket", "Mean of a run.", plots.waterfall(lost) if lost else ""),
        part("Lost to", "By class of fault and kind of incident; mean of a run.",
              plots.bars(doors) if doors else ""),
        part(f"Incidents of seed {first.seed}", "Each with what was done and lost.",
              plots.timeline(dots, float(told.experiment["days"])) if dots else ""),
        f"<h2>In words</h2><pre>{escape(outcomes.shown(told, Told.TEXT))}</pre>",
    ]  # fmt: skip
    return page(title, parts)


def of_sweep(told: Results) -> str:
    """Return a page about a sweep: one interval of ETTR for each cell."""
    rows = [
        plots.Range(
            ", ".join(
                f"{name} {sweeping.value_words(value)}" for name, value in row.varied.items()
            ),
            *(
                100 * (row.ettr.mean if share is None else share)
                for share in (row.ettr.low, row.ettr.mean, row.ettr.high)
            ),
        )
        for row in told.rows
    ]
    parts = [
        part("ETTR by cell", f"Mean and {told.interval}.",
              plots.ranges(rows, "%") if rows else ""),
        f"<pre>{escape(sweeping.shown(told, Told.TEXT))}</pre>",
    ]  # fmt: skip
    return page(f"sweep {told.sweep}", parts)


def part(title: str, words: str, drawing: str) -> str:
    """Return a titled part of a page; of nothing that was drawn, it says so."""
    shown = drawing or "<p>Nothing.</p>"
    return f"<h2>{escape(title)}</h2><p>{escape(words)}</p>{shown}"


def page(title: str, parts: Sequence[str]) -> str:
    """Return a page of its own."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )
