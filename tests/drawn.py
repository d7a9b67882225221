"""Draws fault plans by seed: any kinds, any steps from first to last, at least three of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from orchestrator.faults.catalogue import CATALOGUE, KINDS

LASTING: dict[str, str] = {
    "slow-rank": "1s",
    "partition-node": "4s",
    "full-disk": "1s",
    "slow-disk": "1s",
}
"""How long what lasts does; a frozen rank stays frozen until something is done about it."""
_TRAINERS = (
    "flip-bit",
    "wrong-matmul",
    "overload-rank",
    "stall-data",
    "skip-collective",
    "mismatch-collective",
)
_LIKE_OTHERS = ("block-rank", "throttle-rank", "read-only-disk")
DRAWN = tuple(kind for kind in KINDS if kind not in (*_TRAINERS, *_LIKE_OTHERS))
"""Not what takes a spare for good each time: plans are drawn with as many as nodes are lost. Nor
what only the embedded trainer can commit, or what shows as `spin-rank`, `slow-rank` and `full-disk`
do."""
MARKED = ("exit-rank", "segfault-rank")
"""Kinds of which two near one step look like one fault that moves with the job: a poison step."""
APART = 3
"""Steps between two of these; one strikes while its rank does the step, or after it."""


def plan(seed: int, *, steps: int, nodes: int, ranks: int, spares: int) -> list[dict[str, Any]]:
    """Return three to five faults that a run with so many spares can survive.

    Args:
        seed: of the plan.
        steps: of the run.
        nodes: with a seat at the start; the spares come on top.
        ranks: of the world.
        spares: nodes that may be lost for good.
    """
    chance = np.random.Generator(np.random.Philox(seed))
    faults: list[dict[str, Any]] = []
    lost = 0
    for _ in range(int(chance.integers(3, 6))):
        kind = DRAWN[int(chance.integers(len(DRAWN)))]
        if kind == "lose-node":
            if lost == spares:
                kind = "kill-agent"  # one more loss and the run could only give up
            lost += 1
        step = int(chance.integers(steps + 1))
        while kind in MARKED and _near(step, kind, faults):
            step = int(chance.integers(steps + 1))
        fault: dict[str, Any] = {"when": {"step": step}, "fault": kind}
        target = CATALOGUE[kind].target
        if target == "rank":
            fault["rank"] = int(chance.integers(ranks))
        elif target == "node":
            fault["node"] = f"node-{int(chance.integers(nodes))}"
        if kind in LASTING:
            fault["for"] = LASTING[kind]
        if kind == "spin-rank":
            fault["holdGil"] = bool(chance.integers(2))
        faults.append(fault)
    return faults


def _near(step: int, kind: str, faults: list[dict[str, Any]]) -> bool:
    same = [fault["when"]["step"] for fault in faults if fault["fault"] == kind]
    return any(abs(step - other) <= APART for other in same)
