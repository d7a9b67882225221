"""Whom the ranks of a world that stands still wait for.

Letters in array names: G groups, R ranks of the world.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from orchestrator.core.fleet import Fleet
from orchestrator.core.state import RunState
from orchestrator.detect import waiting
from orchestrator.protocol.groups import ALL, kind_of
from orchestrator.protocol.ids import Rank
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.phases import RankPhase
from orchestrator.protocol.ramp import uneven

SPINNING_SHARE = 0.5
"""Of the time since it last moved, the part for which a rank used a processor."""
TOLD_MAX = 4
"""Members of a group that are named when somebody is said to wait with them."""


def culprits(state: RunState, overdue_R: npt.NDArray[np.bool_] | None = None) -> tuple[Rank, ...]:
    """Return the ranks that the others wait for; all of them empty-handed if none stands out.

    Ranks blocked in a collective sleep; one that burns its processor is not waiting. Failing
    that, who waits in another collective than those that wait in the same place, by what they say
    it is; who has not entered the collective that the others wait in; if all have, who came to
    collectives in another order, or is somewhere else than most; and if nobody counts collectives,
    who is in a phase that it announced, or else behind the others.

    Args:
        state: of the run.
        overdue_R: ranks that have been in a phase that they announced for longer than it may take.
    """
    fleet = state.fleet
    world = len(fleet.phase_R)
    idle_R = np.maximum(state.now - fleet.moved_at_R, 1e-6)
    spinning_R = (fleet.cpu_s_R - fleet.cpu_at_move_s_R) / idle_R > SPINNING_SHARE
    spinning_R &= fleet.phase_R != RankPhase.DONE
    place_R = fleet.step_R * len(RankPhase) + fleet.phase_R
    behind_R = place_R == place_R.min()
    earliest_R = fleet.moved_at_R <= fleet.moved_at_R.min() + state.timeouts.beat_s
    longer_R = np.zeros(world, np.bool_) if overdue_R is None else overdue_R
    for suspect_R in (spinning_R, *_apart(state), longer_R, behind_R, earliest_R):
        count = int(suspect_R.sum())
        if 0 < count <= world // 2:
            return tuple(Rank(int(rank)) for rank in np.flatnonzero(suspect_R))
    return ()


def _apart(state: RunState) -> Iterator[npt.NDArray[np.bool_]]:
    """Yield who never joined what others wait in, and who is where few are, as far as is known."""
    fleet = state.fleet
    # Who is done waits for the others in no collective.
    counts_R = (fleet.entered_R >= 0) & (fleet.phase_R != RankPhase.DONE)
    if not bool(counts_R.any()):
        return
    world = len(counts_R)
    alike_R = stages(state.run.layout, world)
    counts, names = waiting.gathered(fleet.groups.values(), world)
    counts = counts.where(counts_R[counts.rank])
    yield _mask(waiting.strangers(counts), world)
    programs_R = _alike(state, alike_R)
    kind_M = kinds(names)[counts.group] * (int(programs_R.max()) + 1) + programs_R[counts.rank]
    yield _mask(waiting.strangers_to_peers(counts, kind_M), world)
    if _tells_apart(fleet):
        waits_R = counts_R & (fleet.entered_R > fleet.left_R)
        elsewhere_R = waits_R & ~_mask(counts.rank[counts.waits], world)
        yield _mask(waiting.culprits_among(counts, world, elsewhere_R), world)
        # Who waits for nobody at all, if it is not known what the others wait in.
        yield counts_R & ~waits_R
        yield _mask(_out_of_order(state, alike_R, counts, names), world)
    else:
        yield _mask(_of_one_count(state, alike_R, counts_R), world)
    if not alike_R.any():
        # Several stages of a pipeline are never at the same place.
        yield _mask(waiting.minority(fleet.step_R * len(RankPhase) + fleet.phase_R), world)


def _tells_apart(fleet: Fleet) -> bool:
    """Whether any rank counts collectives by process group."""
    return any(group != ALL for group, _ in fleet.groups)


def _out_of_order(
    state: RunState,
    alike_R: npt.NDArray[np.int64],
    counts: waiting.Counts,
    names: list[str],
) -> npt.NDArray[np.int64]:
    """Return who left out a collective and went on, of ranks that run the same program."""
    entered_KR, waits_KR = by_kind(counts, names, len(alike_R))
    return left_out(entered_KR, waits_KR, _alike(state, alike_R))


def left_out(
    entered_KR: npt.NDArray[np.int64],
    waits_KR: npt.NDArray[np.bool_],
    alike_R: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Return who left out a collective and went on, as far as where it came to, or by order, tells.

    Args:
        entered_KR: as `by_kind` returns it.
        waits_KR: likewise.
        alike_R: a number of each rank's program, shape [R].
    """
    told_R = (entered_KR >= 0).any(axis=0)
    teams = [np.flatnonzero(told_R & (alike_R == each)) for each in np.unique(alike_R)]
    by_place = [
        ranks_N[waiting.out_of_place(entered_KR[:, ranks_N], waits_KR[:, ranks_N])]
        for ranks_N in teams
    ]
    if any(map(len, by_place)):
        return np.concatenate(by_place)
    by_order = [ranks_N[waiting.out_of_order(entered_KR[:, ranks_N])] for ranks_N in teams]
    return np.concatenate(by_order)


