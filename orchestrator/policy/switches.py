"""Policies that a run can do without, by name: to measure what each of them is worth."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import msgspec

from orchestrator.core.plans import Policy
from orchestrator.core.state import RunState
from orchestrator.protocol.runfile import TrainingRun

PLANNED_SWAP = "planned-swap"
LEMON_RETIREMENT = "lemon-retirement"
QUARANTINE_FIRST = "quarantine-first"
OVER_EVICTION = "over-eviction"
SHRINK = "shrink"
STRAGGLER_SWAP = "straggler-swap"
LINK_SWAP = "link-swap"
CADENCE = "cadence"
MEMORY_FIRST = "memory-first"
EXPECTED_LOSS = "expected-loss"
SWITCHABLE: dict[str, str] = {
    PLANNED_SWAP: "a node that is to be free is swapped for a spare when that costs least; without "
    "it, it is kept until it is lost",
    LEMON_RETIREMENT: "a node that failed far more often than others gets a seat only if no other "
    "node is free; without it, it is a spare like any other",
    QUARANTINE_FIRST: "a node that may have corrupted the state gives its seats to a spare at "
    "once; without it, it keeps them until that is proven, or it is suspected again",
    OVER_EVICTION: "when ranks hang or lose each other again within an hour, whoever may be at "
    "fault gives its seats to spares; without it, everybody starts in place",
    SHRINK: "without a node in place of one that is gone, the run goes on with fewer replicas, as "
    "far as spec.recovery.minReplicas lets it; without it, it waits",
    STRAGGLER_SWAP: "a node whose device was measured to be slow gives its seats to a spare when "
    "that costs less than to keep it; without it, it is only reported",
    LINK_SWAP: "a node whose own network is slow gives its seats to a spare when steps wait longer "
    "since then, and that has cost as much as the swap; without it, it is only reported",
    "straggler": "ranks that are slower than their peers are found and measured; without it, all "
    "wait for them and nobody knows",
    CADENCE: "with spec.checkpoint.every `auto`, a run saves as often as the cost of saves and the "
    "rate of its interruptions say; without it, as often as in the beginning",
    "back-off": "after a restart that brought no new step the next one waits; without it, it comes "
    "at once",
    "stop-poison": "a fault that moves with the job ends it; without it, only the budget does",
    "hang": "ranks that stand still are found; without it, only what ends or falls silent is",
    MEMORY_FIRST: "a restart goes on from what nodes hold in memory if that is the newest state; "
    "without it, from the durable tier, once that has a checkpoint",
    EXPECTED_LOSS: "whether to wait for a node or to go on with fewer replicas, and when to grow "
    "back, is up to which is expected to lose less; without it, both are done at once",
}
"""What each of them does, and what happens without; the names stand in `spec.recovery.disable`."""


class UnknownPolicyError(ValueError):
    """There is no policy of that name that could be switched off.

    Attributes:
        hint: the nearest there is, or what else to do.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"no policy {name!r}, expected some of {', '.join(SWITCHABLE)}")
        near = difflib.get_close_matches(name, SWITCHABLE, 1, 0.5)
        self.hint = f"did you mean `{near[0]}`?" if near else "leave it out to use every policy"


def name_of(policy: Policy) -> str:
    """Return the name of a rule of the ladder."""
    return getattr(policy, "__name__", type(policy).__name__).replace("_", "-")


def check(names: Iterable[str]) -> None:
    """Refuse to do without a policy that there is not: it would be taken for measured.

    Raises:
        UnknownPolicyError: naming the first that there is not.
    """
    for name in names:
        if name not in SWITCHABLE:
            raise UnknownPolicyError(name)


def enabled(state: RunState, name: str) -> bool:
    """Whether the run makes use of a policy."""
    return name not in state.run.spec.recovery.disable


def without(run: TrainingRun, names: Iterable[str]) -> TrainingRun:
    """Return the same run without policies, in addition to those it does without already.

    Raises:
        UnknownPolicyError: naming the first that there is not.
    """
    disable = tuple(sorted({*run.spec.recovery.disable, *names}))
    check(disable)
    recovery = msgspec.structs.replace(run.spec.recovery, disable=disable)
    spec = msgspec.structs.replace(run.spec, recovery=recovery)
    return msgspec.structs.replace(run, spec=spec)
