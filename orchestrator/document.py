"""Reads a file that a user wrote: YAML that can not surprise, or JSON, as what it should be.

What is read becomes JSON in a run's folder and in its journal, so only what JSON can say is taken.
Aliases, tags and doubled names are refused: the first can make a page of text fill the memory, and
of two values under one name one would silently do nothing.
"""

from __future__ import annotations

import difflib
import re
from enum import Enum
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import msgspec
import yaml

FILE_MAX_BYTES = 32 << 10
"""Some 400 faults; the slowest text of this length takes the parser a second."""
DEPTH_MAX = 32
"""Lists and sections inside each other."""
INTEGER_MAX = (1 << 63) - 1
_INTEGER_MAX_CHARS = 80
_SHOWN_CHARS = 24
_FOUND_CHARS = 60


S = TypeVar("S", bound=msgspec.Struct)
_INVALID_ENUM = re.compile(r"Invalid enum value .*? - at `\$\.(?P<path>[^`]*)`\Z", re.DOTALL)
_OUT_OF_BOUNDS = re.compile(r"Expected `[^`]*` (?:[<>]|matching).* - at `\$\.(?P<path>[^`]*)`\Z")
_STEP = re.compile(r"(?P<name>[^.\[\]]+)|\[(?P<index>\d+)\]")
_UNKNOWN_FIELD = re.compile(r"unknown field `(?P<field>[^`]*)`(?: - at `\$\.?(?P<path>[^`]*)`)?")


class BadFileError(Exception):
    """A file that a user wrote can not be used.

    Attributes:
        hint: what to change.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint

    def __reduce__(self) -> tuple[type[BadFileError], tuple[str, str]]:
        """Have another process raise it here as it was."""
        return type(self), (str(self), self.hint)


def read(path: Path) -> str:
    """Return the text of a file.

    Raises:
        BadFileError: if it can not be read, is too long, or is not UTF-8 text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(FILE_MAX_BYTES + 1)
    except OSError as error:
        raise BadFileError(
            f"{error.strerror}: {path}", "check the path and its permissions"
        ) from error
    if len(data) > FILE_MAX_BYTES:
        raise BadFileError(
            f"expected at most {FILE_MAX_BYTES} bytes, found more: {path}", "is it the right file?"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadFileError(
            f"not UTF-8 text, byte {error.start} is {data[error.start]:#04x}: {path}",
            "is it the right file?",
        ) from error


def parse(text: str, where: str) -> object:
    """Return the plain data that a YAML text stands for: dict, list, text, numbers, bool, None.

    Args:
        text: at most FILE_MAX_BYTES of it, or it may take long.
        where: the file's name, for the message.

    Raises:
        BadFileError: if it is not YAML, or says what JSON could not; with line and column.
    """
    try:
        return _load(text, where)
    except _RefusedError as error:
        raise BadFileError(f"{error.problem}: {_place(error, where)}", str(error.note)) from error
    except yaml.MarkedYAMLError as error:
        what = ", ".join(part for part in (error.problem, error.context) if part)
        raise BadFileError(
            f"not YAML: {what}: {_place(error, where)}".replace("\n", " "),
            "check indentation, colons and quotes there",
        ) from error
    except yaml.reader.ReaderError as error:
        raise BadFileError(
            f"not text: character {error.character:#x} at position {error.position}: {where}",
            "is it the right file?",
        ) from error


def _load(text: str, where: str) -> object:
    loader = _PlainLoader(text)
    try:
        return loader.get_single_data()
    except (ValueError, OverflowError) as error:
        # The library hands what is written on to `chr` and `int`, and lets them speak for it.
        mark = loader.get_mark()
        raise BadFileError(
            f"not YAML: an escape (\\U) or %YAML has a number that can not be: {where}, "
            f"line {mark.line + 1}, column {mark.column + 1}",
            "write the character itself; leave %YAML out",
        ) from error
    finally:
        loader.dispose()


def _place(error: yaml.MarkedYAMLError, where: str) -> str:
    mark = error.problem_mark or error.context_mark
    return f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where


# What it must look like -------------------------------------------------------------------------


def fields(text: str, kind: str, where: str) -> dict[Any, Any]:
    """Return the fields of a file of some kind. Raises BadFileError if it has none."""
    data = parse(text, where)
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise BadFileError(
            f"found {found}, expected fields `kind:`, ...: {where}",
            f"a {kind} file starts with `kind: {kind}`",
        )
    return data


def shape(data: object, kind: type[S], where: str) -> S:
    """Return plain data as a section of that kind.

    Args:
        data: what `parse` returned, or a part of it.
        kind: what it should be.
        where: the file's name, and the section's if it is a part, for the message.

    Raises:
        BadFileError: naming what was expected, found and where, and the nearest known field.
    """
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        message = found(expected(str(error), kind), data)
        raise BadFileError(f"{_plain(message)}: {where}", _hint(str(error), kind)) from error


def expected(message: str, kind: type) -> str:
    """Return what the library says of a choice that there is not, with those that there are."""
    invalid = _INVALID_ENUM.match(message)
    choices = _choices(kind, invalid["path"].split(".")) if invalid is not None else []
    return _inserted(message, f", expected {' | '.join(choices)}") if choices else message


def found(message: str, data: object) -> str:
    """Return what the library says of a bound that is not kept, with the value that was found."""
    broken = _OUT_OF_BOUNDS.match(message)
    if broken is None:
        return message
    value: Any = data
    for step in _STEP.finditer(broken["path"]):
        try:
            value = value[int(step["index"])] if step["index"] else value[step["name"]]
        except (KeyError, IndexError, TypeError):
            # `[...]` is any value of a section whose names are free: which, the library keeps.
            return message
    if not isinstance(value, int | float | str):
        return message
    text = repr(value)
    shown = text if len(text) <= _FOUND_CHARS else f"{text[:_FOUND_CHARS]}..."
    return _inserted(message, f", found {shown}")


def _inserted(message: str, words: str) -> str:
    what, at, path = message.rpartition(" - at `$.")
    return f"{what}{words}{at}{path}"


def printable(message: str) -> str:
    """Return a message without what would do something to a terminal."""
    # What is quoted from the file may have line ends and worse in it.
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in message)


