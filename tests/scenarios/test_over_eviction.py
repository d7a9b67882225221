"""Who leaves when ranks hang again and again, and nobody can say for certain whose fault it is."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from orchestrator.cli import listing
from orchestrator.core.decisions import StartGeneration
from orchestrator.policy import suspicion
from orchestrator.policy.suspicion import AGAIN_S, ASIDE_DAYS, aside, most
from orchestrator.policy.switches import OVER_EVICTION
from orchestrator.protocol.ids import NodeId, Rank
from orchestrator.protocol.messages import RanksTroubled
from tests import runfiles
from tests.conftest import Cluster
from tests.journals import assert_seated_last
from tests.runs import steps_job
from tests.simulated import SimulatedJob

WIDE: dict[str, Any] = {
    "nodes": {"count": 32, "ranksPerNode": 1, "spares": 4},
    "parallelism": {"dpReplicate": 16, "dpShard": 2},
    "trainer__steps": 120,
    "trainer__options": {"steps": 120, "step_s": 0.02},
}


def trained(cluster: Any) -> Any:
    cluster.start()
    cluster.train(5)
    cluster.hold(5)
    return cluster


def freeze(cluster: Any, *ranks: int) -> None:
    """Have the kernel show processes as stopped, until somebody does something about it."""
    generation = cluster.state.generation
    states = "".join("T" if r in ranks else "S" for r in range(4))
    while cluster.state.generation == generation and not cluster.state.wanting:
        cluster.after(1).beat(
            step=cluster.state.reached_step, moving=lambda _: False, states=states
        )


def trouble(cluster: Any, *nodes: str) -> None:
    """Have collectives fail, first on these nodes; everybody says so in the end."""
    generation = cluster.state.generation
    others = [node for node in cluster.state.world if node not in nodes]
    for node in (*nodes, *others):
        fact = RanksTroubled(generation=generation, ranks=(Rank(0),), message="reset by peer")
        cluster.after(0 if node in nodes else 2).say(node, fact)
    while cluster.state.generation == generation and not cluster.state.wanting:
        cluster.after(1).beat(step=cluster.state.reached_step)


def test_once_everybody_starts_in_place(cluster: Any) -> None:
    trained(cluster)
    freeze(cluster, 2)

    assert cluster.seated() == ("node-0", "node-1")
    assert cluster.state.incidents[-1].rung == "restart in place"


def test_a_node_that_is_named_again_within_the_hour_leaves_and_is_the_last_to_be_taken(
    cluster: Any,
) -> None:
    trained(cluster)
    freeze(cluster, 2)
    cluster.go_on()
    cluster.after(AGAIN_S / 2).beat(step=cluster.state.reached_step)
    freeze(cluster, 3)

    assert cluster.seated() == ("node-0", "node-2")
    incident = cluster.state.incidents[-1]
    assert (incident.rung, incident.evicted) == ("over-eviction", ("node-1",))
    assert "may be at fault, the second time within 60 min, and may be well" in incident.reason
    node = cluster.state.nodes[NodeId("node-1")]
    assert listing.condition(cluster.state, node) == "Spare"
    assert "put aside in inc-2: suspected of a hang" in listing.why(cluster.state, node)

    cluster.go_on()
    assert_seated_last(cluster, "node-1")


def test_a_node_that_was_put_aside_gives_its_seats_up_when_a_restart_finds_another(
    cluster: Any,
) -> None:
    trained(cluster)
    freeze(cluster, 2)
    cluster.go_on()
    freeze(cluster, 2)
    cluster.go_on()
    cluster.after(0.1).lose("node-0")
    assert cluster.seated() == ("node-1", "node-2")
    cluster.go_on()
    cluster.after(0.1).join("node-3")

    cluster.after(0.1).exit(2, step=cluster.state.reached_step)

    assert cluster.seated() == ("node-3", "node-2")


def test_after_an_hour_it_is_another_hang(cluster: Any) -> None:
    trained(cluster)
    freeze(cluster, 2)
    cluster.go_on()
    cluster.after(AGAIN_S).beat(step=cluster.state.reached_step)
    freeze(cluster, 2)

    assert cluster.seated() == ("node-0", "node-1")


def test_after_a_week_who_was_put_aside_is_a_spare_like_any_other(cluster: Any) -> None:
    trained(cluster)
    freeze(cluster, 2)
    cluster.go_on()
    freeze(cluster, 2)
    cluster.go_on()
    assert aside(cluster.state) == {"node-1"}

    cluster.after(ASIDE_DAYS * 86_400.0).beat(step=cluster.state.reached_step)

    assert aside(cluster.state) == frozenset()


def test_a_hang_that_goes_from_node_to_node_is_nobodys(cluster: Any) -> None:
    trained(cluster)
    freeze(cluster, 0)
    cluster.go_on()
    freeze(cluster, 2)

    assert cluster.seated() == ("node-0", "node-1")


def test_without_a_spare_everybody_starts_in_place_again(cluster: Any) -> None:
    trained(cluster)
    cluster.lose("node-2")
    freeze(cluster, 2)
    cluster.go_on()
    freeze(cluster, 2)

    assert cluster.seated() == ("node-0", "node-1")
    assert cluster.state.incidents[-1].evicted == ()


def test_a_crash_in_the_same_generation_explains_more_and_evicts_nobody(cluster: Any) -> None:
    trained(cluster)
    freeze(cluster, 2)
    cluster.go_on()
    cluster.after(0.1).exit(2, step=cluster.state.reached_step)

    assert cluster.seated() == ("node-0", "node-1")


def test_a_node_on_which_collectives_fail_first_is_accused_by_nobody_and_leaves_the_second_time(
    cluster: Any,
) -> None:
    trained(cluster)
    trouble(cluster, "node-1")
    assert cluster.state.incidents[-1].nodes == ()
    assert cluster.seated() == ("node-0", "node-1")
    cluster.go_on()

    trouble(cluster, "node-1")

    assert cluster.state.incidents[-1].kind == "broken-collective"
    assert cluster.seated() == ("node-0", "node-2")


def test_collectives_that_fail_everywhere_at_once_point_to_nobody(cluster: Any) -> None:
    trained(cluster)
    for _ in range(2):
        trouble(cluster, "node-0", "node-1")
        assert cluster.seated() == ("node-0", "node-1")
        cluster.go_on()


def test_without_the_policy_everybody_starts_in_place_again(
    cluster_of: Callable[..., Any],
) -> None:
    text = runfiles.text(trainer={"steps": 1000}, recovery={"disable": [OVER_EVICTION]})
    cluster = trained(cluster_of(text))
    freeze(cluster, 2)
    cluster.go_on()
    freeze(cluster, 2)

    assert cluster.seated() == ("node-0", "node-1")


def frozen(*at: tuple[int, int]) -> list[dict[str, Any]]:
    return [{"when": {"step": s}, "fault": "freeze-rank", "rank": rank} for s, rank in at]


def evictions(*faults: tuple[int, int], **changes: Any) -> list[set[int]]:
    """Return, for each restart of a wide run, which ranks lost their seats."""
    job = SimulatedJob(steps_job(**(WIDE | changes)), frozen(*faults))
    job.conduct()
    orders = [d for e in job.entries() for d in e.decisions if isinstance(d, StartGeneration)]
    return [
        {rank for rank, seat in enumerate(after.seats) if before.seats[rank] != seat}
        for before, after in pairwise(orders)
    ]


def test_a_group_leaves_as_a_whole_if_evidence_names_a_part_of_it_that_it_did_not_name_before() -> (
    None
):
    assert evictions((12, 4), (12, 9), (40, 6)) == [set(), {6, 7}]


def test_of_what_two_hangs_name_only_what_both_name_leaves() -> None:
    assert evictions((12, 4), (12, 9), (40, 9), (40, 20)) == [set(), {9}]


def test_no_more_leave_than_a_share_of_the_world_those_that_are_named_first() -> None:
    assert most(Cluster().state) == 1
    # Groups of ranks 6 and 8: four nodes, of which two may leave.
    assert evictions((12, 4), (40, 6), (40, 8)) == [set(), {6, 8}]


def test_no_more_leave_than_there_are_spares() -> None:
    nodes = {"count": 32, "ranksPerNode": 1, "spares": 1}
    assert evictions((12, 4), (12, 9), (40, 6), nodes=nodes) == [set(), {6}]


def test_evidence_that_names_most_of_a_world_evicts_nobody(cluster: Any) -> None:
    trained(cluster)
    freeze(cluster, 0, 2)
    cluster.go_on()
    freeze(cluster, 0, 2)

    assert cluster.seated() == ("node-0", "node-1")
    assert suspicion.standing(cluster.state, NodeId("node-0")) == ""
