"""How soon a rank that becomes slow is found, and how often one that is not.

    python -m tests.bench.stragglers [--steps 10000] [--trials 50] [--json]

The detector's rule (orchestrator/detect/straggler.py) on simulated steps: what a rank takes for the
same work, by both clocks alike, varies from step to step by 2, 5 or 10 %, normally or with heavy
tails (Student's t of three degrees of freedom); 3, 8 and 64 peers; beats of one, four or ten steps.
Exit code 1 if sound ranks whose steps vary by 5 % or less are suspected more than once in 10,000
steps, or if one that takes 1.15 times as long is found later than 20 steps (of ten steps a beat,
four beats) more often than once of 20 times, where steps vary by 2 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from orchestrator.core.paces import WINDOWS, WINDOWS_MIN, Paces
from orchestrator.detect.straggler import suspects
from orchestrator.protocol.ids import Rank

TIMES = (1.1, 1.15, 1.25)
WITHIN, GIVEN_UP = 20, 200
"""Steps."""
PER = 10_000
"""Steps in which suspicions are counted."""


class Kind(NamedTuple):
    """Of worlds."""

    beat: int
    """Steps that a beat covers."""
    noise: float
    """Standard deviation of what a rank takes for a step, of its mean."""
    heavy: bool
    """Whether it has heavy tails."""
    peers: int


KINDS = tuple(map(Kind._make, product((1, 4, 10), (0.02, 0.05, 0.1), (False, True), (3, 8, 64))))


class World:
    """Ranks that take steps, and who of them is suspected.

    Args:
        kind: how they do.
        rng: what it draws from.
    """

    def __init__(self, kind: Kind, rng: np.random.Generator) -> None:
        self._kind, self._rng = kind, rng
        self._paces, self._alike = Paces(kind.peers), np.zeros(kind.peers, np.int64)
        self._done = 0
        self._slow_from: int | None = None
        self._times = 1.0

    def look(self) -> set[Rank]:
        """Take the steps of a beat, and return who is suspected then."""
        beat, noise, heavy, peers = self._kind
        drawn = (
            self._rng.standard_t(3, (beat, peers))
            if heavy
            else self._rng.normal(size=(beat, peers))
        )
        # A t of three degrees of freedom has a variance of three.
        took_s = np.maximum(1 + noise * drawn / (3**0.5 if heavy else 1), 0.1)
        if self._slow_from is not None:
            took_s[self._done + np.arange(beat) >= self._slow_from, 0] *= self._times
        self._done += beat
        pace_s = tuple(took_s.mean(axis=0).tolist())
        self._paces.observe((self._done,), pace_s, (0.0,), busy_s=pace_s)
        return set(suspects(self._paces, self._alike)[1]) if self._paces.full else set()

    def suspicions(self, steps: int) -> int:
        """Return how often sound ranks come to be suspected in some steps.

        Whoever is so again within some looks is so once, as the detector has it.
        """
        found, known = 0, dict[Rank, int]()
        for look in range(steps // self._kind.beat):
            for rank in self.look():
                found += look > known.get(rank, -1)
                known[rank] = look + WINDOWS
        return found

    def found_after(self, times: float) -> float:
        """Return after how many steps a rank is found that takes so many times as long."""
        for _ in range(2 * WINDOWS):
            self.look()
        # It becomes so anywhere in a beat.
        self._times = times
        self._slow_from = onset = self._done + int(self._rng.integers(self._kind.beat))
        while self._done - onset < GIVEN_UP:
            if Rank(0) in self.look():
                return self._done - onset
        return float("inf")


def row(kind: Kind, steps: int, trials: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return what came of worlds of a kind."""
    found = World(kind, rng).suspicions(steps) * PER / steps
    soon: dict[str, Any] = {}
    for times in TIMES:
        after = [World(kind, rng).found_after(times) for _ in range(trials)]
        soon[f"{times:g}"] = {
            "p50": _quantile(after, 0.5),
            "p95": _quantile(after, 0.95),
            "within_20": sum(steps <= WITHIN for steps in after) / trials,
        }
    return {**kind._asdict(), "suspicions": found, "found": soon}


def _quantile(after: list[float], share: float) -> float | None:
    """Return a quantile, none of the numbers in between; None if those were given up."""
    steps = float(np.quantile(after, share, method="higher"))
    return steps if np.isfinite(steps) else None


def is_good(found: dict[str, Any]) -> bool:
    """Whether a row is as it should be, of those that something is promised of."""
    within = max(WITHIN, (WINDOWS_MIN + 1) * found["beat"])
    p95 = found["found"]["1.15"]["p95"]
    late = found["noise"] <= 0.02 and (p95 is None or p95 > within)
    often = found["noise"] <= 0.05 and found["suspicions"] > 1
    return not late and not often


def main() -> int:
    """Run, print what was found, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000, help="of sound ranks (default 10000)")
    parser.add_argument("--trials", type=int, default=50, help="of each slow rank (default 50)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    rows = []
    for number, kind in enumerate(KINDS):
        rng = np.random.Generator(np.random.Philox(key=[arguments.seed, number]))
        rows.append(row(kind, arguments.steps, arguments.trials, rng))
        if not arguments.json:
            print(_line(rows[-1]), flush=True)
    if arguments.json:
        print(json.dumps(rows))
    return 0 if all(map(is_good, rows)) else 1


def _line(found: dict[str, Any]) -> str:
    tails = "heavy" if found["heavy"] else "normal"
    soon = "; ".join(
        f"{times}: {it['p50'] or '-'} and {it['p95'] or '-'}, {100 * it['within_20']:.0f} %"
        for times, it in found["found"].items()
    )
    return (
        f"{found['beat']} steps a beat, {100 * found['noise']:.0f} % {tails}, {found['peers']} "
        f"peers: {found['suspicions']:g} suspicions; {soon}"
    )


if __name__ == "__main__":
    sys.exit(main())
