"""What it takes this machine to word and encode the order of a restart for every node of a job.

The very objects of the controller do it, for jobs of any size; only nobody is at the other end.
"""

from __future__ import annotations

import time

import msgspec

from orchestrator.core.decisions import RestoreFrom, StartGeneration
from orchestrator.protocol.ids import Generation, NodeId, Step
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.worlds.addresses import Addresses
from orchestrator.worlds.links import Links
from orchestrator.worlds.orders import Orders

SAMPLE = 16
"""Nodes for which it is done; the others cost the same."""
ROUNDS = 4
"""Of so many, each with other nodes, the least counts: whatever else runs here only adds to it."""
GPUS_PER_NODE = 8


class _Nowhere:
    """A connection on which nobody listens."""

    def send(self, data: bytes) -> None:
        """Let it go."""

    def close(self, reason: str) -> None:
        """Be closed."""


def order_all_s(gpus: int) -> float:
    """Return seconds until the order of a restart is on its way to every node of a job."""
    nodes = [NodeId(f"node-{number}") for number in range(gpus // GPUS_PER_NODE)]
    decision = _restart(nodes)
    orders, addresses, links = Orders(_run(len(nodes))), Addresses(), Links()
    began = time.perf_counter()
    orders.start(decision)
    addresses.begin(decision)
    once_s = time.perf_counter() - began
    for node in nodes:
        links.join(node, _Nowhere())
        addresses.joined(node, f"{node}:40000")
    least_s = float("inf")
    for first in range(0, min(ROUNDS * SAMPLE, len(nodes)), SAMPLE):
        sample = nodes[first : first + SAMPLE]
        began = time.perf_counter()
        for node in sample:
            links.send(node, orders.begin_on(node, "1.1", addresses.news(node, links) or {}))
        least_s = min(least_s, (time.perf_counter() - began) / len(sample))
    return once_s + least_s * len(nodes)


def _restart(nodes: list[NodeId]) -> StartGeneration:
    half = len(nodes) // 2
    seats = tuple(node for node in nodes for _ in range(GPUS_PER_NODE))
    return StartGeneration(
        generation=Generation(2),
        reason="",
        seats=seats,
        dismiss=(),
        restore=RestoreFrom(step=Step(100), sources=seats, commit=""),
        buddies=dict(zip(nodes, [*nodes[half:], *nodes[:half]], strict=True)),
    )


def _run(nodes: int) -> TrainingRun:
    data = {
        "apiVersion": "holdfast.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": "orders"},
        "spec": {
            "nodes": {"count": nodes, "ranksPerNode": GPUS_PER_NODE},
            "parallelism": {"dpReplicate": 1, "dpShard": nodes * GPUS_PER_NODE},
        },
    }
    return msgspec.convert(data, TrainingRun)
