"""The report of a run: what became of it, what it cost, and whether what was claimed was true.

Pure: everything is computed from the state, so the report of a journal is the same whoever asks
and whenever. Faults of a plan are the ground truth here, and only here: nobody decides by them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import msgspec
import xxhash

from orchestrator.core.incident import (
    CORRUPTION,
    GROWTH,
    REPAIR,
    SLOW_LINK,
    STRAGGLER,
    Finding,
    Incident,
)
from orchestrator.core.phases import Bucket
from orchestrator.core.state import RunState
from orchestrator.core.trust import why_not
from orchestrator.protocol.fitting import EMBEDDED
from orchestrator.protocol.ids import Generation, IncidentId, NodeId, Rank, Seconds, Step
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.protocol.stacks import Stack

SHOWS_AS: dict[str, frozenset[str]] = {
    "kill-rank": frozenset({"crash"}),
    "exit-rank": frozenset({"exception", "crash"}),
    "segfault-rank": frozenset({"crash"}),
    "freeze-rank": frozenset({"hang"}),
    "spin-rank": frozenset({"hang"}),
    "block-rank": frozenset({"hang"}),
    "skip-collective": frozenset({"hang"}),
    "mismatch-collective": frozenset({"hang"}),
    "slow-rank": frozenset({"hang", STRAGGLER}),
    "throttle-rank": frozenset({STRAGGLER}),
    "overload-rank": frozenset({STRAGGLER}),
    "stall-data": frozenset({"hang", STRAGGLER}),
    "slow-link": frozenset({SLOW_LINK}),
    "kill-agent": frozenset({"node-lost", "node-silent"}),
    "lose-node": frozenset({"node-lost", "node-silent"}),
    "partition-node": frozenset({"node-silent", "node-lost", "broken-collective"}),
    "kill-controller": frozenset({"controller-restart"}),
    "corrupt-shard": frozenset({"unrestorable"}),
    "full-disk": frozenset(),
    "read-only-disk": frozenset(),
    "slow-disk": frozenset(),
    "flip-bit": frozenset({CORRUPTION, REPAIR}),
    "wrong-matmul": frozenset({CORRUPTION}),
}
"""Kinds of incident by which each planned fault (faults.catalogue) may become known. Disk faults
make saves fail, which is no incident."""

WITNESSED = frozenset(
    {
        "crash",
        "exception",
        "misconfigured",
        "node-lost",
        "unrestorable",
        "controller-restart",
        "planned",
        CORRUPTION,
        REPAIR,
        GROWTH,
        STRAGGLER,
        SLOW_LINK,
    }
)
"""Kinds of incident that rest on something that happened."""

INFERRED = frozenset({"hang", "node-silent", "broken-collective"})
"""Kinds that are concluded from silence or from standing still, hence false alarms if nothing was
broken. A kind that is in neither set is treated like these."""

NO_NUMBER = struct.pack("<d", float("nan"))
"""Stands for a loss that was not finite."""


class IncidentReport(msgspec.Struct, frozen=True, kw_only=True):
    """One incident. Spans are seconds since it began, None for what never came."""

    id: IncidentId
    kind: str
    cause: str
    suspects: list[str]
    began_s: float
    """On the run's clock."""
    detected_after_s: float
    decided_after_s: float | None
    first_step_after_s: float | None
    rung: str
    lost_steps: int
    reason: str
    generation: Generation
    """The generation that it broke."""
    reached_step: Step
    restored_step: Step | None
    restored_from: str
    durable_reads: int
    """How often the durable tier was asked for anything, searching for or reading a checkpoint."""
    evidence: list[str]
    ledger: dict[str, float]
    """Seconds charged to it, buckets without any left out."""
    faults: list[int]
    """Planned faults that explain it, by index."""
    false_alarm: bool
    stacks: tuple[Stack, ...]
    """Where ranks stood that stood still, the place with the fewest first."""
    unseen: dict[NodeId, str]
    """Nodes that could not say it of all their ranks, and why."""


class FaultReport(msgspec.Struct, frozen=True, kw_only=True):
    """One fault of the plan that was let loose."""

    index: int
    description: str
    target: str
    at_s: float
    found_by: IncidentId | None
    found_after_s: float | None


