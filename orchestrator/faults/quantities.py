"""Quantities as people write them, every one with its unit: rates, spans, ranges.

`6.97e-6 per gpu-hour` · `10m to 40m` · `median 3h sigma 1` · `mean 48m` · `0.05 to 0.2`
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import exp, isfinite
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Entity = Literal["gpu", "nic", "link", "node", "rack", "power-domain", "pod", "job"]
"""What can break, and is counted: a rate is that of one of them."""
ENTITIES: tuple[Entity, ...] = get_args(Entity)
Floats = npt.NDArray[np.float64]

_NUMBER = r"[-+]?(?:[0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})(?:[eE][-+]?[0-9]{1,3})?"
_RATE = re.compile(rf"(?P<value>{_NUMBER}) per (?P<entity>[a-z-]{{1,20}})-(?P<unit>[a-z]{{1,8}})")
_SPAN = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h|d)")
_LOGNORMAL = re.compile(rf"median (\S+) sigma ({_NUMBER})")
_SPAN_UNIT_S = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_RATE_UNIT_S = {"hour": 3600.0, "day": 86_400.0, "week": 604_800.0, "year": 31_557_600.0}
STEP = "step"
SIGMA_MAX = 4.0
"""Of a lognormal: beyond it the mean is a thousand times the median, and no repair is like that."""


@dataclass(frozen=True, slots=True)
class Rate:
    """How often one entity breaks."""

    value: float
    entity: Entity
    unit: str
    """hour, day, week, year or step."""

    def per_s(self, step_s: float) -> float:
        """Return the rate per second, where a step takes `step_s`."""
        return self.value / (step_s if self.unit == STEP else _RATE_UNIT_S[self.unit])


def rate(text: str) -> Rate:
    """Read a rate.

    Raises:
        ValueError: naming what was expected and found.

    >>> rate("6.97e-6 per gpu-hour")
    Rate(value=6.97e-06, entity='gpu', unit='hour')
    """
    match = _RATE.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"rate is {_short(text)}, expected a number and its unit: 6.97e-6 per gpu-hour"
        )
    value = float(match["value"])
    if value < 0 or not isfinite(value):
        raise ValueError(f"rate is {_short(text)}, expected 0 or more")
    units = (*_RATE_UNIT_S, STEP)
    if match["unit"] not in units:
        raise ValueError(f"rate is per {match['unit']!r}, expected one of {', '.join(units)}")
    for entity in ENTITIES:
        if entity == match["entity"]:
            return Rate(value, entity, match["unit"])
    raise ValueError(f"rate is per {match['entity']!r}, expected one of {', '.join(ENTITIES)}")


def span_s(text: str) -> float:
    """Return the length of a span in seconds; unlike a run file's durations it may be in days.

    Raises:
        ValueError: if the text is not a number followed by ms, s, m, h or d.

    >>> span_s("1.5d")
    129600.0
    """
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"span is {_short(text)}, expected a number and a unit: 10s, 40m, 3h, 14d")
    return float(match[1]) * _SPAN_UNIT_S[match[2]]


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution of spans: fixed, uniform, exponential or lognormal. All lengths in seconds."""

    shape: Literal["fixed", "uniform", "exponential", "lognormal"]
    first: float
    """The value; the least; the mean; the median."""
    second: float = 0.0
    """Of uniform the most, of lognormal the sigma of the logarithm."""

    @property
    def mean_s(self) -> float:
        """The mean."""
        if self.shape == "uniform":
            return (self.first + self.second) / 2
        return self.first * exp(self.second**2 / 2)

    def draw(self, rng: np.random.Generator, size: int) -> Floats:
        """Draw so many spans, seconds."""
        match self.shape:
            case "fixed":
                return np.full(size, self.first)
            case "uniform":
                return rng.uniform(self.first, self.second, size)
            case "exponential":
                return rng.exponential(self.first, size)
            case "lognormal":
                return self.first * np.exp(self.second * rng.standard_normal(size))


def spread(text: str) -> Spread:
    """Read a distribution: `45s`, `10m to 40m`, `mean 10m` or `median 3h sigma 1`.

    Raises:
        ValueError: naming what was expected and found.
    """
    text = text.strip()
    lognormal = _LOGNORMAL.fullmatch(text)
    if lognormal is not None:
        sigma = float(lognormal[2])
        if not 0 <= sigma <= SIGMA_MAX:
            raise ValueError(f"sigma is {sigma:g}, expected 0 to {SIGMA_MAX:g}")
        return Spread("lognormal", span_s(lognormal[1]), sigma)
    if text.startswith("mean "):
        return Spread("exponential", span_s(text.removeprefix("mean ")))
    if " to " in text:
        least, most = (span_s(part) for part in text.split(" to ", 1))
        _ascending(least, most, text)
        return Spread("uniform", least, most)
    return Spread("fixed", span_s(text))


def ratios(given: float | str) -> tuple[float, float]:
    """Read a ratio or a range of ratios, such as 0.1 or `0.05 to 0.2`; return least and most.

    Raises:
        ValueError: if one of them is not in [0, 1).
    """
    parts = given.split(" to ", 1) if isinstance(given, str) else [given]
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        raise ValueError(
            f"ratio is {_short(str(given))}, expected such as 0.1 or `0.05 to 0.2`"
        ) from None
    for number in numbers:
        if not 0 <= number < 1:
            raise ValueError(f"ratio is {number:g}, expected 0 or more and less than 1")
    _ascending(numbers[0], numbers[-1], str(given))
    return numbers[0], numbers[-1]


def _ascending(least: float, most: float, text: str) -> None:
    if least > most:
        raise ValueError(f"range is {_short(text)}, expected the smaller one first")


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
