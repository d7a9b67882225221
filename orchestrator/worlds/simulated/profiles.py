"""Profiles as files: what they look like, those that come with holdfast, reading and writing.

A file that is not what it should be is refused with what was expected, what was found, and where.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
import yaml

from orchestrator import document
from orchestrator.document import BadFileError
from orchestrator.faults.quantities import span_s
from orchestrator.faults.sections import ClassName, Section, Words
from orchestrator.worlds.simulated.profile import (
    CONSTANTS,
    Choice,
    Constant,
    Habits,
    Kind,
    Point,
    Profile,
    Varies,
)
from orchestrator.worlds.simulated.watching import Origin, Watch

PACKAGED = Path(__file__).parent / "profiles"
POWER_MAX = 8
"""Of the size of a job with which something may grow: no algorithm of ours is worse."""
SIGMA_MAX = 2.0
"""Of the logarithm of times: one in forty takes seven times the mean."""
_SPAN_HINT = "write a number with its unit, such as 5ms, 17s, 10m or 2h"
_ORIGIN_HINT = "say for each number whether it is measured, published or assumed, and its source"


class ConstantAtSize(Section, frozen=True, kw_only=True):
    """What something takes at one size."""

    gpus: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    value: str | float | None
    """A span, such as 17s."""
    origin: Origin
    source: Words
    samples: Annotated[int, msgspec.Meta(ge=0)] = 0


class ConstantEntry(Section, frozen=True, kw_only=True):
    """One number with where it comes from, or several at different sizes."""

    value: str | float | None = None
    """A span, such as 5ms or 17s, the same at every size; without it, `points`."""
    origin: Origin | None = None
    source: Words | None = None
    """Command that measured it, publication that has it, or why it was assumed."""
    samples: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Of how many it is the median, if it was measured."""
    points: Annotated[tuple[ConstantAtSize, ...], msgspec.Meta(max_length=16)] = ()
    """At two sizes or more; a power law between them."""
    varies: Varies | None = None
    """By how much one time differs from the next; without it, not at all."""


class ChoiceEntry(Section, frozen=True, kw_only=True):
    """One property that is no number."""

    value: str
    origin: Origin
    source: Words


class HabitsEntry(Section, frozen=True, kw_only=True):
    """What a system does, as opposed to how long it takes."""

    notice: ChoiceEntry
    """own: detectors find every fault; good, legacy: as that column of the fault model says."""
    detect_within: ConstantEntry
    """The longest that a standstill goes unnoticed."""
    memory: ConstantEntry | None = None
    """Between two saves to memory; none without it."""
    durable: ConstantEntry
    """Between two saves to the durable tier."""
    buddies: ChoiceEntry
    """kept or none: copies on another node of what is staged."""
    spares: ChoiceEntry
    """warm, cold or requeue: whether spares stand ready, and their processes."""
    requeue: ConstantEntry | None = None
    """What the scheduler takes; with `spares: requeue`."""
    detect: dict[str, ConstantEntry] = msgspec.field(default_factory=dict)
    """From a fault to its detection, by kind of fault, where it is not as `notice` says."""
    localise: dict[str, ConstantEntry] = msgspec.field(default_factory=dict)
    """From detection until it is known what to replace, by kind of fault."""
    silent: Watch | None = None
    """What detectors of silent corruption notice of each kind of it, and how soon."""


class ProfileFile(Section, frozen=True, kw_only=True):
    """What things take in a cluster, and what its system does: a file that simulations read."""

    kind: Literal["Profile"]
    api_version: Literal["holdfast.dev/v1alpha1"] = "holdfast.dev/v1alpha1"
    name: ClassName
    about: Words
    """What it is to be like, and how its numbers were come by."""
    constants: dict[str, Any]
    """By name: order, exit, stop, rendezvous, ...; each with its value, origin and source."""
    habits: HabitsEntry
    observed: dict[str, ConstantEntry] = msgspec.field(default_factory=dict)
    """What was measured beside the constants; nothing uses it."""


CHOICES: dict[str, tuple[str, ...]] = {
    "notice": ("own", "good", "legacy"),
    "buddies": ("kept", "none"),
    "spares": ("warm", "cold", "requeue"),
}


def names() -> tuple[str, ...]:
    """Return the names of the profiles that come with holdfast, sorted."""
    return tuple(sorted(path.stem for path in PACKAGED.glob("*.yaml")))


def packaged(name: str) -> Profile:
    """Return a profile that comes with holdfast. Raises BadFileError if there is none of it."""
    if name not in names():
        raise _unknown("profile", name, names(), str(PACKAGED))
    return read(PACKAGED / f"{name}.yaml")


def read(path: Path) -> Profile:
    """Read a profile, YAML or JSON. Raises BadFileError if it is none."""
    return parse(document.read(path), str(path))