def _plain(message: str) -> str:
    """Say it in the words of the file instead of those of the library."""
    message = message.replace("Object contains unknown", "unknown").replace(" - at `$.", " at `")
    plain = printable(message)
    return plain[:1].lower() + plain[1:]


def _hint(message: str, kind: type) -> str:
    unknown = _UNKNOWN_FIELD.search(message)
    if unknown is None:
        return "`holdfast explain` has the fields, their types and units"
    known = _fields(kind, (unknown["path"] or "").split("."))
    near = difflib.get_close_matches(unknown["field"], known, 1, 0.5)
    if near:
        return f"did you mean `{near[0]}`?"
    return f"known fields here: {', '.join(known)}" if known else "remove it"


def _fields(kind: type, path: list[str]) -> list[str]:
    """Return the names that a section of the file may have, as written there."""
    section = _section(kind, path)
    return [] if section is None else [f.encode_name for f in msgspec.structs.fields(section)]


def _choices(kind: type, path: list[str]) -> list[str]:
    """Return what a field may be that is one of a few, as written in the file."""
    section = _section(kind, path[:-1])
    fields = () if section is None else msgspec.structs.fields(section)
    name = path[-1].partition("[")[0]
    return [each for field in fields if field.encode_name == name for each in _few(field.type)]


def _few(annotation: Any) -> list[str]:  # noqa: ANN401 - a type expression
    if get_origin(annotation) is Literal:
        return [str(each) for each in get_args(annotation)]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [str(each.value) for each in annotation]
    return [each for inner in get_args(annotation) for each in _few(inner)]


