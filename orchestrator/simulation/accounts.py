"""What the lost time of a run was lost to: the controller's ledger, beside what was let loose.

Faults are the ground truth of an experiment, and only here they meet what the controller made of
them: an incident is laid at the door of the newest fault before it that is of one of its nodes or
of no node, or else of the newest one; and one that nothing good was found to recover from, at that
of the incident which was to be recovered from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

import msgspec
import numpy as np

from orchestrator.core.incident import STRAGGLER, UNRESTORABLE, Incident
from orchestrator.core.ledger import Ledger
from orchestrator.core.phases import Bucket
from orchestrator.core.state import RunState
from orchestrator.policy.arithmetic import DAY_S
from orchestrator.protocol.ids import IncidentId
from orchestrator.simulation.struck import Struck

NOBODY = "nothing that was let loose"
NO_INCIDENT = "no incident"
LOOKS_BACK_S = 3_600.0
"""How old a fault may be, or the news of it; far longer than the longest limit of a run."""
_OF_SLOW = (STRAGGLER, "planned")
"""Kinds of incidents that a slow node leads to: it is found, and swapped when that pays."""
_INTERRUPTS = ("seen", "silent", "planned", "mistaken")


Causes = Mapping[IncidentId, Struck | None]


class Charge(msgspec.Struct, frozen=True, kw_only=True):
    """Time that was lost to incidents of one kind, after faults of one class."""

    fault: str
    incident: str
    count: int
    seconds: dict[str, float]
    """By bucket of the ledger."""


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """One incident, for the time line."""

    at_s: float
    fault: str
    incident: str
    rung: str
    lost_s: float


def causes(state: RunState, log: Sequence[Struck]) -> dict[IncidentId, Struck | None]:
    """Return the fault behind each incident; None if nothing that was let loose explains it."""
    known = [(_known_at(struck), n) for n, struck in enumerate(log) if struck.sort in _INTERRUPTS]
    known.sort()
    faults = [log[n] for _, n in known]
    at_s = np.array([at for at, _ in known])
    slowed = [struck for struck in log if struck.sort == "slow" and struck.nodes]
    found: dict[IncidentId, Struck | None] = {}
    before: Incident | None = None
    for incident in state.incidents:
        last, before = before, incident
        if incident.kind == UNRESTORABLE and last is not None and _recovers(last, incident):
            # No other fault: what the recovery from it was to go on from was no good.
            found[incident.id] = found[last.id]
            continue
        if incident.kind in _OF_SLOW and (slow := _slowed(incident, slowed)) is not None:
            found[incident.id] = slow
            continue
        end = int(np.searchsorted(at_s, incident.detected_at + 1e-6, side="right"))
        found[incident.id] = _cause(incident, faults[:end])
    return found


def _recovers(last: Incident, incident: Incident) -> bool:
    """Whether nothing was recovered from yet when the next incident was found."""
    return last.resumed_at is None or last.resumed_at > incident.detected_at


def _known_at(struck: Struck) -> float:
    """Return when there was anything to be seen of a fault; infinite for never."""
    if struck.found_at is not None:
        return struck.found_at
    return inf if struck.sort == "silent" else struck.at


def _cause(incident: Incident, faults: Sequence[Struck]) -> Struck | None:
    named, newest = set(incident.nodes), None
    for struck in reversed(faults):
        if incident.detected_at - _known_at(struck) > LOOKS_BACK_S:
            break
        if not (named and struck.nodes) or named & set(struck.nodes):
            return struck
        newest = newest or struck
    return newest


def _slowed(incident: Incident, slowed: Sequence[Struck]) -> Struck | None:
    """Return what made a node slow that an incident names; it may have begun days before."""
    named = set(incident.nodes)
    return next((s for s in reversed(slowed) if _lasts(s, incident) and named & set(s.nodes)), None)


def _lasts(struck: Struck, incident: Incident) -> bool:
    """Whether a node was slow when an incident was found, or not long before."""
    over_at = inf if struck.until is None else struck.until + LOOKS_BACK_S
    return struck.at <= incident.detected_at <= over_at


def unnoticed_s(state: RunState, by: Causes) -> dict[IncidentId, float]:
    """Return for how long nobody knew of what became an incident, seconds, where that was hidden.

    Of a fault that a profile's habits hide, the controller is told late, and takes the time until
    then for work that is lost; in truth nothing was done, and it was to be detected.
    """
    hidden: dict[IncidentId, float] = {}
    costs = lost(state.ledger)
    told: set[int] = set()
    for incident in state.incidents:
        struck = by[incident.id]
        if struck is not None and struck.hidden_s > 0 and id(struck) not in told:
            told.add(id(struck))
            most_s = costs.get(incident.id, {}).get(Bucket.LOST_WORK, 0) / 1e6
            hidden[incident.id] = min(struck.hidden_s, most_s)
    return hidden


def lost(ledger: Ledger) -> dict[IncidentId | None, dict[Bucket, int]]:
    """Return microseconds by incident and bucket, what was effective left out."""
    found: dict[IncidentId | None, dict[Bucket, int]] = {}
    for part in ledger.parts():
        if part.bucket is not Bucket.EFFECTIVE:
            buckets = found.setdefault(part.incident, {})
            buckets[part.bucket] = buckets.get(part.bucket, 0) + part.us
    return found


def charges(state: RunState, by: Causes, late_s: dict[IncidentId, float]) -> list[Charge]:
    """Return what time was lost to, the most expensive first.

    Args:
        state: of the run.
        by: the fault behind each incident.
        late_s: what the controller took for lost work, and was spent on detecting.
    """
    kinds = {incident.id: incident.kind for incident in state.incidents}
    counts: dict[tuple[str, str], int] = {}
    for incident in state.incidents:
        key = (_name(by[incident.id]), incident.kind)
        counts[key] = counts.get(key, 0) + 1
    sums: dict[tuple[str, str], dict[str, int]] = {key: {} for key in counts}
    for incident_id, buckets in lost(state.ledger).items():
        key = (NOBODY, NO_INCIDENT)
        if incident_id is not None:
            key = (_name(by[incident_id]), kinds[incident_id])
            moved_us = round(late_s.get(incident_id, 0.0) * 1e6)
            if moved_us:
                buckets[Bucket.LOST_WORK] -= moved_us
                buckets[Bucket.DETECT] = buckets.get(Bucket.DETECT, 0) + moved_us
        into = sums.setdefault(key, {})
        for bucket, us in buckets.items():
            into[str(bucket)] = into.get(str(bucket), 0) + us
    told = [
        Charge(
            fault=fault,
            incident=kind,
            count=counts.get((fault, kind), 0),
            seconds={bucket: us / 1e6 for bucket, us in sorted(buckets.items())},
        )
        for (fault, kind), buckets in sums.items()
    ]
    return sorted(told, key=lambda c: (-sum(c.seconds.values()), c.fault, c.incident))


def moments(state: RunState, by: Causes) -> list[Moment]:
    """Return the incidents of a run by time, with what each of them cost."""
    costs = lost(state.ledger)
    return [
        Moment(
            at_s=incident.since,
            fault=_name(by[incident.id]),
            incident=incident.kind,
            rung=incident.rung,
            lost_s=sum(costs.get(incident.id, {}).values()) / 1e6,
        )
        for incident in state.incidents
    ]


def _name(struck: Struck | None) -> str:
    return NOBODY if struck is None else struck.name


def daily(ledger: Ledger, horizon_s: float) -> list[float]:
    """Return the effective share of each day of a run; the last one may be shorter."""
    spans = ledger.spans()
    starts = np.array([span.start_us for span in spans], np.float64) / 1e6
    ends = np.append(starts[1:], ledger.end_us / 1e6)
    speeds = [(span.bucket is Bucket.EFFECTIVE) * span.speed[0] / span.speed[1] for span in spans]
    # The effective time up to each moment is a line with a corner at every span.
    at_s = np.concatenate(([0.0], ends))
    passed_s = np.concatenate(([0.0], np.cumsum(speeds * (ends - starts))))
    edges = np.append(np.arange(0.0, horizon_s, DAY_S), horizon_s)
    reached = np.interp(edges, at_s, passed_s)
    return [float(share) for share in np.diff(reached) / np.diff(edges)]


def silent_s(log: Sequence[Struck], horizon_s: float) -> float:
    """Return for how long some node computed wrong numbers of which nobody knew, seconds."""
    total_s, until_s = 0.0, 0.0
    for struck in (each for each in log if each.sort == "silent"):
        end_s = horizon_s if struck.found_at is None else float(struck.found_at)
        total_s += max(end_s - max(struck.at, until_s), 0.0)
        until_s = max(until_s, end_s)
    return total_s
