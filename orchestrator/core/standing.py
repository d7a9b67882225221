"""What is known against a device, and what follows from it: verdicts, only ever added.

Whoever holds the ledger of verdicts (worlds.devices), shows it (cli.devices) or admits a node by it
(core.devices) asks here. What a verdict does is a table; who may give it is another one. Verdicts
of several runs and operators stand in one order, so one that came too late finds a device in a
standing in which it has nothing to change: it is kept, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Literal

import msgspec

from orchestrator.protocol.ids import NodeId, Serial

STRIKES = 2
"""Convictions that retire a device. Source: reference targets, a second confirmed strike."""
STRIKES_DAYS = 90
"""Within so many days of each other. Source: the same. A fault came back a month after a reboot had
made it pass every test (AEGIS, OSDI 2026)."""
_DAY_S = 86_400.0


class Standing(StrEnum):
    """Where a device stands. Whatever no verdict was given about is healthy, as far as is known."""

    HEALTHY = "healthy"
    SUSPECT = "suspect"
    """Something points to it, and proves nothing: it is seated like any other, if later."""
    QUARANTINED = "quarantined"
    RETEST = "retest"
    """It may come back once it has computed what is known beforehand, where it is."""
    PROBATION = "probation"
    """It has, which shows little: it gets a seat if nobody else is free, and is watched. Where
    nothing looks for wrong state it stays so until somebody releases it."""
    RETIRED = "retired"

    @property
    def barred(self) -> bool:
        """Whether its node gets no seat."""
        return self in (Standing.QUARANTINED, Standing.RETEST, Standing.RETIRED)


class Act(StrEnum):
    """What a verdict says."""

    SUSPECTED = "suspected"
    CONVICTED = "convicted"
    RELEASED = "released"
    PASSED = "passed"
    CLEARED = "cleared"
    RETIRED = "retired"


class Proof(StrEnum):
    """What a conviction rests on. Suspicion is none, however strong: it evicts nobody."""

    NONE = ""
    REPLAY = "replay"
    """Others computed the same once more, and it came out otherwise."""
    VOTE = "vote"
    """A majority of those that hold the same has something else."""
    SELF_CHECK = "self-check"
    """It computed the same more than once, and came to other bits."""
    HARDWARE = "hardware"
    """Its own error counters, as the kernel reports them."""
    PREFLIGHT = "preflight"
    """It computed what is known beforehand, and it came out otherwise."""


Actor = Literal["controller", "preflight", "operator"]

S, A = Standing, Act
TRANSITIONS: dict[Act, dict[Standing, Standing]] = {
    A.SUSPECTED: {S.HEALTHY: S.SUSPECT},
    A.CONVICTED: {
        S.HEALTHY: S.QUARANTINED,
        S.SUSPECT: S.QUARANTINED,
        S.RETEST: S.QUARANTINED,
        S.PROBATION: S.QUARANTINED,
    },
    A.RELEASED: {
        S.SUSPECT: S.HEALTHY,
        S.QUARANTINED: S.RETEST,
        S.PROBATION: S.HEALTHY,
        S.RETIRED: S.RETEST,
    },
    A.PASSED: {S.RETEST: S.PROBATION},
    A.CLEARED: {S.SUSPECT: S.HEALTHY, S.PROBATION: S.HEALTHY},
    A.RETIRED: {standing: S.RETIRED for standing in S if standing is not S.RETIRED},
}
"""Where a verdict takes a device from where it stands; nowhere if that is not named. The second
conviction within 90 days takes it to `retired` (`fold`). Of one fault there may be several proofs,
by several runs: what is convicted before it was released is no more convicted than it was."""
ACTORS: dict[Act, tuple[Actor, ...]] = {
    A.SUSPECTED: ("controller",),
    A.CONVICTED: ("controller", "preflight"),
    A.RELEASED: ("operator",),
    A.PASSED: ("preflight", "operator"),
    A.CLEARED: ("controller",),
    A.RETIRED: ("operator",),
}
"""Who may say so."""


class DeviceVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """One verdict about a device, as it is kept."""

    serial: Serial
    act: Act
    actor: Actor
    by: str
    """Who it was, in words."""
    reason: str
    proof: Proof = Proof.NONE
    kind: str = ""
    """Of the device (protocol.devices.Device)."""
    model: str = ""
    run: str = ""
    incident: str = ""
    node: NodeId = NodeId("")
    at: float
    """When it was put on record, seconds since 1970 by the clock of who did it."""
    id: str
    """Whoever says it again says it under the same name, and it is kept once."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What follows from all verdicts about a device."""

    serial: Serial
    standing: Standing = Standing.HEALTHY
    why: str = ""
    """Reason of the verdict that brought it there."""
    since: float = 0.0
    """When that was given, as `DeviceVerdict.at`."""
    convicted_at: tuple[float, ...] = ()
    """When it was convicted, oldest first."""
    verdicts: int = 0


def refusal(verdict: DeviceVerdict) -> str:
    """Say why nobody may give such a verdict, whatever it is about; "" if it may be given."""
    if verdict.actor not in ACTORS[verdict.act]:
        return f"{verdict.act} is for {' or '.join(ACTORS[verdict.act])}, not for {verdict.actor}"
    if verdict.act is Act.CONVICTED and verdict.proof is Proof.NONE:
        return "nobody is convicted without a proof"
    return ""


def fold(verdicts: Iterable[DeviceVerdict]) -> dict[Serial, Record]:
    """Return what follows from verdicts, in the order in which they were kept."""
    records: dict[Serial, Record] = {}
    for verdict in verdicts:
        before = records.get(verdict.serial) or Record(serial=verdict.serial)
        records[verdict.serial] = _after(before, verdict)
    return records


def _after(record: Record, verdict: DeviceVerdict) -> Record:
    counted = msgspec.structs.replace(record, verdicts=record.verdicts + 1)
    if refusal(verdict):
        return counted
    then = TRANSITIONS[verdict.act].get(record.standing)
    convicted_at = record.convicted_at
    if verdict.act is Act.CONVICTED and then is not None:
        since = verdict.at - STRIKES_DAYS * _DAY_S
        lately = [at for at in convicted_at if at >= since]
        convicted_at = (*convicted_at, verdict.at)
        if len(lately) + 1 >= STRIKES:
            then = Standing.RETIRED
    counted = msgspec.structs.replace(counted, convicted_at=convicted_at)
    if then is None or then is record.standing:
        return counted
    return msgspec.structs.replace(counted, standing=then, why=verdict.reason, since=verdict.at)


def mermaid() -> str:
    """Return the tables as a mermaid state diagram."""
    lines = ["stateDiagram-v2", "    [*] --> healthy"]
    for act, moves in TRANSITIONS.items():
        who = ", ".join(ACTORS[act])
        lines += [
            f"    {before} --> {after}: {act} ({who})"
            for before, after in moves.items()
            if before is not after
        ]
    convicted = TRANSITIONS[Act.CONVICTED]
    lines += [f"    {before} --> retired: {STRIKES} convictions" for before in convicted]
    return "\n".join(lines)


if __name__ == "__main__":
    print(mermaid())  # noqa: T201 - this is what the command is for
