"""Whom a generation continues, whatever was left behind before it."""

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.lineage import ANCESTORS_MAX, continued
from orchestrator.protocol.ids import Generation, Step
from orchestrator.protocol.messages import Ancestor

G1, G2, G3 = Generation(1), Generation(2), Generation(3)


def line(*steps: int | None) -> tuple[Ancestor, ...]:
    """Return the ancestors of the last of generations that continue from these steps."""
    ancestors: tuple[Ancestor, ...] = ()
    for before, step in enumerate(steps):
        restore = None if step is None else Step(step)
        ancestors = continued(ancestors, Generation(before), restore, None)
    return ancestors


def test_each_generation_counts_up_to_where_the_next_one_continues() -> None:
    assert line(None, 10, 40) == (Ancestor(G1, Step(10)), Ancestor(G2, Step(40)))


def test_a_generation_that_goes_back_behind_another_leaves_it_out() -> None:
    assert line(None, 20, 10) == (Ancestor(G1, Step(10)),)


def test_one_that_had_staged_nothing_that_counts_is_left_out() -> None:
    assert line(None, 20, 20, 50) == (Ancestor(G1, Step(20)), Ancestor(G3, Step(50)))


def test_the_seed_has_no_ancestors_and_a_checkpoint_has_the_generation_that_wrote_it() -> None:
    assert line(None, 20, None) == ()
    assert continued(line(None, 20), G2, Step(40), G1) == (Ancestor(G1, Step(40)),)


def test_what_is_told_stays_short_however_often_a_run_is_restarted() -> None:
    long = line(None, *range(10, 2000, 10))

    assert len(long) == ANCESTORS_MAX
    assert long[-1] == Ancestor(Generation(199), Step(1990))


@given(st.lists(st.none() | st.integers(0, 9), max_size=8), st.integers(0, 8), st.integers(1, 9))
def test_a_state_counts_if_every_generation_since_has_continued_it(
    restores: list[int | None], staged_by: int, past: int
) -> None:
    restores = [None, *restores]
    generation = min(1 + staged_by, len(restores))
    start = restores[generation - 1]
    # A generation stages only what comes after the step from which it continued.
    step = (start or 0) + past

    told = any(one.generation == generation and step <= one.last for one in line(*restores))

    since = restores[generation:]
    assert (told or not since) == all(back is not None and step <= back for back in since)
