"""What a campaign came to, told in tables, as JSON, or as a page with a plot."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from orchestrator.campaign.summary import TIMED, Campaign, Overhead, Share
from orchestrator.cli import pages, plots
from orchestrator.cli.blocks import facts, section
from orchestrator.cli.choices import Form
from orchestrator.cli.tables import grid, in_json

ALWAYS = (
    "state_recall",
    "persistent_compute_recall",
    "intermittent_recall",
    "oneshot_recall",
    "culprit_exact",
)
"""Of corruption, told also if there were no such trials."""
SUMMED: tuple[tuple[str, str], ...] = (
    ("State", "state_recall"),
    ("State, of that repaired", "state_unharmed"),
    ("Persistent compute", "persistent_compute_recall"),
    ("Intermittent, p >= 0.1", "intermittent_recall"),
    ("Rare, p = 0.01", "rare_recall"),
    ("One-shot", "oneshot_recall"),
    ("Sums", "sum_recall"),
    ("Data", "data_recall"),
    ("Digests themselves", "digest_recall"),
    ("Whole runs", "whole_run_recall"),
    ("State that does harm", "state_harmful_recall"),
    ("Persistent compute that does", "persistent_compute_harmful_recall"),
    ("Intermittent that does", "intermittent_harmful_recall"),
    ("Rare that does", "rare_harmful_recall"),
    ("One-shot that does", "oneshot_harmful_recall"),
    ("Sums that do", "sum_harmful_recall"),
    ("Data that does", "data_harmful_recall"),
    ("Culprit named exactly", "culprit_exact"),
    ("Hangs", "hang_recall"),
    ("Culprit of hangs exact", "hang_culprit_exact"),
    ("Slow devices", "straggler_recall"),
    ("Found within 20 steps", "straggler_within_20_steps"),
    ("Devices blamed rightly", "straggler_precision"),
    ("Device or work told right", "straggler_verdict_right"),
)


def shown(told: Campaign, form: Form) -> str:
    """Return what a campaign came to in the asked form."""
    return in_json(told) if form is Form.JSON else "\n".join(_text(told))


def page(told: Campaign) -> str:
    """Return a page that stands by itself."""
    rows = [
        plots.Range(
            f"{row.name}, {row.recall.of}",
            *(100 * (row.recall.low if s is None else s)
              for s in (row.recall.low, row.recall.value, row.recall.high)),
        )
        for row in told.by_class
        if row.recall.of
    ]  # fmt: skip
    parts = [
        pages.part("Recall by class", f"With {told.intervals}; behind each, effective trials.",
                   plots.ranges(rows, "%") if rows else ""),
        f"<pre>{escape(shown(told, Form.TEXT))}</pre>",
    ]  # fmt: skip
    return pages.page(_head(told), parts)


def _without_faults(told: Campaign) -> list[tuple[str, str]]:
    return [
        ("False alarms", _per_thousand(told.summary.false_alarms_per_1000_steps)),
        ("False triggers", _per_thousand(told.summary.false_triggers_per_1000_steps)),
        ("Worlds that shrank and grew back", f"{told.resizes}, among these"),
        ("Overhead", overhead_words(told.summary.overhead)),
    ]


def _times(told: Campaign) -> Iterator[tuple[str, str]]:
    """Yield what is told of runs with a rank that stood still or was slow, if there were any."""
    latency = told.summary.hang_latency_p95_s
    if latency is not None:
        low, value, high = (
            "?" if s is None else f"{s:.1f}" for s in (latency.low, latency.value, latency.high)
        )
        yield "95 % of hangs noticed within", f"{value} s ({low} to {high}), of {latency.of}"
    killed = told.summary.hang_false_kills_per_1000_steps
    if killed.of:
        yield (
            "Begun again for nothing",
            f"{killed.count} in {killed.of} steps of these, at most {killed.high:.3f} per 1,000",
        )


def _head(told: Campaign) -> str:
    head = f"campaign of seed {told.seed}: {told.done} of {told.trials} trials, {told.ranks} ranks"
    # Whole runs strike none of them.
    of = "trajectory" if told.trajectories == 1 else "trajectories"
    return f"{head}, {told.trajectories} {of}" if told.trajectories else head


def _text(told: Campaign) -> list[str]:
    summary = told.summary
    corrupted = not told.by_class or any(row.group not in TIMED for row in told.by_class)
    lines = [
        f"{_head(told)}; {told.intervals}",
        "",
        *facts(
            [
                *(
                    (title, share_words(getattr(summary, name)))
                    for title, name in SUMMED
                    if getattr(summary, name).of or (corrupted and name in ALWAYS)
                ),
                *_times(told),
                *(_without_faults(told) if corrupted else ()),
            ]
        ),
        *section("By class", _classes(told).splitlines()),
        *section(
            "Of those, what would do harm if nobody looked",
            _harmful(told).splitlines() if any(row.judged for row in told.by_class) else [],
        ),
        *(
            section("Noticed by baselines on the same trials", _baselines(told).splitlines())
            if corrupted
            else ()
        ),
        *section("Missed", [f"{count} of {name}" for name, count in told.misses.items()]),
        *section(
            "Not noticed, but raised something",
            [f"{count} of {name}" for name, count in told.crashed.items()],
        ),
        *section("Alarms without a fault", told.alarms[:8]),
    ]
    return [line.rstrip() for line in lines]


def share_words(share: Share) -> str:
    """Return a share with its interval, in percent."""
    if share.value is None:
        return "no effective trial"
    return (
        f"{share.value * 100:.1f} % ({share.low * 100:.1f} to {share.high * 100:.1f}), "
        f"{share.count} of {share.of}"
    )


def overhead_words(overhead: Overhead | None) -> str:
    """Return the overhead with its interval, in percent of a step."""
    if overhead is None:
        return "not measured"
    low, middle, high = (100 * v for v in (overhead.low, overhead.value, overhead.high))
    return f"{middle:.2f} % of a step ({low:.2f} to {high:.2f}), {overhead.pairs} pairs"


def _per_thousand(found: Share) -> str:
    return f"{found.count} in {found.of} steps without a fault, at most {found.high:.3f} per 1,000"


def _classes(told: Campaign) -> str:
    rows = [
        [
            row.name,
            str(row.trials),
            str(row.masked),
            str(row.crashed),
            str(row.recall.count),
            "-" if row.recall.value is None else f"{row.recall.value * 100:.1f}",
            f"{row.recall.low * 100:.1f}",
            f"{row.recall.high * 100:.1f}",
            "-" if row.latency_median is None else f"{row.latency_median:g}",
            "-" if row.latency_max is None else str(row.latency_max),
            "-" if row.seconds_max is None else f"{row.seconds_max:.1f}",
            str(row.exact.count),
            "-" if row.right is None else str(row.right),
        ]
        for row in told.by_class
    ]
    titles = ["CLASS", "TRIALS", "NO TRACE", "CRASHED", "NOTICED", "RECALL (%)", "LOW", "HIGH"]
    titles += ["LATENCY (steps)", "MOST", "MOST (s)", "EXACT", "BLAMED RIGHT"]
    return grid(titles, rows)


def _harmful(told: Campaign) -> str:
    """Return what is noticed of what does harm, by class: by loss or weights, and by loss alone."""
    rows = [
        [
            row.name,
            str(row.judged),
            *(
                text
                for share in (row.harmful, row.harmful_loss)
                for text in (str(share.of), str(share.count), *_limits(share))
            ),
        ]
        for row in told.by_class
        if row.judged
    ]
    titles = ["CLASS", "JUDGED", "HARMFUL", "NOTICED", "LOW (%)", "HIGH (%)"]
    titles += ["HARMFUL BY LOSS", "NOTICED", "LOW (%)", "HIGH (%)"]
    return grid(titles, rows)


def _limits(share: Share) -> tuple[str, str]:
    return f"{share.low * 100:.1f}", f"{share.high * 100:.1f}"


def _baselines(told: Campaign) -> str:
    """Return what each rule noticed, by class and of all trials with steps to look at."""
    rows = [
        [row.name, str(row.recall.of), *(str(count) for count in row.baselines.values())]
        for row in told.by_class
        if row.group not in TIMED
    ]
    seen = next(iter(told.baselines.values()))
    rows.append(["all", str(seen.of), *(str(share.count) for share in told.baselines.values())])
    return grid(["CLASS", "EFFECTIVE", *(name.upper() for name in told.baselines)], rows)
