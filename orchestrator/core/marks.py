"""Keeps up how far nodes have come in a generation, and who is the least advanced."""

from __future__ import annotations

from orchestrator.core.records import Node
from orchestrator.core.state import RunState
from orchestrator.protocol.ids import NodeId


def world_mark(state: RunState) -> int:
    """Return how far the least advanced node of the world has come in this generation."""
    return state.lowest_mark


def moved(state: RunState, node: Node) -> None:
    """Keep up which node of the world is the least advanced, now that one is elsewhere."""
    if node.id not in state.seated:
        return
    mark = _mark_of(state, node.id)
    if mark < state.lowest_mark:
        state.lowest_mark, state.behind = mark, {node.id}
    elif mark == state.lowest_mark:
        state.behind.add(node.id)
    else:
        state.behind.discard(node.id)
        if not state.behind:
            find_lowest(state)


def find_lowest(state: RunState) -> None:
    """Look at all nodes of the world anew."""
    known, generation = state.nodes, state.generation
    world = map(known.__getitem__, state.seated)
    marks = [node.mark if node.generation == generation else 0 for node in world]
    lowest = state.lowest_mark = min(marks)
    if marks.count(lowest) == len(marks):
        state.behind = set(state.seated)
    else:
        marked = zip(state.seated, marks, strict=True)
        state.behind = {name for name, mark in marked if mark == lowest}


def _mark_of(state: RunState, name: NodeId) -> int:
    node = state.nodes[name]
    return node.mark if node.generation == state.generation else 0
