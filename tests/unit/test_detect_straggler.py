"""Who is slower than its peers: with noise, with other work, in small worlds and in large ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.paces import STEPS, WINDOWS, Paces, middle
from orchestrator.core.slowness import alike
from orchestrator.detect.straggler import (
    RATIO_MIN,
    Suspicion,
    rates,
    stragglers,
    suspects,
    what_if_s,
)
from orchestrator.protocol.ids import Rank
from orchestrator.protocol.layout import Layout
from tests.bench.stragglers import Kind, World


def noisy(ranks: int, noise: float, seed: int, slow: dict[int, float] | None = None) -> np.ndarray:
    """Return seconds for a unit of work, shape [windows, ranks]."""
    chance = np.random.Generator(np.random.Philox(seed))
    rate = 0.1 * (1 + noise * chance.standard_normal((WINDOWS, ranks)))
    for rank, times in (slow or {}).items():
        rate[:, rank] *= times
    return np.maximum(rate, 1e-3)


def found(rate: np.ndarray, cut: np.ndarray | None = None) -> list[int]:
    ranks = rate.shape[1]
    groups = np.zeros(ranks, np.int64) if cut is None else cut
    return stragglers(rate, groups)[1].tolist()


@pytest.mark.parametrize("ranks", [4, 8, 64, 1024])
def test_a_rank_that_is_a_tenth_slow_is_found_nine_times_of_ten_and_nobody_else_is(
    ranks: int,
) -> None:
    times = [found(noisy(ranks, 0.02, seed, {1: 1 / 0.9})) for seed in range(100)]

    assert sum(which == [1] for which in times) >= 90
    assert all(set(which) <= {1} for which in times)


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_of_peers_that_are_alike_nobody_is_found_however_noisy_they_are(noise: float) -> None:
    assert not any(found(noisy(ranks, noise, seed)) for seed in range(300) for ranks in (3, 4, 16))


def test_a_rank_that_is_slow_once_is_not_found() -> None:
    rate = noisy(8, 0.01, 0)
    rate[2:9, 3] *= 3.0

    assert found(rate) == []
    rate[1, 3] *= 3.0
    assert found(rate) == [3]


def test_a_rank_is_slow_now_that_is_so_in_the_newest_windows_and_in_all_three_of_three() -> None:
    rate = noisy(8, 0.01, 0)
    rate[-3:, 3] *= 1.2
    groups = np.zeros(8, np.int64)

    assert stragglers(rate, groups)[1].tolist() == []
    ratio, slow = stragglers(rate, groups, newest=3)
    assert slow.tolist() == [3]
    assert ratio[3] == pytest.approx(1.2, abs=0.03)
    rate[-2, 3] /= 1.2
    assert stragglers(rate, groups, newest=3)[1].tolist() == []


@pytest.mark.parametrize(("beat", "within"), [(1, 20), (2, 20), (4, 20), (10, 40)])
@pytest.mark.parametrize("peers", [3, 8, 64])
def test_a_rank_that_takes_a_sixth_longer_is_found_within_twenty_steps_or_three_beats(
    beat: int, within: int, peers: int
) -> None:
    rng = np.random.Generator(np.random.Philox(7))
    after = [World(Kind(beat, 0.02, True, peers), rng).found_after(1.15) for _ in range(40)]

    assert sum(steps <= within for steps in after) >= 38


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("beat", [1, 4])
def test_ranks_that_are_alike_are_hardly_ever_suspected(beat: int, *, heavy: bool) -> None:
    rng = np.random.Generator(np.random.Philox(7))

    found = [World(Kind(beat, 0.05, heavy, peers), rng).suspicions(3000) for peers in (3, 8, 64)]

    assert sum(found) <= 1


def test_of_two_ranks_nobody_can_say_which_one_is_slow() -> None:
    assert found(noisy(2, 0.0, 0, {0: 2.0})) == []


def test_the_last_stage_of_a_pipeline_is_compared_with_itself_only() -> None:
    layout = Layout(pp=2, dp_replicate=4)
    groups = alike(layout, 8)
    last = [rank for rank in range(8) if layout.position(rank).pp == 1]
    heavy = dict.fromkeys(last, 1.5)

    assert found(noisy(8, 0.01, 1, heavy), groups) == []
    assert found(noisy(8, 0.01, 1, heavy | {last[1]: 2.0}), groups) == [last[1]]


def test_twice_the_time_for_twice_the_work_is_not_slow() -> None:
    compute_s = noisy(4, 0.01, 2, {2: 2.0})
    work = np.tile([1.0, 1.0, 2.0, 1.0], (WINDOWS, 1))

    assert found(rates(compute_s, work)) == []


def test_a_rank_that_did_not_measure_is_compared_with_nobody() -> None:
    compute_s = noisy(5, 0.01, 3, {4: 2.0})
    compute_s[3, 0] = 0.0

    assert found(rates(compute_s, np.ones_like(compute_s))) == [4]
    compute_s[:, :3] = 0.0
    assert found(rates(compute_s, np.ones_like(compute_s))) == []


def test_without_two_slow_ranks_a_step_is_as_fast_as_the_slowest_of_the_others() -> None:
    compute_s = np.tile([1.0, 1.5, 1.1, 2.0], (WINDOWS, 1))

    assert what_if_s(compute_s, [Rank(1), Rank(3)]) == (2.0, pytest.approx(1.1))


@given(st.integers(3, 40), st.floats(1.0, 3.0), st.integers(0, 2**32), st.floats(1e-6, 1e3))
def test_what_is_found_depends_on_no_unit_and_on_no_order(
    ranks: int, times: float, seed: int, unit: float
) -> None:
    rate = noisy(ranks, 0.03, seed, {0: times})
    order = np.random.Generator(np.random.Philox(seed)).permutation(ranks)

    plain = found(rate)

    assert found(rate * unit) == plain
    assert sorted(order[found(rate[:, order])].tolist()) == plain
    ratio, _ = stragglers(rate, np.zeros(ranks, np.int64))
    assert all(ratio[rank] > RATIO_MIN for rank in plain)


def test_windows_are_looks_at_which_every_rank_has_taken_a_step() -> None:
    paces = Paces(3)
    paces.observe((1, 1, 1), (0.1, 0.1, 0.2), (0.0,))
    paces.observe((2, 2, 1), (0.1, 0.1, 0.2), (0.0,))
    assert paces.looks == 1
    for step in range(2, 2 + WINDOWS):
        paces.observe((step, step + 1, step), (0.1, 0.1, 0.2), (0.0,))

    assert paces.full
    assert paces.compute_s_WR().shape == paces.work_WR().shape == (WINDOWS, 3)
    paces.observe((99,), (0.1,), (0.0,))  # all alike: what was before says nothing any more
    assert not paces.full


@pytest.mark.parametrize(("each", "windows"), [(1, 10), (2, 5), (3, 4), (4, 3), (10, 3)])
def test_as_many_windows_tell_who_is_slow_as_cover_ten_steps_and_three_at_least(
    each: int, windows: int
) -> None:
    paces = Paces(2)
    for look in range(1, 2 * WINDOWS + 1):
        paces.observe((look * each, look * each), (1.0, float(look)), (0.0,))
        covered = (look - 1) * each + 1  # of the first nobody knows how many steps it is of
        assert paces.full == (look >= 3 and covered >= STEPS)

    assert paces.newest == windows
    assert paces.steps == windows * each
    looks = range(2 * WINDOWS - windows + 1, 2 * WINDOWS + 1)
    assert paces.rate_R().tolist() == paces.time_R().tolist() == [1.0, np.median(looks)]


def test_processor_time_is_known_once_every_rank_says_it_in_each_of_the_newest_windows() -> None:
    paces, groups = Paces(4), np.zeros(4, np.int64)

    def look(*busy_s: float) -> None:
        step = paces.looks + 1
        paces.observe((step,), (1.0, 1.6, 1.0, 1.02), (0.0,), busy_s)

    for _ in range(WINDOWS):
        look(0.5, 0.0, 0.5, 0.5)
    assert paces.clocks == ("wall",)
    for _ in range(WINDOWS):
        look(0.5, 0.5, 0.5, 0.75)
    assert paces.clocks == ("wall", "processor")
    assert paces.rate_R("processor").tolist() == [0.5, 0.5, 0.5, 0.75]
    assert paces.ratio_R(groups, "processor").tolist() == [1.0, 1.0, 1.0, 1.5]

    most, found = suspects(paces, groups)

    assert most.tolist() == pytest.approx([1.0, 1.6, 1.0, 1.5])
    assert found == {
        1: Suspicion(pytest.approx(1.6), "wall"),
        3: Suspicion(1.5, "processor"),
    }


def test_who_is_somewhat_slow_by_the_wall_clock_is_suspected_if_nothing_else_is_known() -> None:
    by_wall, by_both = Paces(4), Paces(4)
    for step in range(1, WINDOWS + 1):
        by_wall.observe((step,), (1.0, 1.4, 1.0, 1.02), (0.0,))
        by_both.observe((step,), (1.0, 1.4, 1.0, 1.02), (0.0,), (0.9, 0.91, 0.9, 0.9))
    groups = np.zeros(4, np.int64)

    assert suspects(by_wall, groups)[1] == {1: Suspicion(pytest.approx(1.4), "wall")}
    assert suspects(by_both, groups)[1] == {}


@pytest.mark.parametrize(("free", "found"), [(0, [1]), (1, [])])
def test_who_has_its_core_in_one_window_of_ten_is_not_suspected_by_the_wall_clock_alone(
    free: int, found: list[int]
) -> None:
    paces = Paces(4)
    for step in range(1, WINDOWS + 1):
        times = 1.0 if step <= free else 1.8
        paces.observe((step,), (1.0, times, 1.0, 1.02), (0.0,), (0.9, 0.91, 0.9, 0.9))

    assert list(suspects(paces, np.zeros(4, np.int64))[1]) == found


@pytest.mark.parametrize(("step_s", "newest"), [(0.01, WINDOWS), (0.03, 7), (0.1, 3)])
def test_short_steps_are_looked_at_for_a_second_or_as_long_as_windows_are_kept(
    step_s: float, newest: int
) -> None:
    paces = Paces(3)
    for look in range(1, 2 * WINDOWS + 1):
        paces.observe((5 * look,), (step_s, step_s, 1.1 * step_s), (0.0,))

    assert paces.newest == newest


@pytest.mark.parametrize("windows", [1, 2, 3, WINDOWS])
def test_the_middle_of_windows_is_their_median_to_the_bit(windows: int) -> None:
    rate = noisy(64, 0.3, windows)[:windows]

    assert middle(rate).tolist() == np.median(rate, axis=0).tolist()


def test_what_a_rank_takes_for_its_work_follows_the_newest_windows() -> None:
    paces = Paces(2)
    for step in range(1, 2 * WINDOWS + 1):
        paces.observe((step, step), (float(step), 4.0 * step), (2.0, 2.0))
        if paces.full:
            newest = [float(each) for each in range(step - WINDOWS + 1, step + 1)]
            assert paces.rate_R().tolist() == [np.median(newest) / 2, 2 * np.median(newest)]


@given(st.lists(st.tuples(st.sampled_from([1.0, 2.0, 3.0]), st.integers(1, 2 * WINDOWS))))
def test_nothing_is_new_while_all_windows_are_what_all_of_them_were(spells: list) -> None:
    paces = Paces(2)
    windows = [times for times, count in spells for _ in range(count)]
    for step, times in enumerate(windows, 1):
        paces.observe((step,), (0.1, 0.1 * times), (0.0,))

        now = windows[max(step - WINDOWS, 0) : step]
        assert paces.compute_s_WR().tolist() == [[0.1, 0.1 * each] for each in now]
        assert paces.rate_R().tolist() == [0.1, np.median([0.1 * each for each in now])]
        for looks in range(max(step - WINDOWS, WINDOWS), step):
            both = windows[looks - WINDOWS : looks] + now
            assert paces.as_at(looks) == (len(set(both)) == 1)


def test_what_is_told_again_after_all_were_alike_is_new() -> None:
    paces = Paces(2)
    for step in range(1, 2 * WINDOWS + 1):
        paces.observe((step,), (0.1, 0.2), (0.0,))
    looks = paces.looks
    assert paces.as_at(looks - 1)

    paces.observe((step + 1,), (0.1,), (0.0,))
    for later in range(step + 2, step + 2 + WINDOWS):
        paces.observe((later,), (0.1, 0.2), (0.0,))
        assert not paces.as_at(looks)
    assert paces.full