def by_kind(
    counts: waiting.Counts, names: list[str], world: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return how many collectives of each kind of group ranks have entered, and where they wait.

    Both of shape [K, R]; -1 where a rank is in none; connections are none.
    """
    kind_G = kinds(names)
    shape = int(kind_G.max(initial=-1)) + 1, world
    entered_KR, waits_KR = np.full(shape, -1), np.zeros(shape, np.bool_)
    kept = counts.where(~counts.apart)
    where = kind_G[kept.group], kept.rank
    entered_KR[where], waits_KR[where] = kept.entered, kept.waits
    return entered_KR, waits_KR


def kinds(names: list[str]) -> npt.NDArray[np.int64]:
    """Return a number of the kind of each group, shape [G]."""
    numbers = {kind: k for k, kind in enumerate(dict.fromkeys(map(kind_of, names)))}
    return np.array([numbers[kind_of(name)] for name in names], np.int64)


def _alike(state: RunState, alike_R: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return of each rank which others run the same program, given the stages of the pipeline."""
    if uneven(state.run, state.replicas):
        # A replica that computes more enters more of them for good: its ranks tell of each other.
        return alike_R * state.replicas + replicas(state.run.layout, len(alike_R))
    return alike_R


def _of_one_count(
    state: RunState, alike_R: npt.NDArray[np.int64], counts_R: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """Return who never joined, of ranks that count all their collectives as one sequence."""
    alike_R = _alike(state, alike_R)
    member_GR = (alike_R == np.unique(alike_R)[:, None]) & counts_R
    entered_GR, left_GR = (
        np.broadcast_to(column_R, member_GR.shape)
        for column_R in (state.fleet.entered_R, state.fleet.left_R)
    )
    return waiting.culprits(entered_GR, left_GR, member_GR)


def _mask(ranks: npt.NDArray[np.int64], world: int) -> npt.NDArray[np.bool_]:
    mask_R = np.zeros(world, np.bool_)
    mask_R[ranks] = True
    return mask_R


@lru_cache(maxsize=4)
def stages(layout: Layout, world: int) -> npt.NDArray[np.int64]:
    """Return the stage of the pipeline of each rank, shape [R]: those of one take equal steps."""
    return np.array([layout.position(rank).pp for rank in range(world)], np.int64)


@lru_cache(maxsize=4)
def replicas(layout: Layout, world: int) -> npt.NDArray[np.int64]:
    """Return the replica of each rank, shape [R]: its ranks always take equal shares."""
    return np.array([layout.replica_of(rank) for rank in range(world)], np.int64)


def collective(state: RunState, rank: Rank) -> str:
    """Say how many collectives a rank has entered and left, and in which others wait."""
    entered, left = int(state.fleet.entered_R[rank]), int(state.fleet.left_R[rank])
    if entered < 0:
        return ""
    if told := _in_groups(state.fleet, rank):
        return told
    if told := _otherwise(*waiting.gathered(state.fleet.groups.values(), len(state.seats)), rank):
        return told
    there = f"waits in collective {entered}" if entered > left else f"is in none after {left}"
    waits_R = state.fleet.entered_R > state.fleet.left_R
    most = int(state.fleet.entered_R[waits_R].max(initial=-1))
    return f", {there}" + (f", others wait in {most}" if most > entered else "")


def _in_groups(fleet: Fleet, rank: Rank) -> str:
    """Say the same by process group, of one in which others wait for it; "" if there is none."""
    if all(group == ALL for group, _ in fleet.groups):
        return ""
    counts, names = waiting.gathered(fleet.groups.values(), len(fleet.entered_R))
    mine_M = counts.rank == rank
    if told := _otherwise(counts, names, rank):
        return told
    where = [names[group] for group in counts.group[mine_M & counts.waits]]
    there = f", waits in {where[0]}" if where else ", is in no collective"
    behind: list[tuple[int, int]] = []
    for group in counts.group[mine_M]:
        here_M = counts.group == group
        entered = int(counts.entered[mine_M & here_M][0])
        if (here_M & counts.waits & (counts.entered > entered)).any():
            behind.append((int(here_M.sum()), int(group)))
    if not behind:
        return there
    # In the smallest of them those wait that nobody else stands between.
    _, group = min(behind)
    here_M = counts.group == group
    entered = int(counts.entered[mine_M & here_M][0])
    ahead_M = here_M & counts.waits & (counts.entered > entered)
    return (
        f"{there}, has entered {entered} of {names[group]} and {_who_wait(counts.rank[ahead_M])} "
        f"there in {int(counts.entered[ahead_M].max())}"
    )


def _otherwise(counts: waiting.Counts, names: list[str], rank: Rank) -> str:
    """Say in what a rank waits in the place of what others wait in; "" if it does not."""
    for at in np.flatnonzero((counts.rank == rank) & counts.waits & (counts.what > 0)):
        group, entered, what = counts.group[at], int(counts.entered[at]), counts.what[at]
        there_M = (counts.group == group) & (counts.entered == entered) & counts.waits
        others_M = there_M & (counts.what > 0) & (counts.what != what)
        if counts.apart[at] or not others_M.any():
            continue
        most = np.bincount(counts.what[others_M]).argmax()
        return (
            f", waits in {entered} of {names[group]} for {counts.titles[what]} and "
            f"{_who_wait(counts.rank[others_M & (counts.what == most)])} there for "
            f"{counts.titles[most]}"
        )
    return ""


def _who_wait(ranks: npt.NDArray[np.int64]) -> str:
    told = list(map(str, ranks))
    others = ", ".join(told[:TOLD_MAX])
    if len(told) > TOLD_MAX:
        others += f" and {len(told) - TOLD_MAX} more"
    return f"rank {others} waits" if len(told) == 1 else f"ranks {others} wait"
