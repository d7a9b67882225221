"""Plots as SVG, drawn by hand: no library, no script, no network. All text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 880, 190, 20, 14, 34
COLOURS = ("#3b6ea8", "#c0504d", "#7a9a3c", "#8064a2", "#d08a2e", "#4b9aa8", "#8a8a8a", "#b05a8c")
INK, FAINT = "#333", "#ddd"


class Bar(NamedTuple):
    """One bar: how long, and what it is."""

    name: str
    value: float
    told: str


class Range(NamedTuple):
    """A value with its interval."""

    name: str
    low: float
    mean: float
    high: float


class Dot(NamedTuple):
    """Something that happened."""

    at: float
    row: str
    told: str


def lines(series: Sequence[Sequence[float]], mean: Sequence[float], unit: str) -> str:
    """Draw values over days: each series faintly, their mean strongly; values in percent."""
    height = 240
    every = [value for one in (*series, mean) for value in one]
    low, high = _rounded(min(every), max(every))
    days = max(len(mean), 1)

    def x(day: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * day / days

    def y(value: float) -> float:
        return TOP + (height - TOP - BOTTOM) * (high - value) / (high - low)

    def path(values: Sequence[float], colour: str, width: float) -> str:
        points = " ".join(f"{x(n + 0.5):.1f},{y(v):.1f}" for n, v in enumerate(values))
        return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"/>'

    marks = [low + (high - low) * n / 4 for n in range(5)]
    parts = [_across(y(mark), f"{mark:.2f} {unit}") for mark in marks]
    parts += [path(one, FAINT, 1) for one in series] + [path(mean, COLOURS[0], 2.5)]
    parts += [_below(x(day), height, f"day {day}") for day in range(0, days + 1, _stride(days))]
    return _svg(height, parts)


def bars(rows: Sequence[Bar]) -> str:
    """Draw one bar below the other, the longest as wide as there is room."""
    longest = max((row.value for row in rows), default=0.0) or 1.0
    height = TOP + 22 * len(rows) + 10
    parts = []
    for n, row in enumerate(rows):
        y, width = TOP + 22 * n, (WIDTH - LEFT - RIGHT - 170) * row.value / longest
        colour = COLOURS[n % len(COLOURS)]
        parts += [
            _text(LEFT - 8, y + 13, row.name, "end"),
            f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="16" fill="{colour}"/>',
            _text(LEFT + width + 6, y + 13, row.told),
        ]
    return _svg(height, parts)


def waterfall(rows: Sequence[Bar]) -> str:
    """Draw what is lost step by step: each bar begins where the one before it ended."""
    total = sum(row.value for row in rows) or 1.0
    height = TOP + 22 * len(rows) + 10
    parts, begin = [], 0.0
    room = WIDTH - LEFT - RIGHT - 170
    for n, row in enumerate(rows):
        y, x = TOP + 22 * n, LEFT + room * begin / total
        width = max(room * row.value / total, 0.5)
        colour = COLOURS[n % len(COLOURS)]
        parts += [
            _text(LEFT - 8, y + 13, row.name, "end"),
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="16" fill="{colour}"/>',
            _text(x + width + 6, y + 13, row.told),
        ]
        begin += row.value
    return _svg(height, parts)


def ranges(rows: Sequence[Range], unit: str) -> str:
    """Draw means with their intervals, one below the other; values in percent."""
    low, high = _rounded(min(row.low for row in rows), max(row.high for row in rows))
    height = TOP + 22 * len(rows) + BOTTOM

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT - 60) * (value - low) / (high - low)

    parts = [
        _below(x(mark), height, f"{mark:.2f} {unit}")
        for mark in (low + (high - low) * n / 4 for n in range(5))
    ]
    for n, row in enumerate(rows):
        y = TOP + 22 * n + 8
        line = (
            f'<line x1="{x(row.low):.1f}" x2="{x(row.high):.1f}" y1="{y}" y2="{y}" '
            f'stroke="{COLOURS[0]}" stroke-width="2"/>'
        )
        middle = f'<circle cx="{x(row.mean):.1f}" cy="{y}" r="4" fill="{COLOURS[0]}"/>'
        parts += [_text(LEFT - 8, y + 4, row.name, "end"), line, middle]
    return _svg(height, parts)


def timeline(dots: Sequence[Dot], end: float) -> str:
    """Draw what happened when, one row for each kind; times in days."""
    rows = list(dict.fromkeys(sorted(dot.row for dot in dots)))
    height = TOP + 20 * len(rows) + BOTTOM

    def x(at: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * at / end

    parts = [_across(TOP + 20 * n + 10, row) for n, row in enumerate(rows)]
    for dot in dots:
        n = rows.index(dot.row)
        colour = COLOURS[n % len(COLOURS)]
        parts.append(
            f'<circle cx="{x(dot.at):.1f}" cy="{TOP + 20 * n + 10}" r="3.5" fill="{colour}" '
            f'fill-opacity="0.7"><title>{escape(dot.told)}</title></circle>'
        )
    days = max(int(end), 1)
    parts += [_below(x(day), height, f"day {day}") for day in range(0, days + 1, _stride(days))]
    return _svg(height, parts)


def _rounded(low: float, high: float) -> tuple[float, float]:
    """Return limits with some air, never equal."""
    air = max((high - low) * 0.08, 0.05)
    return max(low - air, 0.0), high + air


def _stride(days: int) -> int:
    return max(days // 9, 1)


def _across(y: float, words: str) -> str:
    line = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{FAINT}"/>'
    return line + _text(LEFT - 8, y + 4, words, "end")


def _below(x: float, height: float, words: str) -> str:
    return _text(x, height - 12, words, "middle")


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{INK}">{escape(words)}</text>'
    )


def _svg(height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}" '
        f'role="img" xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12">'
        f"{''.join(parts)}</svg>"
    )
