"""Hangs are found, and nothing else is taken for one, while steps take now more, now less time."""

import pytest

from tests.noise import Trial


@pytest.mark.parametrize(("step_s", "before"), [(0.3, 400), (20.0, 20)])
def test_who_hangs_is_named_in_time_and_nobody_is_ended_for_being_slow(
    step_s: float, before: int
) -> None:
    trial = Trial(step_s, seed=7)
    trial.train(before)

    found = []
    for _ in range(4):
        trial.train(25)
        found.append(trial.hang())

    assert trial.false_kills == 0
    assert all(each.exact for each in found)
    assert max(each.waited_s - each.within_s for each in found) <= 0
