"""Of replicas, wherever they sit, one reads a shard from the durable tier and feeds the others."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core import copies
from orchestrator.core.state import RunState
from orchestrator.policy.reading import FANOUT, read_once
from orchestrator.protocol.ids import NodeId, Rank, Step
from tests import runfiles
from tests.conftest import Cluster

STEP = Step(40)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[RunState, list[NodeId]]:
    """Return a run, and who has which seat of a world of it, which may have fewer replicas."""
    shards, replicas = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    per_node = draw(st.sampled_from([n for n in range(1, 9) if shards * replicas % n == 0]))
    nodes = shards * replicas // per_node
    text = runfiles.text(
        nodes={"count": nodes, "ranksPerNode": per_node, "spares": 0},
        parallelism={"dpReplicate": replicas, "dpShard": shards},
        trainer={"steps": 1000},
    )
    left = shards * draw(st.integers(1, replicas))
    order = draw(st.permutations(range(nodes)))
    seats = [NodeId(f"node-{order[rank // per_node]}") for rank in range(left)]
    return Cluster(text).state, seats


@given(worlds(), st.data())
def test_each_shard_is_read_by_one_rank_and_reaches_all_others_from_it(
    world: tuple[RunState, list[NodeId]], data: st.DataObject
) -> None:
    state, seats = world
    shards, ranks = state.shard_count(), [Rank(rank) for rank in range(len(seats))]
    for rank in data.draw(st.sets(st.sampled_from(ranks))):
        copies.distrust(state, STEP, rank)
    bad = state.distrusted.get(STEP, set())

    nodes, staged_as = read_once(state, seats, STEP)

    from_whom = staged_as or tuple(ranks)
    asked = Counter[tuple[Rank, NodeId]]()
    readers = Counter(state.shard_of(rank) for rank in ranks if not nodes[rank])
    for shard in range(shards):
        none_sound = all(rank in bad for rank in ranks[shard::shards])
        assert readers[shard] == (len(ranks) // shards if none_sound else 1)
    for rank in ranks:
        at, hops = rank, 0
        while nodes[at]:
            parent = from_whom[at]
            assert nodes[at] == seats[parent]
            assert parent not in bad
            at, hops = parent, hops + 1
            assert hops <= len(ranks)
        assert state.shard_of(at) == state.shard_of(rank)
        assert from_whom[at] == at
        if rank not in bad:
            # Depth of a tree of as many nodes, and the way from the first rank of the own one.
            assert FANOUT ** max(hops - 2, 0) <= len(set(seats))
            if nodes[rank] not in ("", seats[rank]):
                asked[from_whom[rank], nodes[rank]] += 1
    assert all(count <= FANOUT for count in asked.values())


def test_all_nodes_share_in_the_reading() -> None:
    text = runfiles.text(
        nodes={"count": 4, "ranksPerNode": 8, "spares": 0},
        parallelism={"dpReplicate": 4, "dpShard": 8},
    )
    seats = [NodeId(f"node-{rank // 8}") for rank in range(32)]

    nodes, _ = read_once(Cluster(text).state, seats, STEP)

    reads = Counter(seat for seat, source in zip(seats, nodes, strict=True) if not source)
    assert reads == {NodeId(f"node-{i}"): 2 for i in range(4)}


def test_who_has_its_shard_reads_none_and_feeds_who_has_not() -> None:
    state, seats = Cluster().state, [NodeId(f"node-{rank // 2}") for rank in range(4)]
    # Of shard 1 rank 3 would read, were it not for what the node of rank 1 has.
    state.holdings.add(STEP, NodeId("node-0"), frozenset({Rank(1)}))

    nodes, staged_as = read_once(state, seats, STEP)

    assert nodes == ("", "", "node-0", "node-0")
    assert staged_as == (0, 1, 0, 1)
