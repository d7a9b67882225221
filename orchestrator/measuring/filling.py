"""Fills a profile with what was measured here, and leaves what one machine can not tell."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from orchestrator.measuring import silent
from orchestrator.measuring.samples import Taken
from orchestrator.worlds.simulated.profile import CONSTANTS, Constant, Point, Profile
from orchestrator.worlds.simulated.profiles import span
from orchestrator.worlds.simulated.watching import Looks, Told

_LEAST_S = 1e-6


def filled(
    base: Profile,
    taken: Mapping[str, Taken],
    orders: Mapping[int, float],
    *,
    gpus: int,
    source: str,
) -> Profile:
    """Return a profile with what was measured in the place of what the base has as measured.

    A number that is published or assumed stays: it says what this machine can not tell. Of one
    that depends on size, what was measured is its first point; a larger job takes no less.

    Args:
        base: whose other numbers are kept.
        taken: by name: constants, and whatever else was measured.
        orders: by size in GPUs: seconds until an order is on its way to all, besides its own way.
        gpus: ranks of the run that was measured.
        source: the command that measured.
    """
    changed = {
        name: _renewed(constant, taken[name], gpus, source)
        for name, constant in base.constants().items()
        if name in taken and name != "order"
    }
    if "order" in taken:
        changed["order"] = _order(taken["order"], orders, gpus, source)
    # What a constant does not take up is told all the same.
    observed = {
        name: _measured(each, source)
        for name, each in taken.items()
        if (name not in changed or changed[name] is getattr(base, name))
        and not name.startswith((silent.LOOKS, silent.TELL))
    }
    full = msgspec.structs.replace(base, **changed, observed=observed)
    return _watchful(full, taken, source)


def _watchful(base: Profile, taken: Mapping[str, Taken], source: str) -> Profile:
    """Return a profile with what was measured of detectors of silent corruption."""
    habits = base.habits
    if habits is None or habits.silent is None or silent.TELL not in taken:
        return base
    watch, told = habits.silent, taken[silent.TELL]
    notices = {
        kind: msgspec.structs.replace(sight, looks=_looks(sight.looks, kind, taken, source))
        for kind, sight in watch.notices.items()
    }
    tell = Told(value=span(told.median), origin="measured", source=source, samples=told.samples)
    watch = msgspec.structs.replace(watch, tell=tell, notices=notices)
    return msgspec.structs.replace(base, habits=msgspec.structs.replace(habits, silent=watch))


def _looks(known: Looks, kind: str, taken: Mapping[str, Taken], source: str) -> Looks:
    each = taken.get(f"{silent.LOOKS}-{kind}")
    if each is None:
        return known
    return Looks(value=each.median, origin="measured", source=source, samples=each.samples)


def _renewed(constant: Constant, taken: Taken, gpus: int, source: str) -> Constant:
    if not constant.points:
        return _measured(taken, source) if constant.origin == "measured" else constant
    points = [_first(taken, gpus, source)]
    points += [
        _no_less(point, points[0])
        for point in constant.points
        if point.origin != "measured" and point.gpus > gpus
    ]
    if len(points) > 1:
        return Constant.through(points, constant.varies)
    return _measured(taken, source)


def _first(taken: Taken, gpus: int, source: str) -> Point:
    """Return the point of this machine; a power law has no zero."""
    value = max(taken.median, _LEAST_S)
    return Point(gpus=gpus, value=value, origin="measured", source=source, samples=taken.samples)


def _no_less(point: Point, first: Point) -> Point:
    if point.value >= first.value:
        return point
    words = f"no less than measured in a smaller job; {point.source}"
    return msgspec.structs.replace(point, value=first.value, origin="assumed", source=words)


def _order(taken: Taken, orders: Mapping[int, float], gpus: int, source: str) -> Constant:
    first = _first(taken, gpus, source)
    words = f"{source}: its own way, and wording and encoding it for every node on one core"
    points = [
        msgspec.structs.replace(first, gpus=size, value=round(first.value + all_s, 6), source=words)
        for size, all_s in sorted(orders.items())
        if size > gpus
    ]
    return Constant.through([first, *points]) if points else _measured(taken, source)


def _measured(taken: Taken, source: str) -> Constant:
    return Constant(taken.median, "measured", source, taken.samples)


def rows(profile: Profile, taken: Mapping[str, Taken]) -> list[dict[str, object]]:
    """Return, for a table, what was measured here and what the profile has at its size."""
    constants = profile.constants()
    names = [*constants, *(name for name in taken if name not in constants)]
    return [
        {
            "name": CONSTANTS.get(name, name),
            "here": each.median if (each := taken.get(name)) else None,
            "least": each.least if each else None,
            "most": each.most if each else None,
            "samples": each.samples if each else 0,
            "value": constants[name].value if name in constants else None,
            "origin": constants[name].origin if name in constants else "",
            "source": constants[name].source if name in constants else "",
        }
        for name in names
    ]
