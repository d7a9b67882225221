"""Writes plain Python values as JSON and gets the same values back, types included.

JSON has no tuples, bytes, NaN or keys that are numbers. Whatever JSON does not have becomes an
object with one key that says what it is; whatever is not in the table is refused, never converted.
"""

import base64
import binascii
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeAlias

from storage.errors import ShardCorruptError, UnstorableError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Inside: TypeAlias = "Callable[[object], Json]"

DEPTH_MAX = 64
_INT_MIN, _INT_MAX = -(1 << 63), (1 << 64) - 1


def to_json(value: object, where: str) -> Json:
    """Return a value in terms of JSON.

    ==========================  ====================================================================
    value                       becomes
    ==========================  ====================================================================
    None, bool, int, str        itself; an int beyond 64 bits `{"int": "<decimal>"}`
    float                       itself if finite, else `{"float": "nan"}`, `"inf"` or `"-inf"`
    list                        a list
    tuple                       `{"tuple": [...]}`
    dict, OrderedDict           `{"dict": [[key, value], ...]}`, `{"ordered": ...}`, in their order
    bytes                       `{"bytes": "<base64>"}`
    set of plain values         `{"set": [...]}`, in the order of their JSON
    ==========================  ====================================================================

    Args:
        value: of exactly these types; what is derived from one of them is another type.
        where: names the value in messages.

    Raises:
        UnstorableError: if it, or something in it, is of another type, or is nested deeper than
            `DEPTH_MAX`.

    >>> to_json({"betas": (0.9, 0.95)}, "optim")
    {'dict': [['betas', {'tuple': [0.9, 0.95]}]]}
    """
    return _encoded(value, where, 0)


def from_json(value: Json, where: str) -> object:
    """Return the value that `to_json` was given.

    Raises:
        ShardCorruptError: if `to_json` makes no such thing.

    >>> from_json({"tuple": [1, {"float": "inf"}]}, "x")
    (1, inf)
    """
    try:
        return _decoded(value, 0)
    except (ValueError, TypeError, KeyError, binascii.Error) as error:
        raise ShardCorruptError(f"value has no known form ({error}): {where}") from error


def _encoded(value: object, where: str, depth: int) -> Json:
    if depth > DEPTH_MAX:
        raise UnstorableError(f"value is nested deeper than {DEPTH_MAX}: {where}")
    kind = type(value)
    encoder = _ENCODERS.get(kind)
    if encoder is None:
        raise UnstorableError(
            f"value is a {kind.__module__}.{kind.__qualname__}, expected a number, text, bytes or "
            f"None, or lists, tuples, sets and dictionaries of them: {where}"
        )
    return encoder(value, lambda item: _encoded(item, where, depth + 1))


def _int_json(value: int) -> Json:
    return value if _INT_MIN <= value <= _INT_MAX else {"int": str(value)}


def _float_json(value: float) -> Json:
    return value if math.isfinite(value) else {"float": str(value)}


def _dict_json(value: dict[object, object], inside: Inside) -> Json:
    return [[inside(key), inside(item)] for key, item in value.items()]


_ENCODERS: dict[type, Callable[[Any, Inside], Json]] = {
    type(None): lambda _value, _inside: None,
    bool: lambda value, _inside: value,
    str: lambda value, _inside: value,
    int: lambda value, _inside: _int_json(value),
    float: lambda value, _inside: _float_json(value),
    bytes: lambda value, _inside: {"bytes": base64.b64encode(value).decode()},
    list: lambda value, inside: [inside(item) for item in value],
    tuple: lambda value, inside: {"tuple": [inside(item) for item in value]},
    dict: lambda value, inside: {"dict": _dict_json(value, inside)},
    OrderedDict: lambda value, inside: {"ordered": _dict_json(value, inside)},
    set: lambda value, inside: {"set": sorted((inside(item) for item in value), key=repr)},
}


def _decoded(value: Json, depth: int) -> object:
    if depth > 2 * DEPTH_MAX + 2:
        raise ValueError(f"nested deeper than {DEPTH_MAX}")
    if isinstance(value, list):
        return [_decoded(item, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError(f"{len(value)} keys, expected one")
    ((tag, held),) = value.items()
    return _DECODERS[tag](held, depth)


def _list(held: Json, depth: int) -> list[object]:
    if not isinstance(held, list):
        raise TypeError("expected a list")
    return [_decoded(item, depth + 1) for item in held]


def _pairs(held: Json, depth: int) -> list[tuple[object, object]]:
    pairs = _list(held, depth)
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise TypeError("expected pairs")
    return [(pair[0], pair[1]) for pair in pairs if isinstance(pair, list)]


def _text(held: Json) -> str:
    if not isinstance(held, str):
        raise TypeError("expected text")
    return held


def _odd_float(held: Json) -> float:
    if held not in ("nan", "inf", "-inf"):
        raise ValueError(f"float is {held!r:.40}")
    return float(_text(held))


_DECODERS: dict[str, Callable[[Json, int], object]] = {
    "tuple": lambda held, depth: tuple(_list(held, depth)),
    "dict": lambda held, depth: dict(_pairs(held, depth)),
    "ordered": lambda held, depth: OrderedDict(_pairs(held, depth)),
    "set": lambda held, depth: set(_list(held, depth)),
    "bytes": lambda held, _depth: base64.b64decode(_text(held), validate=True),
    "int": lambda held, _depth: int(_text(held)),
    "float": lambda held, _depth: _odd_float(held),
}
