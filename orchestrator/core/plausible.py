"""Whether a state that is wholly written is one: of one step, not the one before once more, finite.

Its bytes are what was staged, that is checked elsewhere. What is asked here is whether what was
staged can be right, from a few bytes that agents say of each shard (messages.Impression). What can
not is not committed: nobody would want to resume from it, and training goes on to the next one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from orchestrator.core.state import RunState
from orchestrator.protocol import coverage
from orchestrator.protocol.ids import Step
from orchestrator.protocol.messages import Impression

RMS_FACTOR = 100.0
"""Weights of a shard that have become larger or smaller by this, on average, since the checkpoint
before: no optimizer does that."""
RMS_LEAST = 1e-6
"""Weights that are smaller than this on average may begin anywhere."""
TOLD_MAX = 3


def doubts(state: RunState, step: Step) -> list[str]:
    """Return what is wrong with the state after a step; nothing if agents do not say enough.

    Each names shard, what was expected and what was found; `TOLD_MAX` of a kind at most.
    """
    reports = state.written.get(step, {}).values()
    by_shard = {seen.shard: seen for report in reports for seen in report.impressions}
    if len(by_shard) < state.shard_count():
        return []
    found = [_torn(by_shard), _incomplete(by_shard), _unsound(by_shard)]
    if state.replicas_agreed:
        found.append(_split(state, step, by_shard))
    if state.vouched is not None and state.vouched[0] != step:
        before, known = state.vouched
        found += [_recut(by_shard, known, before), _stale(by_shard, known, step, before)]
        found.append(_leapt(by_shard, known, before))
    return [text for texts in found for text in _some(texts)]


def unanimous(state: RunState, step: Step) -> str:
    """Say that every shard of a step has the same content on all replicas; "" if it is not known.

    One replica alone vouches for nobody.
    """
    if state.vouched is None or state.vouched[0] != step or state.replicas <= 1:
        return ""
    known, votes = state.vouched[1], state.votes.get(step, {})
    for shard in range(state.shard_count()):
        others = votes.get(shard, {})
        if shard not in known or len(others) < state.replicas - 1:
            return ""
        if any(content != known[shard].content for content in others.values()):
            return ""
    return f"{state.replicas} replicas have the same bytes of all {state.shard_count()} shards"


def dissent(state: RunState, step: Step) -> str:
    """Say which replica has other bytes than a checkpoint; "" if none that spoke has."""
    if state.vouched is None or state.vouched[0] != step or not state.replicas_agreed:
        return ""
    return "; ".join(_some(_split(state, step, state.vouched[1])))


def _some(texts: Iterable[str]) -> list[str]:
    all_of_them = list(texts)
    more = len(all_of_them) - TOLD_MAX
    return all_of_them[:TOLD_MAX] + ([f"and {more} more like it"] if more > 0 else [])


def _torn(by_shard: Mapping[int, Impression]) -> Iterator[str]:
    """Shards of different steps: what counts them lies beside the tensors."""
    (usual, count), *_ = Counter(seen.extra for seen in by_shard.values()).most_common(1)
    for shard, seen in sorted(by_shard.items()):
        if seen.extra != usual:
            yield (
                f"torn: shard {shard} has counters {seen.extra}, expected {usual} as {count} of "
                f"{len(by_shard)} shards have"
            )


def _incomplete(by_shard: Mapping[int, Impression]) -> Iterator[str]:
    """Shards that are no whole state together, though each is what was staged."""
    if coverage.missing(seen.gap for seen in by_shard.values()):
        whose = sorted(shard for shard, seen in by_shard.items() if seen.gap)
        yield (
            f"layout: expected the boxes of {len(by_shard)} shards to have every item of each "
            f"tensor equally often, found some missing or twice; not whole by itself: shard "
            f"{', '.join(map(str, whose[:TOLD_MAX]))}{' and more' * (len(whose) > TOLD_MAX)}"
        )


def _unsound(by_shard: Mapping[int, Impression]) -> Iterator[str]:
    for shard, seen in sorted(by_shard.items()):
        for chunk in seen.bad:
            yield f"not finite: expected numbers, found others in {chunk} of shard {shard}"


def _recut(
    by_shard: Mapping[int, Impression], known: Mapping[int, Impression], before: Step
) -> Iterator[str]:
    """Shards that cover something else than they did: together they are the whole state no more."""
    for shard, seen in sorted(by_shard.items()):
        if shard in known and seen.boxes != known[shard].boxes:
            yield (
                f"layout: shard {shard} has boxes {seen.boxes}, expected {known[shard].boxes} as "
                f"in step {before}"
            )


def _stale(
    by_shard: Mapping[int, Impression], known: Mapping[int, Impression], step: Step, before: Step
) -> Iterator[str]:
    for shard, seen in sorted(by_shard.items()):
        if seen.moving and shard in known and seen.moving == known[shard].moving:
            yield (
                f"stale: the optimizer's chunks of shard {shard} are those of step {before}, "
                f"expected others {abs(step - before)} steps away, found xxh3-128 {seen.moving}"
            )


def _leapt(
    by_shard: Mapping[int, Impression], known: Mapping[int, Impression], before: Step
) -> Iterator[str]:
    for shard, seen in sorted(by_shard.items()):
        was = known[shard].rms if shard in known else -1.0
        if seen.bad or was < RMS_LEAST or seen.rms < 0:
            continue
        if not was / RMS_FACTOR <= seen.rms <= was * RMS_FACTOR:
            yield (
                f"out of proportion: weights of shard {shard} are {seen.rms:.3g} on average, "
                f"expected about {was:.3g} as in step {before}"
            )


def _split(state: RunState, step: Step, by_shard: Mapping[int, Impression]) -> Iterator[str]:
    """Replicas that have other bytes than the one whose shards are written."""
    for shard, others in sorted(state.votes.get(step, {}).items()):
        if shard not in by_shard:
            continue
        content = by_shard[shard].content
        for node, other in sorted(others.items()):
            if other != content:
                yield (
                    f"replicas differ: shard {shard} is xxh3-128 {content} as written, "
                    f"{other} on {node}"
                )
