"""Which checkpoints stay: the newest, every so many steps, and anchors ever further apart."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.catalog import Catalog
from storage.memory import MemoryStore
from storage.retention import Candidate, Ladder, kept
from storage.verdicts import Trust
from tests.checkpoints import committed, steps_of, written


def at(*steps: int, trust: Trust = Trust.BYTES_VERIFIED) -> list[Candidate]:
    return [Candidate(step, 1, trust) for step in steps]


def test_each_that_stays_has_a_reason() -> None:
    candidates = [
        *at(100, trust=Trust.COMPUTE_VERIFIED),
        *at(200, 300, 400, 500, 600, 700),
        *at(800, 900, trust=Trust.WRITTEN),
    ]

    stay = kept(candidates, Ladder(last=2, every_steps=300), restorable=(900, 1))

    assert stay.oldest == (800, 1)
    assert stay.reasons == {
        (900, 1): "of the newest 2",
        (800, 1): "of the newest 2",
        (700, 1): "newest bytes verified",
        (600, 1): "of every 300 steps",
        (300, 1): "of every 300 steps",
        (200, 1): "anchor",
        (100, 1): "newest compute verified",
    }


def test_what_came_after_the_newest_that_is_whole_is_evidence_and_stays() -> None:
    stay = kept(at(10, 20, 30, 40), Ladder(last=1, anchors=False), restorable=(20, 1))

    assert stay.oldest == (20, 1)
    assert set(stay.reasons) == {(20, 1), (30, 1), (40, 1)}


@given(
    st.lists(st.integers(1, 9), min_size=20, max_size=120),
    st.integers(1, 5),
    st.data(),
)
def test_for_any_onset_there_is_an_anchor_from_before_it_and_not_far(
    gaps: list[int], last: int, data: st.DataObject
) -> None:
    """Kept step by step, as a run does, and not chosen from all that there ever was."""
    ladder = Ladder(last=last)
    alive: list[Candidate] = []
    for step in itertools.accumulate(gaps):
        alive += at(step)
        stay = kept(alive, ladder, restorable=(step, 1)).reasons
        alive = [one for one in alive if one.where in stay]
    first, newest = gaps[0], alive[-1].step
    back = data.draw(st.integers(1, newest - first))

    before = [newest - one.step for one in alive if newest - one.step >= back]

    assert before, "something from before the onset is left, the first checkpoint at the latest"
    base = max(newest - alive[-last].step, 1)
    # Checkpoints are up to 9 steps apart.
    assert min(before) <= 4 * max(back, base) + 2 * 9
    assert len(alive) <= last + 2 * max(newest // 1, 2).bit_length() + 2


def test_anchors_survive_collections_and_what_is_no_anchor_does_not() -> None:
    store = MemoryStore()
    catalog = Catalog(store)
    for step in range(10, 330, 10):
        manifest = committed(store, step)
        catalog.judge(step, 1, Trust.BYTES_VERIFIED.kind, "")
        catalog.retain(Ladder(last=3), verified=manifest)

    steps = [step for step, _ in steps_of(store)]
    assert steps[:3] == [320, 310, 300]
    assert steps[-1] <= 80
    assert len(steps) <= 3 + 5
    # Every shard that is left belongs to one of them.
    assert len(store.keys("gen/")) == 4 * len(steps)


def test_a_plan_says_what_goes_and_touches_nothing() -> None:
    store = MemoryStore()
    for step in (10, 20, 30):
        committed(store, step)
    written(store, 25)
    before = store.keys()

    planned = Catalog(store).plan(Ladder(last=2))

    assert planned is not None
    assert planned.victims == ((10, 1),)
    assert planned.kept == {(30, 1): "of the newest 2", (20, 1): "of the newest 2"}
    assert Catalog(store).orphans() == [(25, 1)]
    assert store.keys() == before


@pytest.mark.parametrize(("last", "every"), [(0, 0), (-1, 0), (1, -1)])
def test_a_ladder_that_keeps_nothing_is_refused(last: int, every: int) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        Ladder(last=last, every_steps=every)
