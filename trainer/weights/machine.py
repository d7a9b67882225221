"""Reads the pickle of a dictionary of tensors as data: nothing that it says is done.

Python's own reader, however restricted, takes memory for what a pickle announces before it looks
whether that is there. This one takes nothing but slices of what it was given.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from orchestrator.worker import MisconfiguredError

STORAGES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
}
OTHER_STORAGES = {
    f"torch {kind}Storage"
    for kind in ("Long", "Int", "Short", "Char", "Byte", "Bool", "Untyped", "Float8_e4m3fn")
}
"""Known, and no weights."""
DIMENSIONS_MAX = 8
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_ORDERED = "collections OrderedDict"
ADMITTED = {*STORAGES, *OTHER_STORAGES, _TENSOR, _PARAMETER, _ORDERED}
_HINT = "expected what torch.save makes of a dictionary of tensors; nothing in the file was run"


class Name(NamedTuple):
    """Something that the pickle names: module and name with a space between, one of ADMITTED."""

    text: str


class StorageRecord(NamedTuple):
    """The bytes of a tensor, beside the pickle."""

    dtype: torch.dtype
    key: str
    numel: int


class TensorRecord(NamedTuple):
    """A tensor, as the pickle describes it: contiguous."""

    storage: StorageRecord
    offset: int
    size: tuple[int, ...]


class _Mark:
    """Where on the stack a tuple or a dictionary's items begin."""


_MARK = _Mark()


class _RefusedError(Exception):
    """It says what such a pickle does not say."""


def tensors_of(program: bytes, where: str) -> dict[str, TensorRecord]:
    """Return the tensors that a pickle describes, by name.

    Args:
        program: all of it.
        where: its file, for messages.

    Raises:
        MisconfiguredError: if it is anything but a dictionary of tensors. Nothing of it was run.
    """
    try:
        return _tensors_only(_Machine(program).run())
    except _RefusedError as error:
        raise MisconfiguredError(f"pickle is refused: {error}: {where}", hint=_HINT) from None
    except (IndexError, ValueError, TypeError, struct.error, RecursionError) as error:
        raise MisconfiguredError(f"pickle is damaged: {error}: {where}", hint=_HINT) from error


def _tensors_only(result: object) -> dict[str, TensorRecord]:
    if not isinstance(result, dict):
        raise _RefusedError(f"it is {_words(result)}, expected a dictionary")
    for name, value in result.items():
        if not isinstance(value, TensorRecord):
            raise _RefusedError(f"{_words(name)} is {_words(value)}, expected a tensor")
    return result


