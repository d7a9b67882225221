"""A loss that jumps is told once, and once that it is back."""

import math

import numpy as np

from trainer.spikes import STEPS, Spikes


def told(losses: list[float]) -> list[str]:
    spikes = Spikes()
    lines = (spikes.observe(step, loss, 1.5) for step, loss in enumerate(losses, 1))
    return [line for line in lines if line is not None]


def noise(count: int, level: float = 2.0, spread: float = 0.05) -> list[float]:
    return list(np.random.default_rng(count).normal(level, spread, count))


def test_a_spike_is_told_when_it_begins_and_when_it_is_over() -> None:
    first, second = told([*noise(60), 4.0, 3.5, math.nan, math.inf, 3.0, *noise(30)])

    assert first.startswith("step 61: loss spikes to 4.0000, the median of 60 steps before is ")
    assert first.endswith("; gradient norm 1.5")
    assert second.startswith("step 66: loss is back at ")
    assert second.endswith("after 5 steps")


def test_noise_and_a_falling_loss_are_no_spikes() -> None:
    falling = [10 * 0.99**step + 2 for step in range(2000)]

    assert told(noise(5000)) == []
    assert told(falling) == []
    assert told([2.0] * 200 + [2.19]) == []
    assert told([2.0] * 5 + [9.0] * 30) == []


def test_a_loss_that_stays_high_is_told_once_and_then_usual() -> None:
    lines = told([*noise(50), *noise(STEPS + 200, 4.0)])

    assert [line.split(": ")[0] for line in lines] == ["step 51", f"step {51 + STEPS}"]
    assert "has stayed high for 100 steps" in lines[1]