class CheckpointReport(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint of the durable tier."""

    step: Step
    epoch: Generation
    key: str
    at_s: float
    rejected: str


class SaveFailure(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that came to nothing, or was passed over."""

    at_s: float
    step: Step
    reason: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about a run that a person or a tool may want afterwards.

    The result (final step, digests, losses and what is doubtful of them) is that of the whole
    lineage. Times, ledger, incidents, and what was counted are those of this life of the run.
    """

    run: str
    state: str
    """Succeeded, Failed or Stopped; the phase of a run that is not over."""
    reason: str
    final_step: Step
    steps: Step
    """That the run has in all."""
    final_state_digest: str | None
    """Of the whole training state, however it is sharded; None until every rank is done."""
    reduction: str
    """How the embedded trainer adds gradients up, `fast` or `deterministic`; "" for another one."""
    losses_digest: str
    """Of the exact bits of every loss of the final lineage, with its step."""
    losses: list[tuple[Step, float | None]]
    losses_missing: list[Step]
    """Steps of the final lineage that nobody reported, beyond what a life whose journal is not in
    this folder computed."""
    ettr: float
    """Effective over wall clock; training with fewer replicas counts by its share of full speed."""
    wall_s: float
    ledger: dict[str, float]
    """Seconds per bucket; in microseconds they sum to `wall_s` exactly."""
    replicas: int
    """Of the last world."""
    replicas_least: int
    """The fewest of any."""
    generations: int
    generation: Generation
    """The last one."""
    controllers: int
    tokens_per_s: float
    rungs: dict[str, int]
    incidents: list[IncidentReport]
    false_alarms: int
    """Incidents that no planned fault and no death explains."""
    faults: list[FaultReport]
    checkpoints: list[CheckpointReport]
    save_failures: list[SaveFailure]
    divergences: list[Step]
    """Steps that gave another loss when they were computed again; a sound run has none."""
    digests_differ: list[Step]
    """Steps that had other bits of state or gradient when they were computed again; the same."""
    replicas_differ: list[int]
    """Ranks whose final state is not that of the replica that it repeats."""


def report(state: RunState) -> Report:
    """Return the report of a run as it stands."""
    losses = final_losses(state)
    incidents = incident_reports(state)
    return Report(
        run=state.run.metadata.name,
        state=state.end_state or str(state.phase),
        reason=state.end_reason,
        final_step=state.reached_step,
        steps=Step(state.run.spec.trainer.steps),
        final_state_digest=state_digest(state),
        reduction=reduction(state.run),
        losses_digest=losses_digest(losses),
        losses=losses,
        losses_missing=_missing(state),
        ettr=round(state.ledger.effective_ratio, 6),
        wall_s=state.ledger.end_us / 1e6,
        ledger={str(bucket): us / 1e6 for bucket, us in state.ledger.totals().items()},
        replicas=state.replicas,
        replicas_least=min([state.replicas, *(r.after for r in state.resizes)]),
        generations=sum(state.rungs.values()),
        generation=state.generation,
        controllers=state.incarnation,
        tokens_per_s=round(state.tokens_per_s, 3),
        rungs=dict(sorted(state.rungs.items())),
        incidents=incidents,
        false_alarms=sum(incident.false_alarm for incident in incidents),
        faults=fault_reports(state),
        checkpoints=[
            CheckpointReport(
                step=c.step,
                epoch=c.epoch,
                key=c.key,
                at_s=c.at,
                rejected=c.rejected or why_not(state.onsets, c.step, c.epoch),
            )
            for c in state.commits
        ],
        save_failures=[
            SaveFailure(at_s=at, step=step, reason=reason)
            for at, step, reason in state.save_failures
        ],
        divergences=sorted(set(state.divergences)),
        digests_differ=sorted(set(state.digests_differ)),
        replicas_differ=_replicas_differ(state),
    )


def reduction(run: TrainingRun) -> str:
    """Return how the embedded trainer adds gradients up; "" of another trainer, who knows."""
    trainer = run.spec.trainer
    return trainer.reduction if trainer.entrypoint == EMBEDDED else ""


# Digests ------------------------------------------------------------------------------------


def state_digest(state: RunState) -> str | None:
    """Return the digest of the final training state as 32 hex digits; None if ranks are missing.

    Replicas repeat the shards of the first; each shard counts once, so that the digest does not
    depend on how many replicas there were.
    """
    ranks = [Rank(rank) for rank in state.run.layout.ranks_of(replica=0)]
    if any(rank not in state.lanes for rank in ranks):
        return None
    first, second = (sum(lanes) for lanes in zip(*(state.lanes[r] for r in ranks), strict=True))
    return f"{first % 2**64:016x}{second % 2**64:016x}"


def _replicas_differ(state: RunState) -> list[int]:
    """Compare replicas; one that reports (0, 0) leaves it to the first to speak for its shard."""
    layout = state.run.layout
    return [
        rank
        for rank, lanes in sorted(state.lanes.items())
        if lanes != (0, 0)
        and lanes != state.lanes.get(Rank(layout.rank_of(layout.shard_of(rank))), lanes)
    ]


def final_losses(state: RunState) -> list[tuple[Step, float | None]]:
    """Return (step, loss) of every step that is part of the final result, ascending."""
    return [(step, state.losses[step]) for step in sorted(state.losses) if step <= _last(state)]


def losses_digest(losses: Iterable[tuple[Step, float | None]]) -> str:
    """Return the xxh3-128 over step (u64) and loss (f64), little-endian, as 32 hex digits."""
    digest = xxhash.xxh3_128()
    for step, loss in losses:
        digest.update(struct.pack("<Q", step))
        digest.update(NO_NUMBER if loss is None else struct.pack("<d", loss))
    return digest.hexdigest()


def _missing(state: RunState) -> list[Step]:
    first = state.untold_step + 1
    return [Step(step) for step in range(first, _last(state) + 1) if step not in state.losses]


def _last(state: RunState) -> Step:
    return state.reached_step


# Whether what was claimed was true ------------------------------------------------------------


def explain(state: RunState) -> dict[int, tuple[IncidentId, Seconds]]:
    """Return, for each planned fault that was found, the incident and when it was.

    A finding uses up the oldest fault that was injected before it, may show in this way, and is
    aimed at a rank or node that the finding names (at any, if it names nobody). Each fault
    explains one finding: after a recovery, a second one needs a second reason.
    """
    found: dict[int, tuple[IncidentId, Seconds]] = {}
    for incident in state.incidents:
        for finding in incident.findings:
            for index, (at, text, target) in sorted(state.injected.items(), key=_by_time):
                if index not in found and at <= finding.at and _fits(finding, text, target):
                    found[index] = (incident.id, finding.at)
                    break
    return found


def _by_time(item: tuple[int, tuple[Seconds, str, str]]) -> tuple[Seconds, int]:
    return item[1][0], item[0]


def _fits(finding: Finding, description: str, target: str) -> bool:
    kinds = SHOWS_AS.get(description.partition(" ")[0])
    if kinds is not None and finding.kind not in kinds:
        return False
    named = {f"rank {rank}" for rank in finding.ranks} | set(finding.nodes)
    return not named or target in named


def is_false_alarm(incident: Incident, explained: dict[int, tuple[IncidentId, Seconds]]) -> bool:
    """Whether nothing that was broken on purpose and nothing that died explains the incident."""
    if any(finding.kind in WITNESSED for finding in incident.findings):
        return False
    return all(by != incident.id for by, _ in explained.values())


# Parts ----------------------------------------------------------------------------------------


def incident_reports(state: RunState) -> list[IncidentReport]:
    """Return what there is to say about each incident, oldest first."""
    explained = explain(state)
    return [_incident(state, incident, explained) for incident in state.incidents]


def _incident(
    state: RunState, incident: Incident, explained: dict[int, tuple[IncidentId, Seconds]]
) -> IncidentReport:
    def after(at: Seconds | None) -> float | None:
        return None if at is None else round(at - incident.since, 6)

    return IncidentReport(
        id=incident.id,
        kind=incident.kind,
        cause=str(incident.cause),
        suspects=[f"rank {rank}" for rank in incident.ranks] + list(incident.nodes),
        began_s=incident.since,
        detected_after_s=round(incident.detected_at - incident.since, 6),
        decided_after_s=after(incident.decided_at),
        first_step_after_s=after(incident.resumed_at),
        rung=incident.rung,
        lost_steps=incident.lost_steps,
        reason=incident.reason,
        generation=incident.generation,
        reached_step=incident.reached_step,
        restored_step=incident.restored_step,
        restored_from=incident.restored_from,
        durable_reads=sum(incident.reads.values()),
        evidence=[finding.evidence for finding in incident.findings],
        ledger=cost(state, incident),
        faults=[index for index, (by, _) in sorted(explained.items()) if by == incident.id],
        false_alarm=is_false_alarm(incident, explained),
        stacks=incident.stacks,
        unseen=incident.unseen,
    )


def cost(state: RunState, incident: Incident) -> dict[str, float]:
    """Return the seconds that an incident cost, by bucket; buckets without any are left out."""
    totals = state.ledger.totals(incident.id)
    return {
        str(bucket): us / 1e6
        for bucket, us in totals.items()
        if us and bucket is not Bucket.EFFECTIVE
    }


def fault_reports(state: RunState) -> list[FaultReport]:
    """Return the planned faults that were let loose so far, by index, with what found them."""
    explained = explain(state)
    reports = []
    for index, (at, text, target) in sorted(state.injected.items()):
        incident, found_at = explained.get(index, (None, None))
        reports.append(
            FaultReport(
                index=index,
                description=text,
                target=target,
                at_s=at,
                found_by=incident,
                found_after_s=None if found_at is None else round(found_at - at, 6),
            )
        )
    return reports