def parse(text: str, where: str) -> Profile:
    """Read a profile from text.

    Args:
        text: YAML or JSON.
        where: the file's name, for the message.

    Raises:
        BadFileError: naming the first thing that is not as it should be.
    """
    file = document.shape(document.fields(text, "Profile", where), ProfileFile, where)
    known = set(CONSTANTS.values())
    for name in file.constants:
        if name not in known:
            raise _unknown("constant", name, known, where)
    missing = [name for name in CONSTANTS.values() if name not in file.constants]
    if missing:
        raise BadFileError(
            f"constants has no {', '.join(missing)}, expected all {len(known)} constants: {where}",
            "`holdfast measure -o FILE` writes a profile that has them all",
        )
    constants = {
        name: _constant(
            document.shape(file.constants[written], ConstantEntry, f"constants.{written}: {where}"),
            f"constants.{written}",
            where,
        )
        for name, written in CONSTANTS.items()
    }
    observed = {
        name: _constant(entry, f"observed.{name}", where) for name, entry in file.observed.items()
    }
    told: dict[str, Any] = {"about": file.about, "observed": observed, **constants}
    return Profile(name=file.name, habits=_habits(file.habits, where), **told)


def plain(profile: Profile) -> dict[str, Any]:
    """Return a profile as it stands in a file, plain data in a good order."""
    habits = profile.habits
    assert habits is not None, "a file has them"
    entries: dict[str, Any] = {
        "notice": msgspec.structs.asdict(habits.notice),
        "detectWithin": _entry(habits.detect_within),
        "memory": habits.memory and _entry(habits.memory),
        "durable": _entry(habits.durable),
        "buddies": msgspec.structs.asdict(habits.buddies),
        "spares": msgspec.structs.asdict(habits.spares),
        "requeue": habits.requeue and _entry(habits.requeue),
        "detect": {kind: _entry(each) for kind, each in habits.detect.items()},
        "localise": {kind: _entry(each) for kind, each in habits.localise.items()},
        "silent": habits.silent and msgspec.to_builtins(habits.silent),
    }
    told = {
        "kind": "Profile",
        "name": profile.name,
        "about": profile.about,
        "constants": {CONSTANTS[n]: _entry(c) for n, c in profile.constants().items()},
        "habits": {name: entry for name, entry in entries.items() if entry},
    }
    if profile.observed:
        told["observed"] = {name: _entry(each) for name, each in profile.observed.items()}
    return told


def text(profile: Profile, *, json: bool) -> str:
    """Return the text of a profile's file: JSON, or else YAML."""
    told = plain(profile)
    if json:
        return msgspec.json.format(msgspec.json.encode(told), indent=2).decode() + "\n"
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=100)


def span(value_s: float) -> str:
    """Return seconds as files write them, to the microsecond.

    >>> [span(s) for s in (0.0021, 17.0, 129.5)]
    ['2.1ms', '17s', '129.5s']
    """
    number, unit = (value_s * 1e3, "ms") if value_s < 1 else (value_s, "s")
    return f"{number:.{3 if unit == 'ms' else 6}f}".rstrip("0").rstrip(".") + unit


def _entry(constant: Constant) -> dict[str, Any]:
    told: dict[str, Any] = (
        {"points": [_sourced(point, gpus=point.gpus) for point in constant.points]}
        if constant.points
        else _sourced(constant)
    )
    if constant.varies is not None:
        told["varies"] = msgspec.to_builtins(constant.varies)
    return told


def _sourced(number: Constant | Point, **size: int) -> dict[str, Any]:
    told = {"value": span(number.value), "origin": number.origin, "source": number.source}
    return {**size, **told, **({"samples": number.samples} if number.samples else {})}


def _habits(entry: HabitsEntry, where: str) -> Habits:
    def constant(name: str, given: ConstantEntry) -> Constant:
        return _constant(given, f"habits.{name}", where)

    def by_kind(name: str, given: Mapping[str, ConstantEntry]) -> dict[Kind, Constant]:
        kinds = get_args(Kind)
        for kind in given:
            if kind not in kinds:
                raise _unknown("kind of fault", kind, kinds, f"habits.{name}: {where}")
        return {k: constant(f"{name}.{k}", given[k]) for k in kinds if k in given}

    def choice(name: str, given: ChoiceEntry) -> Choice:
        if given.value not in CHOICES[name]:
            raise BadFileError(
                f"habits.{name}.value is {given.value!r}, expected one of "
                f"{', '.join(CHOICES[name])}: {where}",
                "docs/profiles.md has what they mean",
            )
        return Choice(given.value, given.origin, given.source)

    spares = choice("spares", entry.spares)
    if (spares.value == "requeue") != (entry.requeue is not None):
        found = "is missing" if entry.requeue is None else "is there"
        raise BadFileError(
            f"habits.requeue {found} and habits.spares.value is {spares.value!r}, expected "
            f"`requeue` with both or neither: {where}",
            "`requeue` is what the scheduler takes when there are no spares",
        )
    return Habits(
        notice=choice("notice", entry.notice),
        detect_within=constant("detectWithin", entry.detect_within),
        memory=constant("memory", entry.memory) if entry.memory else None,
        durable=constant("durable", entry.durable),
        buddies=choice("buddies", entry.buddies),
        spares=spares,
        requeue=constant("requeue", entry.requeue) if entry.requeue else None,
        detect=by_kind("detect", entry.detect),
        localise=by_kind("localise", entry.localise),
        silent=entry.silent,
    )


