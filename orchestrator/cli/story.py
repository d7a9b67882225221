"""Events and decisions of a journal in words, one line each."""

from __future__ import annotations

from typing import assert_never

from orchestrator.cli import units
from orchestrator.core import repairs
from orchestrator.core.decisions import Decision, JudgeDevice, StartGeneration, WakeAt
from orchestrator.core.events import (
    CheckpointCommitted,
    CheckpointFound,
    CheckpointJudged,
    CommitFailed,
    Compared,
    ControllerStarted,
    CopiesHeld,
    DeviceJudged,
    DevicesKnown,
    DrainCancelled,
    DrainRequested,
    Event,
    FaultInjected,
    Inherited,
    NodeDisconnected,
    NodeLost,
    Reported,
    SearchFailed,
    StopRequested,
    Telemetry,
    Tick,
    Together,
)
from orchestrator.protocol.messages import (
    MARKS,
    BadCopy,
    DetectorFailed,
    Fact,
    FaultCarriedOut,
    FaultDue,
    Holding,
    Joined,
    LinkTimed,
    MendedCopy,
    NodeAiling,
    NodeUnusable,
    Preflighted,
    PreparationFailed,
    Prepared,
    RankExited,
    RankProbed,
    RanksFinished,
    RanksTroubled,
    Reached,
    RendezvousOffered,
    ShardsHeld,
    ShardsStaged,
    ShardsWritten,
    StacksTaken,
    StateDiverged,
    StateRepaired,
    WriteFailed,
)

DEVICES_TOLD = 4
"""Of those in the ledger; `holdfast get devices` has all."""


def kind(event: Event) -> str:
    """Return the name of what happened; of a report, the fact that was reported."""
    return type(event.fact if isinstance(event, Reported | Together) else event).__name__


def node(event: Event) -> str:
    """Return the node that an event is about, "" for none."""
    if isinstance(event, Reported | NodeLost | NodeDisconnected | FaultInjected):
        return str(event.node)
    return ""


def periodic(event: Event) -> bool:
    """Whether this kind of event comes again and again, whatever happens."""
    return isinstance(event, Telemetry | Tick)


def words(event: Event) -> str:  # noqa: C901, PLR0911, PLR0912 - one line per event
    """Return an event in words."""
    match event:
        case ControllerStarted(incarnation=incarnation):
            return f"controller {incarnation} took over"
        case Inherited(generation=generation, losses=losses):
            known = f"the losses of {_steps([s for s, _ in losses])}" if losses else "no loss"
            return f"a former life of this run ended in generation {generation}, with {known}"
        case Reported(node=name, fact=fact):
            return _fact(str(name), fact)
        case Together(nodes=names, fact=fact):
            who = units.count(len(names), "node") if names else "every node of the world"
            return _fact(who, fact)
        case CopiesHeld(step=step, copied=copied, missing=missing):
            whose = "its ranks', and those it is the buddy of" if copied else "its ranks'"
            apart = f", but for {', '.join(missing)}" if missing else ""
            return f"every node of the world holds the shards of step {step}: {whose}{apart}"
        case NodeDisconnected(node=name):
            return f"connection to {name} closed"
        case NodeLost(evidence=evidence):
            return evidence
        case Compared(fact=fact):
            return _compared(fact)
        case Telemetry(heard=heard, reports=reports):
            steps = f", completed {_steps([r.step for r in reports])}" if reports else ""
            return f"heard from {len(heard)} nodes{steps}"
        case CheckpointFound(step=step, key=key, rejected=rejected):
            found = "nothing to continue from" if step is None else f"step {step} ({key})"
            return f"durable tier has {found}" + "".join(f"; passed over {r}" for r in rejected)
        case SearchFailed(reason=reason):
            return f"durable tier did not answer: {reason}"
        case CheckpointCommitted(step=step, key=key):
            return f"checkpoint of step {step} is committed ({key})"
        case CommitFailed(step=step, reason=reason):
            return f"checkpoint of step {step} was not committed: {reason}"
        case CheckpointJudged(step=step, verdict=verdict, reason=reason):
            return f"checkpoint of step {step} is {verdict}: {reason}"
        case FaultInjected(description=text):
            return f"planned fault: {text}"
        case StopRequested(by=by):
            return f"stop requested by {by}"
        case DrainRequested(nodes=nodes, by=by, reason=reason, within_s=within_s):
            when = "" if within_s is None else f" within {units.seconds(within_s)}"
            why = f": {reason}" if reason else ""
            return f"{', '.join(nodes)} to be free{when}, asked for by {by}{why}"
        case DrainCancelled(nodes=nodes, by=by):
            return f"{', '.join(nodes)} may be used again, says {by}"
        case DevicesKnown(devices=devices, problem=problem):
            told = [f"{d.serial} is {d.standing}" for d in devices]
            known = "; ".join(told[:DEVICES_TOLD]) or "nothing against any device"
            more = len(told) - DEVICES_TOLD
            apart = f"; and {more} more" if more > 0 else ""
            return problem or f"the device ledger has {known}{apart}"
        case DeviceJudged(device=device):
            return f"device {device.serial} is {device.standing}: {device.why}"
        case Tick():
            return "time passed"
        case _:
            assert_never(event)


def _compared(fact: StateDiverged | DetectorFailed) -> str:
    if isinstance(fact, DetectorFailed):
        return off(fact)
    good = "no step is known to be good" if fact.since is None else f"step {fact.since} is good"
    return f"digests differ, {good}: {fact.evidence}"


