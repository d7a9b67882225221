"""Computes steps of a run once more, from a state that is good, until they come to other bits.

A journal has digests of what each step began with and of its gradient, if all ranks that hold the
same had the same. So it shows since when they all had the wrong ones: no replica differs then. The
steps are computed in a world of their own, on this machine, cut as the run was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from orchestrator.campaign.world import LiveWorld
from orchestrator.core.decisions import StartGeneration
from orchestrator.core.events import Telemetry
from orchestrator.core.incident import rank_words
from orchestrator.core.journal import Entry
from orchestrator.detect.votes import parting
from orchestrator.protocol.digests import Kind
from orchestrator.protocol.ids import Rank, Step
from orchestrator.protocol.runfile import Detection, TrainingRun
from orchestrator.protocol.trials import Quiet, Resume, Return, Train


class Recorded(NamedTuple):
    """What a journal says of the steps that led to where its run stands."""

    parts: dict[Step, str]
    """By step, ascending: what its digests are made of (votes.parts_of_world)."""
    cut_anew: tuple[Step, ...]
    """After which steps the world had another number of replicas, whose bits are other ones."""


class Start(NamedTuple):
    """What is known to be good, or taken for it."""

    step: Step
    name: str
    """In words."""
    store: str = ""
    """Address of the store of the checkpoint; "" for the seed."""
    commit: str = ""
    """Key of its commit record."""


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What came of computing steps once more."""

    start: str
    """Where it began, in words."""
    first: Step
    last: Step
    """The last step that was computed."""
    compared: int
    """Of how many of them the journal has digests."""
    step: Step | None = None
    """The first that came to other bits in the run; None if none did."""
    kinds: tuple[Kind, ...] = ()
    """Of what of it the digests differ."""
    shards: tuple[int, ...] = ()
    """Those shards of it; none if it is more than one, or not known which."""
    ranks: tuple[Rank, ...] = ()
    """Who holds them."""
    means: str = ""
    """What that says of the culprit, in words."""


def recorded(run: TrainingRun, entries: Iterable[Entry]) -> Recorded:
    """Return what a journal has of each step; of one that was done again, the last time."""
    parts: dict[Step, str] = {}
    cut_anew: list[Step] = []
    for entry in entries:
        if isinstance(entry.event, Telemetry):
            parts.update((step, text) for step, text in entry.event.parts if text)
        for order in entry.decisions:
            if not isinstance(order, StartGeneration):
                continue
            restored = order.restore.step if order.restore else Step(0)
            parts = {step: text for step, text in parts.items() if step <= restored}
            if len(order.seats) != run.world_size and not run.same_bits:
                cut_anew.append(restored)
    return Recorded(dict(sorted(parts.items())), tuple(cut_anew))


def bisect(
    run: TrainingRun,
    told: Recorded,
    start: Start,
    folder: Path,
    taken: Callable[[Step], None] = lambda _: None,
) -> Found:
    """Compute steps of a run once more until one comes to other bits; return which that is.

    From a state that is good no search is shorter: whatever is to be said of a step, all steps
    before it have to be computed.

    Args:
        run: whose.
        told: of it, by its journal.
        start: with what to begin.
        folder: for what is needed on the way.
        taken: hears of each step that was computed.

    Raises:
        WorldBrokenError: if the steps can not be computed here.
    """
    ends = [step for step in told.cut_anew if step >= start.step]
    last = min([max(told.parts, default=start.step), run.spec.trainer.steps, *ends])
    first, compared, step = Step(start.step + 1), 0, start.step
    tokens = folder / "tokens"
    tokens.mkdir(parents=True)
    with LiveWorld(_digesting(run), folder / "world", tokens) as world:
        _begin(world, start)
        while step < last:
            step = Step(step + 1)
            world.order(Quiet(steps=1))
            own = world.parts(step).get(step, "")
            taken(step)
            if not own or step not in told.parts:
                continue
            compared += 1
            if differs := parting(told.parts[step], own, run.layout):
                return _found(run, start, Step(step), compared, differs)
    return Found(start=start.name, first=first, last=Step(last), compared=compared)


def _begin(world: LiveWorld, start: Start) -> None:
    generation = world.next_generation()
    if start.commit:
        world.order(Resume(store=start.store, commit=start.commit, generation=generation))
    else:
        world.order(Train(steps=0, snapshot=0))
        world.order(Return(snapshot=0, generation=generation))


def _digesting(run: TrainingRun) -> TrainingRun:
    """Return a run of which nothing is looked for: digests are taken as often as they were."""
    share = run.spec.detection.digest_share
    detection = Detection(digest_share=share, update_share=0.0, replay_share=0.0, repair=False)
    spec = msgspec.structs.replace(run.spec, detection=detection)
    return msgspec.structs.replace(run, spec=spec)


def _found(
    run: TrainingRun, start: Start, step: Step, compared: int, differs: dict[Kind, tuple[int, ...]]
) -> Found:
    layout, told = run.layout, set(differs.values())
    # Where there is one shard only, it is no news that it is the one.
    shards = told.pop() if len(told) == 1 and layout.shard_count > 1 else ()
    ranks = tuple(
        Rank(layout.rank_of(shard, replica))
        for shard in shards
        for replica in range(layout.dp_replicate)
    )
    return Found(
        start=start.name,
        first=Step(start.step + 1),
        last=step,
        compared=compared,
        step=step,
        kinds=tuple(differs),
        shards=shards,
        ranks=tuple(sorted(ranks)),
        means=_meaning(step, start, tuple(differs), sorted(ranks)),
    )


def _meaning(step: Step, start: Start, kinds: tuple[Kind, ...], ranks: list[Rank]) -> str:
    """Say what may have done it, of what comes to pass between two digests."""
    holders = ", ".join(rank_words(ranks))
    if kinds == ("gradient",):
        if ranks:
            return (
                f"step {step} began with the right state, and the summed gradient of one shard "
                f"alone is wrong: where {holders} add it up, rather than on one rank, whose wrong "
                "products reach all shards"
            )
        return (
            f"step {step} began with the right state, and its summed gradient is wrong: one of "
            "all ranks computed wrongly in that step, was handed other samples, or summed wrongly; "
            "what one rank put in is not on record"
        )
    state = " and ".join(kind for kind in kinds if kind != "gradient")
    if step == start.step + 1:
        return f"{start.name} is not the state that ranks had after step {start.step}: {state}"
    where = f" on {holders} alike" if holders else " on all that hold it alike"
    return (
        f"step {step - 1} was given what is right, and {state} came out of it otherwise{where}: by "
        "its update, or by something that wrote to memory before the next one; who computes "
        "gradients wrongly does not do that"
    )
