from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.hearing import Hearing
from orchestrator.protocol.ids import NodeId, Seconds

NODES = [NodeId(f"node-{i}") for i in range(3)]
told = st.lists(
    st.tuples(
        st.sampled_from(["hear", "forgive", "ask"]),
        st.sets(st.sampled_from(NODES)),
        st.floats(0, 4, allow_nan=False),
    ),
    max_size=40,
)


@given(told)
def test_who_is_silent_is_whoever_was_not_heard_within_the_limit(told: list) -> None:
    hearing, now, heard = Hearing(5.0), Seconds(0.0), {}
    for kind, nodes, later_s in told:
        now = Seconds(now + later_s)
        if kind == "hear":
            hearing.hear(nodes, now)
            heard |= dict.fromkeys(nodes, now)
        elif kind == "forgive":
            hearing.forgive(now)
            heard = dict.fromkeys(heard, now)
        assert hearing.heard_at == heard
        assert hearing.silent(now) == {n for n, at in heard.items() if at < now - 5.0}
