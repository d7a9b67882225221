"""What came of an experiment, told in tables, or as JSON or YAML."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.cli import units
from orchestrator.cli.blocks import facts, section
from orchestrator.cli.choices import Told
from orchestrator.cli.tables import grid, in_json, in_yaml
from orchestrator.simulation.summary import Summary

SOURCE_MAX = 72
"""Of what is printed of a source; JSON has it whole."""
ROWS_MAX = 16
"""Of what time was lost to; the rest is summed up."""


_WATCHED = {
    "none": "no detector of silent corruption",
    "digests": "digests of replicated state and no replay",
    "both": "digests and replay",
}


def shown(told: Summary, form: Told) -> str:
    """Return what came of an experiment in the asked form."""
    match form:
        case Told.JSON:
            return in_json(told)
        case Told.YAML:
            return in_yaml(told)
        case Told.TEXT:
            return "\n".join(_text(told))


def headline(told: Summary) -> str:
    """Return what was simulated, in a line."""
    asked = told.experiment
    what = f"record {asked['record']}" if asked["record"] else f"model {asked['model']}"
    silent = told.profile["silent"]
    looks = f", {_WATCHED[silent['watching']['value']]}" if silent else ""
    return (
        f"{asked['gpus']} GPUs for {asked['days']:g} days, {what}, profile {told.profile['name']}"
        f"{looks}, {units.count(told.run['spares'], 'spare node')}; "
        f"{units.count(len(told.seeds), 'seed')}"
    )


def ettr_words(told: Summary) -> str:
    """Return ETTR with its interval, in words."""
    ettr = told.ettr
    if ettr.low is None or ettr.high is None:
        return f"{ettr.mean * 100:.2f} % (one seed, no interval)"
    return (
        f"{ettr.mean * 100:.2f} % ({ettr.low * 100:.2f} to {ettr.high * 100:.2f}; {told.interval})"
    )


def _text(told: Summary) -> list[str]:
    wall_s = sum(told.ledger.values())
    throughput = f"{told.throughput.mean * 100:.2f} % of full speed"
    lines = [
        headline(told),
        "",
        *facts(
            [
                ("ETTR", ettr_words(told)),
                ("Throughput", f"{throughput}; ETTR counts a slow step in full"),
                ("Interruptions", _interruptions(told)),
                ("Incidents", _counts(told.incidents)),
                ("Policies", _counts(told.policies)),
                ("Spares", _spares(told)),
                ("Silent", _silent(told)),
                ("Controller", _controller(told)),
                ("Gave up", _failed(told)),
            ]
        ),
        *section("Ledger, of a run", _ledger(told.ledger, wall_s).splitlines()),
        *section("Lost to, of a run", _lost(told, wall_s).splitlines()),
        *section("What things take", _profile(told).splitlines()),
    ]
    return [line.rstrip() for line in lines]


def _ledger(ledger: Mapping[str, float], wall_s: float) -> str:
    rows = [
        [bucket, f"{spent_s / 3600:.3f}", f"{spent_s / wall_s * 100:.3f}"]
        for bucket, spent_s in [*ledger.items(), ("wall clock", wall_s)]
        if spent_s > 0
    ]
    return grid(["BUCKET", "TIME (h)", "SHARE (%)"], rows)


def _lost(told: Summary, wall_s: float) -> str:
    rows = [
        [
            each.fault,
            each.incident,
            f"{each.count:.1f}",
            f"{each.lost_s / 3600:.3f}",
            f"{each.lost_s / wall_s * 100:.3f}",
            f"{each.lost_s / each.count:.1f}" if each.count else "-",
        ]
        for each in told.lost
        if each.lost_s > 0
    ]
    rest = rows[ROWS_MAX:]
    if rest:
        more = f"{len(rest)} more rows"
        hours, share = (f"{sum(float(row[i]) for row in rest):.3f}" for i in (3, 4))
        rows = [*rows[:ROWS_MAX], [more, "-", "-", hours, share, "-"]]
    return grid(["FAULT", "INCIDENT", "COUNT", "LOST (h)", "SHARE (%)", "EACH (s)"], rows)


def _profile(told: Summary) -> str:
    rows = [
        [name, f"{each['value_s']:g}", each["origin"], _short(each["source"])]
        for name, each in told.profile["constants"].items()
    ]
    return grid(["WHAT", "TIME (s)", "ORIGIN", "SOURCE"], rows)


def _short(source: str) -> str:
    return source if len(source) <= SOURCE_MAX else f"{source[: SOURCE_MAX - 3]}..."


def _interruptions(told: Summary) -> str:
    kinds = told.interruptions
    words = (
        f"{kinds['unexpected']:.1f} unexpected, {kinds['planned']:.1f} planned, "
        f"{kinds['mistaken']:.1f} of healthy nodes"
    )
    missed = sum(kinds["missed"].values())
    return f"{words}; {missed:.1f} struck what was not in the job" if missed else words


def _counts(counts: Mapping[str, float]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:.1f} {name}" for name, count in ordered)


def _spares(told: Summary) -> str:
    spares = told.spares
    return (
        f"{spares['swaps']:.1f} swaps, at most {spares['away_most']:.1f} nodes away at a time, "
        f"{units.seconds(spares['waited_s'])} waited for one"
    )


def _silent(told: Summary) -> str:
    if not told.silent_s:
        return ""
    kinds = f"{_counts(told.silent)}; " if told.silent else ""
    return (
        f"{kinds}for {units.seconds(told.silent_s)} some node computed wrong numbers that nobody "
        "knew of; what was trained then is lost work, once somebody knows"
    )


def _controller(told: Summary) -> str:
    cost = told.controller
    return (
        f"{units.seconds(cost['cpu_s'])} of processor time for {cost['events']:.0f} events, of "
        f"{units.seconds(told.wall_s / len(told.seeds))} that a run took to simulate; "
        f"at most {cost['max_rss_mb']:.0f} MB"
    )


def _failed(told: Summary) -> str:
    if not told.failed:
        return ""
    seed, why = min(told.failed.items())
    return f"{units.count(len(told.failed), 'seed')}; seed {seed}: {units.first_line(why)}"
