"""Searches seeds for what the controller gets wrong, and tells what came of it."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO

from orchestrator.cli import pool, units
from orchestrator.cli.choices import Form
from orchestrator.cli.tables import in_json
from orchestrator.simulation.swarm import Broken, Outcome, attempt

BATCH = 20
"""Seeds to a task: few enough to see progress, enough not to pay for it."""
PROGRESS_S = 2.0


@dataclass(slots=True)
class Search:
    """What came of the seeds that were tried."""

    seeds: int = 0
    events: int = 0
    generations: int = 0
    controllers: int = 0
    virtual_s: float = 0.0
    wall_s: float = 0.0
    states: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    failed: list[Broken] = field(default_factory=list)

    def take(self, results: Sequence[Outcome | Broken]) -> None:
        """Count what came of some seeds."""
        for result in results:
            self.seeds += 1
            if isinstance(result, Broken):
                self.failed.append(result)
                continue
            self.events += result.events
            self.generations += result.generations
            self.controllers += result.controllers
            self.virtual_s += result.virtual_s
            self.states[result.state] += 1
            if result.state != "Succeeded":
                self.reasons[result.reason.split(":")[0].rstrip("0123456789 ")] += 1


def search(seeds: range, *, jobs: int, progress: TextIO) -> Search:
    """Try every seed; whatever interrupts it leaves no process behind."""
    result, started = Search(), time.monotonic()
    told_at = started
    batches = [seeds[at : at + BATCH] for at in range(0, len(seeds), BATCH)]
    with contextlib.closing(pool.each(_batch, batches, jobs=jobs)) as results:
        for tried in results:
            result.take(tried)
            now = time.monotonic()
            if now - told_at > PROGRESS_S:
                told_at = now
                words = f"{result.seeds} of {len(seeds)} seeds, {len(result.failed)} failed"
                progress.write(f"{words}\n")
                progress.flush()
    result.failed.sort()
    result.wall_s = time.monotonic() - started
    return result


def _batch(seeds: range) -> list[Outcome | Broken]:
    return [attempt(seed) for seed in seeds]


def shown(result: Search, form: Form) -> str:
    """Return what came of a search in the asked form."""
    if form is Form.JSON:
        told = {
            "seeds": result.seeds,
            "failed": [{"seed": f.seed, "what": f.what} for f in result.failed],
            "states": dict(sorted(result.states.items())),
            "reasons": dict(sorted(result.reasons.items())),
            "events": result.events,
            "generations": result.generations,
            "controllers": result.controllers,
            "virtual_s": round(result.virtual_s, 3),
            "wall_s": round(result.wall_s, 3),
        }
        return in_json(told)
    tried = (
        units.count(result.seeds, "seed"),
        units.count(result.events, "event"),
        units.count(result.generations, "generation"),
        units.count(result.controllers, "controller"),
        f"{units.seconds(result.virtual_s)} of virtual time in {units.seconds(result.wall_s)}",
    )
    lines = [
        ", ".join(tried),
        *(f"  {count:6}  {state}" for state, count in sorted(result.states.items())),
        *(f"          {count:6}  {why}" for why, count in result.reasons.most_common()),
        f"  {len(result.failed):6}  broken",
    ]
    for broken in result.failed:
        lines += [
            f"seed {broken.seed}: {broken.what}",
            f"  holdfast simulate swarm --seed {broken.seed} --story",
        ]
    return "\n".join(lines)
