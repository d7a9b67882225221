"""What a campaign lets loose, and how it is drawn."""

from collections import Counter

import msgspec
import pytest

from orchestrator.campaign.catalogue import CATALOGUE, GROUPS, HORIZON, draw


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
