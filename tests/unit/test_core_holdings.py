from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.holdings import Copies, Holdings
from orchestrator.protocol.ids import NodeId, Rank, Step

RANKS = 4
NODES = [NodeId(f"node-{i}") for i in range(3)]
shares = st.frozensets(st.integers(0, RANKS - 1).map(Rank))
STAGED = Copies(RANKS, {
    NODES[0]: frozenset((Rank(0), Rank(1))), NODES[2]: frozenset((Rank(2), Rank(3)))
})  # fmt: skip
COPIED = Copies(RANKS, {
    NODES[0]: frozenset(map(Rank, range(RANKS))), NODES[2]: frozenset((Rank(2), Rank(3)))
})  # fmt: skip
changes = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 2), st.sampled_from(NODES), shares),
        st.tuples(st.just("discard"), st.integers(0, 2), st.sampled_from(NODES), shares),
        st.tuples(st.just("forget"), st.just(0), st.sampled_from(NODES), st.just(frozenset())),
        st.tuples(st.just("spread"), st.integers(0, 2), st.sampled_from(NODES), shares),
        st.tuples(st.just("lose"), st.integers(0, 2), st.sampled_from(NODES), st.just(frozenset())),
        st.tuples(st.just("staged"), st.integers(0, 2), st.just(NODES[0]), st.just(frozenset())),
        st.tuples(st.just("copied"), st.integers(0, 2), st.just(NODES[0]), st.just(frozenset())),
        st.tuples(st.just("drop"), st.integers(0, 2), st.just(NODES[0]), st.just(frozenset())),
    ),
    max_size=30,
)


def change(
    holdings: Holdings, model: dict[Any, Any], kind: str, step: Any, node: Any, ranks: Any
) -> None:
    """Do the same to what is tested and to a plain set of (step, node, rank)."""
    named = {(step, node, rank) for rank in ranks}
    match kind:
        case "add":
            holdings.add(step, node, ranks)
            model["held"] |= named
        case "discard":
            holdings.discard(step, node, ranks)
            model["held"] -= named
        case "forget":
            holdings.forget(node)
            model["held"] = {held for held in model["held"] if held[1] != node}
        case "spread":
            holdings.spread(step, Copies(RANKS, {node: ranks}))
            model["held"] |= named
        case "lose":
            others = [other for other in NODES if other != node]
            holdings.discard_all(step, others)
            model["held"] -= {held for held in model["held"] if held[0] == step and held[1] != node}
        case "staged":
            holdings.spread(step, STAGED)
            model["held"] |= {(step, NODES[0], Rank(r)) for r in range(2)}
            model["held"] |= {(step, NODES[2], Rank(r)) for r in range(2, RANKS)}
        case "copied":
            holdings.spread(step, COPIED, over=STAGED)
            model["held"] |= {(step, NODES[0], Rank(r)) for r in range(RANKS)}
            model["held"] |= {(step, NODES[2], Rank(r)) for r in range(2, RANKS)}
        case "drop":
            holdings.drop([step])
            model["held"] = {held for held in model["held"] if held[0] != step}


@given(changes)
def test_holdings_answer_from_either_side_what_a_plain_set_would(told: Any) -> None:
    holdings, model = Holdings(RANKS), {"held": set()}
    for kind, step, node, ranks in told:
        change(holdings, model, kind, Step(step), node, ranks)

    held = model["held"]
    for step in (Step(0), Step(1), Step(2)):
        copies = holdings.of(step)
        for rank in map(Rank, range(RANKS)):
            assert copies.holders(rank) == sorted(n for s, n, r in held if (s, r) == (step, rank))
        expected = [sum((s, r) == (step, rank) for s, _, r in held) for rank in range(RANKS)]
        assert copies.count_R().tolist() == expected
        without = [
            sum((s, r) == (step, x) and n != NODES[0] for s, n, r in held) for x in range(RANKS)
        ]
        assert copies.count_R([NODES[0]]).tolist() == without
        assert copies.whole() == all(expected)
        assert copies.whole(2) == all(expected[:2])
        assert copies.least([NODES[0]], first=2) == min(without[:2])
        assert copies.least() == min(expected)
        assert copies.least([NODES[0]]) == min(without)
        wanted = frozenset((Rank(1), Rank(3)))
        assert copies.holders_of(wanted) == {rank: copies.holders(rank) for rank in wanted}
        assert copies.ranks() == [rank for rank in range(RANKS) if expected[rank]]
    for node in NODES:
        assert {(s, node, r) for s, own in holdings.held_by(node).items() for r in own} == {
            one for one in held if one[1] == node
        }


def test_another_node_holds_what_one_held_whose_place_it_took() -> None:
    names = {NODES[0]: NODES[1], NODES[2]: NODES[2]}

    renamed = STAGED.renamed(names)
    renamed.discard(NODES[2])

    assert renamed.of(NODES[1]) == STAGED.of(NODES[0])
    assert renamed.count_R().tolist() == [1, 1, 0, 0]
    assert STAGED.count_R().tolist() == [1, 1, 1, 1]


def test_what_is_spread_is_no_part_of_what_it_was_spread_from() -> None:
    everywhere = Copies(2, {NODES[0]: frozenset((Rank(0), Rank(1)))})
    holdings = Holdings(2)
    holdings.spread(Step(1), everywhere)

    holdings.discard(Step(1), NODES[0], frozenset((Rank(0),)))

    assert everywhere.count_R().tolist() == [1, 1]
    assert holdings.of(Step(1)).count_R().tolist() == [0, 1]
