"""Values beside tensors are JSON, and come back as what they were."""

import math
from collections import OrderedDict, defaultdict

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import ShardCorruptError, UnstorableError
from storage.typed import DEPTH_MAX, from_json, to_json

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.sets(st.integers() | st.text())
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner)
        | st.dictionaries(st.text(), inner).map(OrderedDict)
    ),
    max_leaves=20,
)


def types_of(value: object) -> object:
    if isinstance(value, dict):
        return type(value), [(types_of(key), types_of(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [types_of(item) for item in value]
    return type(value)


@given(VALUES)
def test_any_plain_value_comes_back_with_its_types_and_order(value: object) -> None:
    text = msgspec.json.encode(to_json(value, "x"))

    came = from_json(msgspec.json.decode(text), "x")

    assert came == value
    assert types_of(came) == types_of(value)


def test_numbers_that_json_lacks_come_back() -> None:
    came = from_json(to_json([math.nan, math.inf, -math.inf, 1 << 70], "x"), "x")

    assert isinstance(came, list)
    assert math.isnan(came[0])
    assert came[1:] == [math.inf, -math.inf, 1 << 70]


@pytest.mark.parametrize("value", [object(), defaultdict(int), 1j, range(3), bytearray(b"x")])
def test_a_value_of_another_type_is_refused_and_named(value: object) -> None:
    with pytest.raises(UnstorableError, match=rf"{type(value).__name__}.*: optim.lr"):
        to_json({"in": [value]}, "optim.lr")


def test_a_value_that_holds_itself_is_refused() -> None:
    loop: list[object] = []
    loop.append(loop)

    with pytest.raises(UnstorableError, match=f"deeper than {DEPTH_MAX}"):
        to_json(loop, "loop")


@pytest.mark.parametrize(
    "text",
    [
        '{"tuple": 3}',
        '{"pickle": "x"}',
        '{"dict": [[1]]}',
        '{"dict": [[[1], 2]]}',
        '{"bytes": "*"}',
        '{"float": "1e5"}',
        '{"int": "x"}',
        '{"a": 1, "b": 2}',
        '{"set": [[1]]}',
    ],
)
def test_what_nobody_wrote_is_refused(text: str) -> None:
    with pytest.raises(ShardCorruptError, match=r"no known form.*: name"):
        from_json(msgspec.json.decode(text), "name")
