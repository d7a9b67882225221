"""Whether a checkpoint is cut as the world is, and what becomes of one that is not.

Somebody may have given a run other sizes before it was run again. Whoever then reads what is its
own of all shards can go on from it; a program that knows one shard, its own, can not.
"""

from __future__ import annotations

from orchestrator.core.state import RunState
from orchestrator.protocol.cutting import cut_of, in_shards
from orchestrator.protocol.runfile import EMBEDDED


def needed(state: RunState) -> str:
    """Say from what into what the checkpoint that was found is to be cut; "" if it fits."""
    found, wanted = state.found, cut_of(state.run)
    assert found is not None
    if found.cut is not None and _can(state):
        fits = found.cut == wanted
    else:
        # Sizes of another program's world may mean anything, and older records do not have them.
        fits = found.shards in (0, wanted.shards)
    return "" if fits else f"from {found.cut or in_shards(found.shards)} into {wanted}"


def refused(state: RunState) -> str:
    """Say why a run does not go on from the checkpoint that was found; "" if that can be."""
    assert state.found is not None
    if _can(state) or not needed(state):
        return ""
    shards = state.found.shards
    return (
        f"the checkpoint of step {state.found.step} has {in_shards(shards)} and this run has "
        f"{state.shard_count()}, and its program does not cut a state anew (the embedded trainer "
        f"does)\nhint: set spec.nodes and spec.parallelism so that ranks / dpReplicate is {shards},"
        " or choose another spec.checkpoint.uri to begin anew"
    )


def _can(state: RunState) -> bool:
    return state.run.spec.trainer.entrypoint == EMBEDDED