class _Machine:
    def __init__(self, program: bytes) -> None:
        self._program, self._at = program, 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:  # noqa: ANN401 - whatever it describes
        while True:
            code = self.take(1)
            if code == b".":
                return self.pop()
            step = _STEPS.get(code)
            if step is None:
                raise _RefusedError(f"instruction {code!r} at byte {self._at - 1}")
            step(self)

    def take(self, count: int) -> bytes:
        piece = self._program[self._at : self._at + count]
        if len(piece) != count:
            raise _RefusedError(f"it ends at byte {len(self._program)}")
        self._at += count
        return piece

    def pop(self) -> Any:  # noqa: ANN401 - whatever is there
        return self._stack.pop()

    def number(self, form: str) -> int:
        number: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return number

    def _line(self) -> str:
        end = self._program.find(b"\n", self._at)
        if end < 0:
            raise _RefusedError(f"it ends at byte {len(self._program)}")
        line, self._at = self._program[self._at : end], end + 1
        return line.decode("ascii", "replace")

    def since_mark(self) -> list[Any]:
        for at in range(len(self._stack) - 1, -1, -1):
            if self._stack[at] is _MARK:
                items = self._stack[at + 1 :]
                del self._stack[at:]
                return items
        raise _RefusedError(f"items without a beginning before byte {self._at}")

    # Instructions, by what they leave on the stack -------------------------------------------

    def push(self, value: object) -> None:
        self._stack.append(value)

    def text(self, form: str) -> None:
        self.push(self.take(self.number(form)).decode())

    def long(self) -> None:
        self.push(int.from_bytes(self.take(self.number("<B")), "little", signed=True))

    def name(self) -> None:
        text = f"{self._line()} {self._line()}"
        if text not in ADMITTED:
            raise _RefusedError(f"it names {text.replace(' ', '.')!r:.120}")
        self.push(Name(text))

    def tuple(self, count: int | None) -> None:
        if count is None:
            self.push(tuple(self.since_mark()))
            return
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def store(self, form: str) -> None:
        self._memo[self.number(form)] = self._stack[-1]

    def load(self, form: str) -> None:
        number = self.number(form)
        if number not in self._memo:
            raise _RefusedError(f"nothing was kept under {number}")
        self.push(self._memo[number])

    def set_items(self, items: Sequence[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise _RefusedError(f"items for {_words(target)}, expected a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Other keys may take for ever to hash: tuples of the same tuple twice, and so on.
            if not isinstance(key, str):
                raise _RefusedError(f"a key that is {_words(key)}, expected a name")
            target[key] = value

    def build(self) -> None:
        # What `state_dict` leaves beside its tensors: versions of modules. Nobody needs them.
        state, target = self.pop(), self._stack[-1]
        if not isinstance(target, dict) or not isinstance(state, dict):
            raise _RefusedError(f"attributes for {_words(target)}, expected a dictionary")

    def append(self, items: Sequence[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise _RefusedError(f"items for {_words(target)}, expected a list")
        target.extend(items)

    def persistent(self) -> None:
        match self.pop():
            case ("storage", Name(kind), str(key), str(), int(numel)) if numel >= 0:
                if kind not in STORAGES:
                    raise _RefusedError(
                        f"storage {key!r:.40} is a {kind.removeprefix('torch ')}, expected "
                        "numbers of 16, 32 or 64 bits with a fraction"
                    )
                self.push(StorageRecord(STORAGES[kind], key, numel))
            case other:
                raise _RefusedError(f"{_words(other)} beside the pickle, expected a storage")

    def reduce(self) -> None:
        arguments, called = self.pop(), self.pop()
        match (called, arguments):
            case (Name(text), ()) if text == _ORDERED:
                self.push({})
            case (Name(text), (TensorRecord() as tensor, bool(), _)) if text == _PARAMETER:
                self.push(tensor)
            case (
                Name(text),
                (StorageRecord() as storage, int(offset), tuple(size), tuple(stride), bool(), *_),
            ) if text == _TENSOR:
                self.push(_tensor(storage, offset, size, stride))
            case _:
                raise _RefusedError(f"a call of {_words(called)} with {_words(arguments)}")


def _words(value: object) -> str:
    """Return what something is, in a few words however much hangs on it."""
    match value:
        case str() | int() | None:
            return f"{value!r:.80}"
        case Name(text):
            return text.replace(" ", ".")
        case tuple() | list() | dict():
            return f"a {type(value).__name__} of {len(value)}"
        case _:
            return f"a {type(value).__name__.removesuffix('Record').lower()}"


def _require_protocol(version: int) -> None:
    if version not in (2, 3, 4):
        raise _RefusedError(f"it is of protocol {version}, expected 2 to 4")


def _tensor(
    storage: StorageRecord, offset: int, size: tuple[Any, ...], stride: tuple[Any, ...]
) -> TensorRecord:
    numbers = (offset, *size, *stride)
    # Of more dimensions, sizes that are multiplied with each other may take for ever.
    if len(size) > DIMENSIONS_MAX:
        raise _RefusedError(
            f"a tensor of {len(size)} dimensions, expected {DIMENSIONS_MAX} at most"
        )
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers) or len(size) != len(stride):
        raise _RefusedError(f"a tensor of size {_words(size)} and strides {_words(stride)}")
    for dim, length in enumerate(size):
        if length > 1 and stride[dim] != math.prod(size[dim + 1 :]):
            raise _RefusedError(
                f"a tensor of size {size} with strides {stride}, expected row after row"
            )
    return TensorRecord(storage, offset, size)


_STEPS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": lambda m: _require_protocol(m.number("<B")),
    b"c": _Machine.name,
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"(": lambda m: m.push(_MARK),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": _Machine.long,
    b"X": lambda m: m.text("<I"),
    b"\x8c": lambda m: m.text("<B"),
    b"t": lambda m: m.tuple(None),
    b"\x85": lambda m: m.tuple(1),
    b"\x86": lambda m: m.tuple(2),
    b"\x87": lambda m: m.tuple(3),
    b"q": lambda m: m.store("<B"),
    b"r": lambda m: m.store("<I"),
    b"h": lambda m: m.load("<B"),
    b"j": lambda m: m.load("<I"),
    b"u": lambda m: m.set_items(m.since_mark()),
    b"s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.since_mark()),
    b"b": _Machine.build,
    b"Q": _Machine.persistent,
    b"R": _Machine.reduce,
}