def _constant(entry: ConstantEntry, name: str, where: str) -> Constant:
    _require_bounded(entry.varies, name, where)
    if (entry.value is None) == (not entry.points):
        found = "neither" if entry.value is None else "both"
        raise BadFileError(
            f"{name}: found {found} of `value` and `points`, expected exactly one: {where}",
            "`value` if it does not depend on size, `points` if it does",
        )
    if not entry.points:
        if entry.origin is None or entry.source is None:
            absent = "origin" if entry.origin is None else "source"
            raise BadFileError(f"{name} has no `{absent}`: {where}", _ORIGIN_HINT)
        value = _seconds(entry.value, name, where)
        _require_samples(entry.origin, entry.samples, name, where)
        return Constant(value, entry.origin, entry.source, entry.samples, (), entry.varies)
    if entry.origin or entry.source or entry.samples:
        raise BadFileError(
            f"{name} has points, and an origin, source or samples beside them: {where}",
            "each point has its own",
        )
    points = []
    for index, each in enumerate(entry.points):
        at = f"{name}.points[{index}]"
        value = _seconds(each.value, at, where)
        _require_samples(each.origin, each.samples, at, where)
        points.append(
            Point(
                gpus=each.gpus,
                value=value,
                origin=each.origin,
                source=each.source,
                samples=each.samples,
            )
        )
    _require_growth(points, name, where)
    return Constant.through(points, entry.varies)


def _seconds(given: str | float | None, name: str, where: str) -> float:
    if not isinstance(given, str):
        found = "nothing" if given is None else f"{given:g} without a unit"
        raise BadFileError(f"{name}: value is {found}, expected a span: {where}", _SPAN_HINT)
    if given.strip().startswith("-"):
        raise BadFileError(f"{name}: value is {given}, expected 0s or more: {where}", _SPAN_HINT)
    try:
        return span_s(given)
    except ValueError as error:
        raise BadFileError(document.printable(f"{name}: {error}: {where}"), _SPAN_HINT) from error


def _require_samples(origin: Origin, samples: int, name: str, where: str) -> None:
    if (origin == "measured") != (samples > 0):
        raise BadFileError(
            f"{name}: origin is {origin} and samples is {samples}, expected samples with what was "
            f"measured, and with nothing else: {where}",
            "of how many measurements is it the median?",
        )


def _require_bounded(varies: Varies | None, name: str, where: str) -> None:
    if varies is not None and not 0 < varies.sigma <= SIGMA_MAX:
        raise BadFileError(
            f"{name}.varies.sigma is {varies.sigma:g}, expected more than 0 and at most "
            f"{SIGMA_MAX:g}: {where}",
            "0.2 has 95 % of times between two thirds and one and a half of the mean",
        )


def _require_growth(points: list[Point], name: str, where: str) -> None:
    hint = "two sizes or more, ascending; nothing is quicker where there is more of it"
    if len(points) < 2:
        raise BadFileError(f"{name}.points has one point, expected two or more: {where}", hint)
    for low, high in pairwise(points):
        told = (
            f"{name}.points: {span(low.value)} at {low.gpus} GPUs is followed by "
            f"{span(high.value)} at {high.gpus}, expected"
        )
        if high.gpus <= low.gpus or high.value < low.value or low.value <= 0:
            raise BadFileError(f"{told} more than 0s, growing: {where}", hint)
        if log(high.value / low.value) > POWER_MAX * log(high.gpus / low.gpus):
            raise BadFileError(
                f"{told} no more than with the power of {POWER_MAX}: {where}",
                "other sizes would take longer than can be said; are the two far enough apart?",
            )


def _unknown(what: str, found: str, known: Iterable[str], where: str) -> BadFileError:
    listed = sorted(known)
    near = difflib.get_close_matches(found, listed, 1, 0.4)
    return BadFileError(
        document.printable(f"there is no {what} {found!r}: {where}"),
        f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(listed)}",
    )
