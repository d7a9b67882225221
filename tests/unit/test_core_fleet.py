"""Columns over all ranks, of which every tick hears only some."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.fleet import Fleet
from orchestrator.protocol.ids import Seconds


def observe(fleet: Fleet, at: float, progress: tuple[int, ...], states: str) -> None:
    size = len(progress)
    fleet.observe(
        Seconds(at),
        phases=(6,) * size,
        steps=(1,) * size,
        progress=progress,
        states=states,
        cpu_s=(0.0,) * size,
    )


def test_a_stopped_rank_stays_stopped_through_ticks_that_do_not_hear_of_it() -> None:
    fleet = Fleet(2, Seconds(0.0))
    observe(fleet, 0.9, (5, 5), "RS")

    observe(fleet, 1.0, (5, 5), "TS")
    observe(fleet, 1.1, (-1, 6), "?S")
    observe(fleet, 1.2, (5, -1), "T?")

    assert fleet.stopped_since_R[0] == 1.0
    assert np.isinf(fleet.stopped_since_R[1])
    assert fleet.states == "TS"


def test_a_rank_that_was_continued_is_not_stopped_any_more() -> None:
    fleet = Fleet(1, Seconds(0.0))
    observe(fleet, 0.9, (5,), "S")
    observe(fleet, 1.0, (5,), "T")

    observe(fleet, 1.1, (5,), "S")

    assert np.isinf(fleet.stopped_since_R[0])


@given(
    st.lists(
        st.tuples(
            st.integers(-1, 3), st.integers(0, 6), st.sampled_from("STRt?"), st.floats(0, 9),
            st.sampled_from(["told", "looked at", "forgiven"]),
        ),
        max_size=12,
    )
)  # fmt: skip
def test_one_number_for_all_ranks_is_as_good_as_one_for_each(told: list) -> None:
    long, short = Fleet(3, Seconds(0.0)), Fleet(3, Seconds(0.0))
    for tick, (progress, phase, state, cpu_s, then) in enumerate(told):
        for fleet, size in ((long, 3), (short, 1)):
            fleet.observe(
                Seconds(float(tick)), phases=(phase,) * size, steps=(7,) * size,
                progress=(progress,) * size, states=state * size, cpu_s=(cpu_s,) * size,
            )  # fmt: skip
            if then == "forgiven":
                fleet.forgive(Seconds(tick + 0.5))
        assert short.last_moved_at == long.last_moved_at == long.moved_at_R.max()
        assert short.stopped_since == long.stopped_since == long.stopped_since_R.min()
        if then == "told" and tick < len(told) - 1:
            continue
        for name in ("phase_R", "step_R", "progress_R", "cpu_s_R", "moved_at_R",
                     "cpu_at_move_s_R", "stopped_since_R"):  # fmt: skip
            assert getattr(short, name).tolist() == getattr(long, name).tolist(), name
        assert short.states == long.states