def _fact(name: str, fact: Fact) -> str:  # noqa: C901, PLR0911, PLR0912 - one line per fact
    match fact:
        case Joined(incarnation=incarnation, generation=generation, mark=mark):
            at = f", {MARKS[mark]} in generation {generation}" if generation else ""
            return f"{name} joined as incarnation {incarnation}{at}"
        case Reached(generation=generation, mark=mark):
            return f"{name} {MARKS[mark]} in generation {generation}"
        case Prepared(step=step, own=own, fetched=fetched, durable=durable, seconds=spent):
            return (
                f"{name} has the state of step {step} after {units.seconds(spent)}: {own} ranks "
                f"from own memory, {fetched} from another node, {durable} from the durable tier"
            ) + "".join([*map(_mended, fact.mended), *map(_lacking, fact.lacking)])
        case PreparationFailed(step=step, tier=tier, reason=reason):
            return f"{name} can not read step {step} from {tier}: {reason}"
        case RendezvousOffered(generation=generation, address=address):
            return f"rank 0 offers the store of generation {generation} at {address}"
        case RankExited(rank=rank, code=code, step=step, kind=error, message=message):
            why = f": {error}: {message}" if error else ""
            return f"rank {rank} on {name} ended with code {code} after step {step}{why}"
        case RanksTroubled(ranks=ranks, message=message):
            return f"collectives failed under {_ranks(ranks)} on {name}: {message}"
        case ShardsHeld(holdings=holdings):
            return f"{name} holds {_holdings(holdings)}"
        case ShardsStaged(step=step, impressions=impressions):
            return f"{name} staged {len(impressions)} shards of step {step} that others write"
        case ShardsWritten(step=step, receipts=receipts):
            size = sum(receipt.size for receipt in receipts)
            return f"{name} wrote {len(receipts)} shards of step {step}, {units.size(size)}"
        case WriteFailed(step=step, reason=reason):
            return f"{name} could not write step {step}: {reason}"
        case RanksFinished(ranks=ranks, step=step):
            return f"{_ranks(ranks)} on {name} finished at step {step}"
        case NodeUnusable(reason=reason):
            return f"{name} is unusable: {reason}"
        case NodeAiling(symptoms=symptoms, unread=unread, lacking=lacking):
            said = [symptom.words for symptom in symptoms]
            said += [f"not all of it is read: {why}" for why in unread]
            said += [f"degraded: {why}" for why in lacking]
            return f"hardware of {name}: {'; '.join(said) or 'nothing any more'}"
        case StateDiverged(step=step, since=since, evidence=evidence):
            good = "no step is known to be good" if since is None else f"step {since} is good"
            return f"{name} found wrong state after step {step}, {good}: {evidence}"
        case StateRepaired(step=step, problem=problem):
            if problem:
                return f"{name}: state differs before step {step}, and stays so: {problem}"
            return f"{name}: {repairs.words(fact)}; {repairs.remedy(fact)}"
        case DetectorFailed():
            return off(fact)
        case RankProbed(rank=rank, speed=speed):
            told = f"{speed.operations / 1e9:.3g} Gop/s, {speed.copied / 1e9:.3g} GB/s"
            return f"rank {rank} on {name} measured {speed.problem or told}"
        case LinkTimed(to=to, bytes_per_s=rate):
            return f"copies from {name} reach {to} with {rate / 1e6:.3g} MB/s"
        case StacksTaken(stacks=stacks, problem=problem):
            seen = sum(len(stack.ranks) for stack in stacks)
            missing = f"; not of all: {problem}" if problem else ""
            return f"{name} saw where {units.count(seen, 'rank')} of it stood{missing}"
        case Preflighted(compared=compared, wrong=wrong, problem=problem):
            came = wrong or problem or "all of them right"
            return f"{name} compared {units.count(compared, 'answer')} for a preflight: {came}"
        case FaultDue(index=index):
            return f"planned fault {index} is due on {name}"
        case FaultCarriedOut(index=index, problem=problem):
            how = f"could not be carried out: {problem}" if problem else "was carried out"
            return f"planned fault {index} {how} on {name}"
        case _:
            assert_never(fact)


def _mended(copy: MendedCopy) -> str:
    by = {"": "the durable tier", "here": "its index"}.get(copy.origin, copy.origin)
    how = f"came damaged from {copy.sender}" if copy.sender else "had gone bad in memory"
    return (
        f"; of rank {copy.rank} {units.count(copy.chunks, 'chunk')}, {units.size(copy.size)}, "
        f"{how} and came from {by} ({copy.what})"
    )


def _lacking(bad: BadCopy) -> str:
    return f"; of rank {bad.rank}, step {bad.step} {bad.node} has no good copy ({bad.what})"


def decision(order: Decision) -> str:
    """Return a decision in words, with its reason."""
    text = type(order).__name__
    if isinstance(order, StartGeneration):
        text += f" {order.generation}"
    if isinstance(order, WakeAt):
        text += f" {units.clock(order.at)}"
    if isinstance(order, JudgeDevice):
        proof = f" by {order.proof}" if order.proof else ""
        text += f" {order.device.kind} {order.device.serial} is {order.act}{proof}"
    return f"{text}: {order.reason}"


def off(fact: DetectorFailed) -> str:
    """Return in words that a detector is switched off, and why."""
    where = f" on {_ranks(fact.ranks)}" if fact.ranks else ""
    return f"detector {fact.detector} was switched off{where}: {fact.reason}"


def _ranks(ranks: tuple[int, ...]) -> str:
    return f"rank{'s' if len(ranks) != 1 else ''} {', '.join(map(str, ranks)) or 'none'}"


def _steps(steps: list[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def _holdings(holdings: tuple[Holding, ...]) -> str:
    steps = sorted({holding.step for holding in holdings})
    return f"{len(holdings)} shards of {_steps(list(steps))}" if steps else "no shards"
