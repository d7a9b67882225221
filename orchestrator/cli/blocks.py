"""The shape of `holdfast describe`: facts with their names, and titled blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from orchestrator.cli.tables import grid


def facts(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Return aligned lines `Name:  value`; empty values are left out."""
    kept = [(key, value) for key, value in pairs if value]
    width = max((len(key) for key, _ in kept), default=0) + 3
    return [f"{f'{key}:':<{width}}{value}" for key, value in kept]


def section(title: str, texts: Iterable[str]) -> list[str]:
    """Return an empty line, a title and the texts indented below it; nothing for no texts."""
    lines = [line for text in texts for line in text.splitlines() or [""]]
    return ["", f"{title}:", *(f"  {line}".rstrip() for line in lines)] if lines else []


def ledger_lines(ledger: Mapping[str, float]) -> list[str]:
    """Return seconds per bucket as a table, buckets without any left out."""
    # Whole microseconds: so do the buckets sum to the wall clock, in floating point they may not.
    spent_us = {bucket: round(seconds * 1e6) for bucket, seconds in ledger.items()}
    wall_us = sum(spent_us.values())
    if not wall_us:
        return []
    rows = [
        [bucket, f"{us / 1e6:.3f}", f"{us / wall_us * 100:.1f}"]
        for bucket, us in [*spent_us.items(), ("wall clock", wall_us)]
        if us
    ]
    return grid(["BUCKET", "TIME (s)", "SHARE (%)"], rows).splitlines()