def _section(kind: type, path: list[str]) -> type | None:
    """Return the kind of the section that a path leads to; None if its names are free."""
    for name in path:
        name, _, _ = name.partition("[")  # noqa: PLW2901 - `faults[...]` is the list's name
        fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
        if name not in fields:
            continue
        inner = _struct_in(fields[name].type)
        if inner is None:
            return None
        kind = inner
    return kind


def _struct_in(annotation: Any) -> type | None:  # noqa: ANN401 - a type expression
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _struct_in(argument)
        if found is not None:
            return found
    return None


# The YAML that is taken -----------------------------------------------------------------------


class _RefusedError(yaml.MarkedYAMLError):
    """It is YAML, and more than we take. `note` is the hint."""

    def __init__(self, problem: str, mark: yaml.Mark, hint: str) -> None:
        super().__init__(problem=problem, problem_mark=mark, note=hint)


def _number(node: yaml.ScalarNode, problem: str, hint: str) -> _RefusedError:
    shown = node.value if len(node.value) <= _SHOWN_CHARS else f"{node.value[:_SHOWN_CHARS]}..."
    return _RefusedError(f"`{shown}` {problem}", node.start_mark, hint)


class _PlainLoader(yaml.SafeLoader):
    """Knows null, bool, int, float and text; what looks like a date is text."""

    # Of its own, not the base's: those would take dates, base 60 (10:30 is 630) and merge keys.
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401
        event = self.peek_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            raise _RefusedError("aliases (*name) are not taken", mark, "write it out twice")
        if getattr(event, "tag", None) is not None:
            raise _RefusedError(
                f"tags ({event.tag}) are not taken",
                mark,
                "leave it out; quote text to keep it text",
            )
        if self._depth > DEPTH_MAX:
            raise _RefusedError(
                f"more than {DEPTH_MAX} sections inside each other", mark, "is a bracket left open?"
            )
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(
        self,
        node: yaml.MappingNode,
        deep: bool = False,  # noqa: FBT001, FBT002 - the library's own signature
    ) -> dict[Any, Any]:
        del deep  # always: what is read is not handed on before it is whole
        names: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _RefusedError("a name can not be a list or section", key.start_mark, _QUOTES)
            self._require_characters(key)
            if key.value in names:
                raise _RefusedError(
                    f"`{key.value}` is there twice", key.start_mark, "remove one of the two"
                )
            names.add(key.value)
        return {
            str(key.value): self.construct_object(value, deep=True) for key, value in node.value
        }

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        digits = node.value.replace("_", "")
        # Python itself refuses to convert thousands of digits, in other words than ours.
        value = None
        if len(digits) < _INTEGER_MAX_CHARS:
            value = int(digits, 16 if "x" in digits else 10)
        if value is None or not -INTEGER_MAX <= value <= INTEGER_MAX:
            raise _number(node, "has more than 64 bits", "quote it if it is text")
        return value

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        value = float(super().construct_yaml_float(node))
        if not isfinite(value):
            raise _number(node, "is not a finite number", "choose a finite one")
        return value

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        self._require_characters(node)
        return str(node.value)

    @staticmethod
    def _require_characters(node: yaml.ScalarNode) -> None:
        if any(char == "\0" or "\ud800" <= char <= "\udfff" for char in node.value):
            raise _RefusedError("text holds what is no character", node.start_mark, _QUOTES)


_QUOTES = "check brackets and quotes there"
_NUMBER = list("-+.0123456789")
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF",
     list("yYnNtTfFoO")),
    # Ten digits as people read them: base 8 (010 is 8) and base 2 are not for run files.
    ("int", r"[-+]?(0x[0-9a-fA-F][0-9a-fA-F_]*|[0-9][0-9_]*)", _NUMBER),
    # Unlike YAML 1.1 also without a point: 3e-4 is a number to everybody but that.
    ("float", (r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))"
     r"([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"), _NUMBER),
):  # fmt: skip
    _PlainLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first
    )
for _tag in ("int", "float", "str"):
    _PlainLoader.add_constructor(
        f"tag:yaml.org,2002:{_tag}", getattr(_PlainLoader, f"construct_yaml_{_tag}")
    )
