"""Runs of several replicas, some of whose nodes are gone."""

from collections.abc import Callable
from typing import Any

from orchestrator.core import drains
from orchestrator.core.decisions import StartGeneration
from orchestrator.core.events import ControllerStarted, DrainRequested
from orchestrator.core.state import RunState
from orchestrator.policy import shrinking
from orchestrator.protocol.ids import NodeId, Rank, Step
from orchestrator.protocol.messages import Holding, ShardsHeld
from tests import runfiles
from tests.conftest import Cluster

Wide = Callable[..., Cluster]
WARMUP = {"detectWithin": "10s", "warmupLimit": "30s"}


def wide(
    replicas: int,
    nodes_each: int,
    *,
    spares: int = 0,
    least: int = 1,
    stages: int = 1,
    off: tuple[str, ...] = (),
    **sections: Any,
) -> Cluster:
    """Return a run that trains with so many replicas of some nodes of one rank each."""
    text = runfiles.text(
        nodes={"count": replicas * nodes_each, "ranksPerNode": 1, "spares": spares},
        parallelism={"dpReplicate": replicas, "pp": stages},
        trainer={"steps": 1000, "globalBatch": 240, "microBatch": 1},
        recovery={"minReplicas": least, "disable": list(off)},
        **sections,
    )
    cluster = Cluster(text)
    cluster.tell(ControllerStarted(at=cluster.at(), incarnation=1))
    for index in range(replicas * nodes_each + spares):
        cluster.join(f"node-{index}")
    started(cluster.found())
    cluster.resume()
    cluster.train(5)
    hold(cluster, 5)
    return cluster


def hold(cluster: Cluster, step: int) -> None:
    """Every node holds its own shard and that of the node before it."""
    world = cluster.state.world
    for place, node in enumerate(world):
        ranks = (place, (place - 1) % len(world))
        held = tuple(Holding(Rank(rank), Step(step)) for rank in ranks)
        cluster.say(node, ShardsHeld(generation=cluster.state.generation, holdings=held))


def started(decisions: list[Any]) -> StartGeneration:
    (order,) = [d for d in decisions if isinstance(d, StartGeneration)]
    return order


def started_none(decisions: list[Any]) -> bool:
    return not [d for d in decisions if isinstance(d, StartGeneration)]


def nodes(*numbers: int) -> tuple[str, ...]:
    return tuple(f"node-{number}" for number in numbers)


def shrunk(wide: Wide, *off: str) -> Cluster:
    """Three of four replicas of one node, node-1 being gone."""
    cluster = wide(4, 1, off=off)
    cluster.lose("node-1")
    cluster.resume()
    cluster.train(3)
    hold(cluster, cluster.state.reached_step)
    return cluster


def until_it_pays(cluster: Cluster) -> None:
    at = shrinking.grows_at(cluster.state, 4)
    cluster.after(at - cluster.now)


def drain(state: RunState, node: str) -> None:

    drains.request(state, DrainRequested(at=state.now, nodes=(NodeId(node),), by="ann"))
