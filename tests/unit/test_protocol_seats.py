from hypothesis import given
from hypothesis import strategies as st

from orchestrator.protocol.ids import NodeId
from orchestrator.protocol.seats import ranks_by_node

seats = st.one_of(
    st.lists(st.sampled_from("abc").map(NodeId), max_size=9),
    st.tuples(st.permutations("abcd"), st.integers(1, 4)).map(
        lambda drawn: [NodeId(node) for node in drawn[0] for _ in range(drawn[1])]
    ),
)


@given(seats)
def test_each_node_has_the_ranks_that_sit_on_it(world: list[NodeId]) -> None:
    found = ranks_by_node(world)

    assert list(found) == list(dict.fromkeys(world))
    assert found == {n: tuple(r for r, seat in enumerate(world) if seat == n) for n in world}
