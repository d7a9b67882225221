"""A controller as bytes, so that whoever succeeds it need not live through its months again. Pure.

Everything that a controller knows is reached from it through plain containers, numpy arrays and
objects of a few packages of ours; `take` walks that graph, and `restore` builds it again beside
what a controller is made with (its run, limits, policies). Nothing that is read is called, but for
what makes enums, named tuples and msgspec structs of ours; any other object is made bare and given
its attributes. A class is found by its name among those packages only, and only if it has been
imported.

Who replays the events after the snapshot stands where who replays all of them stands, and to the
byte: `take` of the two is the same. So what is mutable keeps its identity, sets are sorted, and
what can not change is written wherever it occurs, whoever shares it.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

import msgspec
import numpy as np

from orchestrator.core.controller import Controller

PACKAGES = (
    "orchestrator.core.",
    "orchestrator.detect.",
    "orchestrator.policy.",
    "orchestrator.protocol.",
)
"""Where classes may come from."""
_ATOMS = frozenset({type(None), bool, int, float, str, bytes})
_KEYS = frozenset({int, str})
_UNFINISHED = object()
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder().decode
_Node = Any
"""An atom, or a list that begins with a letter: see `_Writer.node`."""


class SnapshotError(Exception):
    """These bytes are no snapshot of a controller of this program, or it can not be taken."""

    hint = "It is made to save time: without it, the whole journal is replayed."


def take(controller: Controller) -> bytes:
    """Return what a controller knows.

    Raises:
        SnapshotError: if it knows something that is no container, array or object of ours.
    """
    writer = _Writer(controller.fixed)
    try:
        return _pack(writer.node(controller))
    except (OverflowError, TypeError, RecursionError) as error:
        raise SnapshotError(f"can not be written: {error}") from error


def restore(data: bytes, fresh: Controller) -> Controller:
    """Return a controller that knows what was taken.

    Args:
        data: of `take`.
        fresh: made with the same run; what it was made with is taken over, and it is of no more
            use.

    Raises:
        SnapshotError: if the bytes are damaged, or of another program.
    """
    try:
        found = _Reader(fresh.fixed).value(_unpack(data))
    except SnapshotError:
        raise
    except Exception as error:
        # Whatever else is wrong with bytes from a disk shows as one of a dozen errors.
        raise SnapshotError(f"can not be read: {type(error).__name__}: {error}") from error
    if not isinstance(found, Controller):
        raise SnapshotError(f"is a {type(found).__name__}, expected a controller")
    return found


def _name(kind: type) -> str:
    """Return how a class is written. Raises SnapshotError if it is none that may be read again."""
    name = f"{kind.__module__}:{kind.__qualname__}"
    if not name.startswith(PACKAGES):
        raise SnapshotError(f"knows a {name}, expected what is of {', '.join(PACKAGES)}")
    return name


def _class(name: str, base: type = object) -> Any:  # noqa: ANN401 - its attributes are asked for
    """Return a class of ours by its name. Raises SnapshotError if it is none of that kind."""
    module, _, path = name.partition(":")
    found: object = sys.modules.get(module) if module.startswith(PACKAGES) else None
    for part in path.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type) or found.__module__ != module or not issubclass(found, base):
        raise SnapshotError(f"has a {name}, which is no class of this program")
    return found


def _attributes(value: object) -> list[str]:
    """Return the names of what an object has, in a fixed order."""
    kinds = type(value).__mro__
    slots = [name for kind in kinds for name in getattr(kind, "__slots__", ())]
    return [name for name in slots if hasattr(value, name)] + list(getattr(value, "__dict__", ()))


class _Writer:
    """Turns values into what msgpack can write.

    Args:
        fixed: objects that are named instead of written.
    """

    def __init__(self, fixed: dict[str, object]) -> None:
        self._fixed = {id(each): name for name, each in fixed.items()}
        self._numbers: dict[int, int] = {}

    def node(self, value: Any) -> _Node:  # noqa: ANN401 - whatever is there
        """Return a value as an atom, or as a list of a letter and what makes it again."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        if id(value) in self._fixed:
            return ["X", self._fixed[id(value)]]
        return self._lasting(value, kind) or self._changing(value, kind)

    def _lasting(self, value: Any, kind: Any) -> _Node:  # noqa: ANN401, PLR0911 - one per type
        """Return what can not change, wherever it occurs; None for what can."""
        match value:
            case Enum():
                return ["E", _name(kind), value.value]
            case frozenset():
                return ["F", self._sorted(value)]
            case tuple() if kind is tuple:
                return ["T", self._nodes(value)]
            case tuple():
                return ["N", _name(kind), self._nodes(value)]
            case msgspec.Struct() if kind.__struct_config__.frozen:
                return ["C", _name(kind), self._fields(value, kind.__struct_fields__)]
            case np.generic():
                return ["G", value.dtype.str, value.tobytes()]
        return None

    def _changing(self, value: Any, kind: Any) -> _Node:  # noqa: ANN401, PLR0911 - one per type
        """Return what can change once, and a reference to it from then on."""
        if id(value) in self._numbers:
            return ["R", self._numbers[id(value)]]
        self._numbers[id(value)] = len(self._numbers)
        if kind is list:
            return ["L", self._nodes(value)]
        if kind is dict:
            return self._dict(value)
        if kind is set:
            return ["S", self._sorted(value)]
        if kind is deque:
            return ["Q", value.maxlen, self._nodes(value)]
        if kind is np.ndarray and not value.dtype.hasobject:
            return ["A", value.dtype.str, list(value.shape), value.tobytes()]
        fields = getattr(kind, "__struct_fields__", None) or _attributes(value)
        return ["O", _name(kind), self._fields(value, fields)]

    def _nodes(self, values: Iterable[object]) -> list[_Node]:
        values = list(values)
        return values if _ATOMS.issuperset(map(type, values)) else [self.node(v) for v in values]

    def _dict(self, value: dict[Any, Any]) -> _Node:
        # One entry for each step of the run: too many to be looked at one by one.
        if _KEYS.issuperset(map(type, value)) and _ATOMS.issuperset(map(type, value.values())):
            return ["M", dict(value)]
        return ["D", [self.node(each) for item in value.items() for each in item]]

    def _sorted(self, values: Iterable[object]) -> list[_Node]:
        before = len(self._numbers)
        nodes = [self.node(value) for value in values]
        if len(self._numbers) != before:
            # It would have a number by its place before sorting, and be read in that behind.
            raise SnapshotError("knows a set of what can change")
        return [node for _, node in sorted((_pack(node), node) for node in nodes)]

    def _fields(self, value: object, names: Iterable[str]) -> list[_Node]:
        return [each for name in names for each in (name, self.node(getattr(value, name)))]


