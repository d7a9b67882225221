"""Updates numbers once more on other lanes of the device, and finds out if a lane is wrong.

To update a number twice in different places of a vector shows that a lane is wrong only where a
sound device comes to the same bits wherever a number stands. One may not: if what no vector is full
of is rounded in another way (a product and a sum in one, or apart). So the same is asked of known
numbers, of some of which it does not matter in which of these ways they are rounded. If those come
out otherwise elsewhere, a lane is wrong, be it from the first step on; if only the others do, the
device is of a kind of which nothing can be said in this way. No other rank has to be asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from trainer.optim import Optimizer, Part

KNOWN = (1 << 12) + 6
"""Known numbers that are updated to find out; in vectors of any size, some are left over."""
_PARTS = 58
"""In which ordinary ones are: of 70 or 71 each, of which some are left over in any vectors."""
LANES = 64
"""More numbers than this no device updates at once; a power of two."""
_Way: TypeAlias = Callable[[Tensor], Tensor]


class Said(NamedTuple):
    """What known numbers show; "" for nothing."""

    fault: str = ""
    """That a lane is wrong, and how that shows."""
    unlike: str = ""
    """That nothing can be said, and why."""


def look(optimizer: Optimizer, step: int) -> Said:
    """Find out if what a step's update comes to depends on where a number stands."""
    device = optimizer.shards[0].param.device
    known = [_rounded_alike(device), *_ordinary(device)]
    one, other, third = (way(optimizer, known, step, 0.0) for way in (again, backwards, again))
    if not same(one, third):
        return Said()  # it depends on something else; each number has three votes
    alike, *others = (_differing(now, then) for now, then in zip(one, other, strict=True))
    if alike:
        return Said(
            fault=f"in step {step}, {alike} of {KNOWN} known numbers were updated to other bits "
            "where they stand elsewhere, which no way of rounding explains: a lane is wrong"
        )
    if ordinary := sum(others):
        return Said(
            unlike=f"{ordinary} of {KNOWN} numbers come out otherwise where they stand elsewhere, "
            "and none of those that any way of rounding leaves alike: nothing is compared"
        )
    return Said()


def again(optimizer: Optimizer, found: list[Part], step: int, grad_norm: float) -> list[Part]:
    """Return what an update comes to, once more."""
    parts = [Part(*part[:2], *(tensor.clone() for tensor in part[2:])) for part in found]
    optimizer.update(parts, step, grad_norm)
    return parts


def backwards(optimizer: Optimizer, found: list[Part], step: int, grad_norm: float) -> list[Part]:
    """Return the same, computed in the opposite order: of an even count, on other lanes."""
    ways = (lambda tensor: tensor.flip(0), lambda tensor: tensor.flip(0))
    return _moved(optimizer, found, step, grad_norm, ways)


def turned(optimizer: Optimizer, found: list[Part], step: int, grad_norm: float) -> list[Part]:
    """Return the same, each number two places further on, and the last ones first.

    By an even number, so that none has the lane again that it had the second time.
    """
    ways = (lambda tensor: tensor.roll(2), lambda tensor: tensor.roll(-2))
    return _moved(optimizer, found, step, grad_norm, ways)


def _moved(
    optimizer: Optimizer, found: list[Part], step: int, grad_norm: float, ways: tuple[_Way, _Way]
) -> list[Part]:
    """Return what an update comes to of numbers that are elsewhere, and back where they were.

    Args:
        optimizer: updates them.
        found: the numbers.
        step: of which update.
        grad_norm: as the update was given it.
        ways: there, and back.
    """
    there, back = ways
    parts = [Part(*part[:2], *map(there, part[2:])) for part in found]
    optimizer.update(parts, step, grad_norm)
    return [Part(*part[:2], *map(back, part[2:])) for part in parts]


def same(some: list[Part], others: list[Part]) -> bool:
    """Whether updates have come to the same bits."""
    return all(
        alike(one, other)
        for part, twin in zip(some, others, strict=True)
        for one, other in zip(outcome(part), outcome(twin), strict=True)
    )


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether numbers are the same bits."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def outcome(part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """Return what an update comes to."""
    return part.param, part.exp_avg, part.exp_avg_sq


def _rounded_alike(device: torch.device) -> Part:
    """Return numbers that are updated to the same whether products are rounded apart or not.

    Of all digits and of sizes from 2**-20 to 2**20. Three kinds, in no order that lanes could have:
    a gradient only, so that what is added to is 0; a weight only; and powers of two, whose products
    are exact, as is the difference of a moment and a gradient that are opposed.
    """
    chance = torch.Generator().manual_seed(KNOWN)
    digits, sizes = torch.rand(2, KNOWN, generator=chance)
    kinds = torch.randint(3, (KNOWN,), generator=chance)
    gradient, weight, powers = (kinds == kind for kind in range(3))
    power = torch.exp2((40 * sizes - 20).floor())
    power = torch.where(digits < 0.5, -power, power)
    full = power * (1 + digits)
    grad, first = full * gradient + power * powers, -power * powers
    tensors = (full * weight, grad, first, power.abs() * powers)
    return Part("", True, *(tensor.to(device) for tensor in tensors))


def _ordinary(device: torch.device) -> Iterator[Part]:
    """Yield numbers that are updated to other bits if products are rounded apart, by and large.

    In many parts, each of which leaves some over.
    """
    chance = torch.Generator().manual_seed(KNOWN + 1)
    for numbers in torch.randn(4, KNOWN, generator=chance).tensor_split(_PARTS, dim=1):
        param, grad, first, second = (tensor.to(device) for tensor in numbers.unbind())
        yield Part("", False, param, grad, first, second.square())


def _differing(one: Part, other: Part) -> int:
    """Return how many numbers of two parts did not come out the same."""
    pairs = zip(outcome(one), outcome(other), strict=True)
    differ = [now.view(torch.int32) != then.view(torch.int32) for now, then in pairs]
    return int(torch.stack(differ).any(0).sum())
