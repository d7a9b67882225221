"""What a campaign lets loose, and how it is drawn."""

from collections import Counter
from typing import Any

import msgspec
import pytest

from orchestrator.campaign.catalogue import (
    CATALOGUE,
    GROUPS,
    HORIZON,
    SELECTABLE,
    TRIALS_OF_ONE,
    draw,
)


def test_the_same_seed_draws_the_same_trials_and_another_one_others_of_the_same_classes() -> None:
    one, again, other = (draw(seed, 60, ranks=3, snapshots=2) for seed in (5, 5, 6))

    assert one == again
    assert [t.injection for t in one] != [t.injection for t in other]
    assert [t.name for t in one] == [t.name for t in other]


def test_three_hundred_trials_have_each_class_as_often_as_its_weight_says() -> None:
    counted = Counter(trial.name for trial in draw(1, 300, ranks=3, snapshots=2))

    total = sum(stratum.weight for stratum in CATALOGUE)
    for stratum in CATALOGUE:
        assert counted[stratum.name] == pytest.approx(300 * stratum.weight / total, abs=1.5)


def test_some_groups_are_drawn_alone_in_the_proportions_that_they_have_among_all() -> None:
    trials = draw(1, 800, ranks=3, snapshots=2, groups=("state", "persistent"))

    assert {t.group for t in trials} == {"state", "persistent"}
    counted = Counter(trial.name for trial in trials)
    chosen = [stratum for stratum in CATALOGUE if stratum.group in ("state", "persistent")]
    total = sum(stratum.weight for stratum in chosen)
    for stratum in chosen:
        assert counted[stratum.name] == pytest.approx(800 * stratum.weight / total, abs=1.5)
    assert draw(1, 9, ranks=3, snapshots=2) == draw(1, 9, ranks=3, snapshots=2, groups=SELECTABLE)


def test_every_fifty_trials_strike_another_trajectory() -> None:
    seeds = [trial.trainer_seed for trial in draw(5, 4 * TRIALS_OF_ONE, ranks=3, snapshots=2)]

    by_place = [set(seeds[n : n + TRIALS_OF_ONE]) for n in range(0, len(seeds), TRIALS_OF_ONE)]
    assert [len(each) for each in by_place] == [1, 1, 1, 1]
    assert len(set(seeds)) == 4
    assert None not in seeds
    other = {trial.trainer_seed for trial in draw(6, 4 * TRIALS_OF_ONE, ranks=3, snapshots=2)}
    assert not other & set(seeds)


@pytest.mark.parametrize("groups", [SELECTABLE, ("state",)])
def test_a_trial_and_its_trajectory_are_the_same_however_many_there_are(groups: Any) -> None:
    many = draw(7, 300, ranks=3, snapshots=2, groups=groups)

    for count in (1, 51, 120):
        assert draw(7, count, ranks=3, snapshots=2, groups=groups) == many[:count]
    with_runs = draw(7, 120, ranks=3, snapshots=2, live=("flip-bit",), groups=groups)
    assert with_runs[:117] == many[:117]
    assert {trial.trainer_seed for trial in with_runs[117:]} == {None}


def test_forty_trials_have_nearly_every_class_in_them() -> None:
    names = {trial.name for trial in draw(1, 40, ranks=3, snapshots=1)}

    assert len(names) >= 0.9 * len(CATALOGUE)


def test_less_than_half_of_what_is_drawn_are_single_bits_struck_once() -> None:
    trials = draw(2, 300, ranks=3, snapshots=2)
    single = [
        t.injection
        for t in trials
        if t.injection is not None
        and (t.injection.form, t.injection.pace, t.injection.elements) == ("flip", "once", 1)
        and len(t.injection.bits) == 1
    ]

    assert len(single) < 150


def test_every_trial_strikes_a_rank_that_is_there_within_what_is_watched() -> None:
    for trial in draw(3, 200, ranks=3, snapshots=2):
        assert trial.injection is not None
        assert 0 <= trial.injection.rank < 3
        assert 0 <= trial.snapshot < 2
        assert trial.injection.step >= 1
        assert trial.horizon == HORIZON[trial.group]
        assert trial.group in GROUPS


def test_whole_runs_count_among_the_trials_and_are_a_handful() -> None:
    trials = draw(4, 120, ranks=3, snapshots=1, live=("freeze-rank", "flip-bit"))

    assert [t.live for t in trials if t.live] == ["freeze-rank", "flip-bit", "freeze-rank"]
    assert [t.number for t in trials] == list(range(120))


def test_a_trial_says_everything_there_is_to_know_of_it_in_json() -> None:
    for trial in draw(5, 40, ranks=3, snapshots=1):
        assert msgspec.json.decode(msgspec.json.encode(trial), type=type(trial)) == trial
