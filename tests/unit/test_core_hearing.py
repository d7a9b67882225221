from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.hearing import Hearing
from orchestrator.protocol.ids import NodeId, Seconds

NODES = [NodeId(f"node-{i}") for i in range(3)]
told = st.lists(
    st.tuples(
        st.sampled_from(["hear", "hear many", "hear all", "forgive", "ask"]),
        st.sets(st.sampled_from(NODES)),
        st.floats(0, 4, allow_nan=False),
    ),
    max_size=40,
)


@given(told)
def test_who_is_silent_is_whoever_was_not_heard_within_the_limit(told: list) -> None:
    hearing, now = Hearing(5.0), Seconds(0.0)
    heard: dict[NodeId, Seconds] = {}
    spoke: dict[NodeId, Seconds] = {}
    for kind, nodes, later_s in told:
        now = Seconds(now + later_s)
        if kind == "hear":
            for node in sorted(nodes):
                hearing.hear(node, now)
            heard |= dict.fromkeys(nodes, now)
            spoke |= dict.fromkeys(nodes, now)
        elif kind == "hear many":
            hearing.hear_many(nodes, now)
            heard |= dict.fromkeys(nodes, now)
            spoke |= dict.fromkeys(nodes, now)
        elif kind == "hear all":
            known = tuple(sorted(nodes & heard.keys()))
            hearing.hear_all(known, now)
            heard |= dict.fromkeys(known, now)
            spoke |= dict.fromkeys(known, now)
        elif kind == "forgive":
            hearing.forgive(now)
            heard = dict.fromkeys(heard, now)
        assert {node: hearing.heard_at(node) for node in heard} == heard
        assert {node: hearing.spoke_at(node) for node in spoke} == spoke
        assert hearing.silent(now) == {n for n, at in heard.items() if at < now - 5.0}