class _Reader:
    """Turns back what `_Writer` made. Numbers are given in the order in which it gave them."""

    def __init__(self, fixed: dict[str, object]) -> None:
        self._known: list[Any] = []
        self._read: dict[str, Callable[..., Any]] = {
            "X": fixed.__getitem__,
            "E": lambda name, value: _class(name, Enum)(value),
            "F": lambda nodes: frozenset(self._values(nodes)),
            "T": lambda nodes: tuple(self._values(nodes)),
            "N": lambda name, nodes: _class(name, tuple)._make(self._values(nodes)),
            "C": lambda name, nodes: _class(name, msgspec.Struct)(**dict(self._pairs(nodes))),
            "G": lambda kind, data: np.frombuffer(data, np.dtype(kind))[0],
            "R": self._again,
            "L": self._list,
            "M": self._known_as,
            "D": self._dict,
            "S": self._set,
            "Q": self._deque,
            "A": self._array,
            "O": self._object,
        }

    def value(self, node: _Node) -> Any:  # noqa: ANN401 - whatever was written
        return self._read[node[0]](*node[1:]) if isinstance(node, list) else node

    def _values(self, nodes: list[_Node]) -> list[Any]:
        return [self.value(node) if type(node) is list else node for node in nodes]

    def _pairs(self, nodes: list[_Node]) -> Iterable[tuple[Any, Any]]:
        values = map(self.value, nodes)
        return zip(values, values, strict=True)

    def _known_as(self, value: Any) -> Any:  # noqa: ANN401
        self._known.append(value)
        return value

    def _again(self, number: int) -> Any:  # noqa: ANN401
        if self._known[number] is _UNFINISHED:
            raise SnapshotError("has a struct that refers to itself")
        return self._known[number]

    def _list(self, nodes: list[_Node]) -> list[Any]:
        found: list[Any] = self._known_as([])
        found += self._values(nodes)
        return found

    def _dict(self, nodes: list[_Node]) -> dict[Any, Any]:
        found: dict[Any, Any] = self._known_as({})
        found.update(self._pairs(nodes))
        return found

    def _set(self, nodes: list[_Node]) -> set[Any]:
        found: set[Any] = self._known_as(set())
        found.update(self._values(nodes))
        return found

    def _deque(self, longest: int | None, nodes: list[_Node]) -> deque[Any]:
        found: deque[Any] = self._known_as(deque(maxlen=longest))
        found.extend(self._values(nodes))
        return found

    def _array(self, kind: str, shape: list[int], data: bytes) -> Any:  # noqa: ANN401
        # A copy: what is read from bytes can not be written to.
        return self._known_as(np.frombuffer(data, np.dtype(kind)).reshape(shape).copy())

    def _object(self, name: str, nodes: list[_Node]) -> Any:  # noqa: ANN401
        kind = _class(name)
        if issubclass(kind, msgspec.Struct):
            # There is no bare struct: it is known from when it is whole, and knows not itself.
            number = len(self._known)
            self._known.append(_UNFINISHED)
            self._known[number] = kind(**dict(self._pairs(nodes)))
            return self._known[number]
        found = self._known_as(object.__new__(kind))
        for attribute, value in self._pairs(nodes):
            object.__setattr__(found, attribute, value)  # a frozen dataclass lets nobody else
        return found
