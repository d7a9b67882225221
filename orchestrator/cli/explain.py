"""`holdfast explain`: the fields of the files that a user writes, read from the types of them."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
import typing
from typing import Annotated, Any, Literal

import msgspec

from orchestrator.cli.errors import unknown
from orchestrator.faults.model import FaultModel
from orchestrator.faults.plan import FaultPlan
from orchestrator.faults.record import FaultRecord
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.simulation.settings import Settings
from orchestrator.simulation.sweep import Sweep
from orchestrator.worlds.simulated.profiles import ProfileFile

ROOTS: dict[str, type[msgspec.Struct]] = {
    "run": TrainingRun,
    "plan": FaultPlan,
    "model": FaultModel,
    "record": FaultRecord,
    "profile": ProfileFile,
    "sweep": Sweep,
    "settings": Settings,
}


def explain(path: str | None) -> str:
    """Return the fields of a section, or the type, default and meaning of one field.

    Args:
        path: such as `spec.checkpoint.everySteps`; those of other files begin with `plan`,
            `model`, `record` or `profile`.

    Raises:
        CliError: if there is no such field.
    """
    names = [name for name in (path or "").split(".") if name]
    root = names.pop(0) if names and names[0] in ROOTS else "run"
    section: type[msgspec.Struct] = ROOTS[root]
    walked = [] if root == "run" else [root]
    lines = [_doc(section)]
    for name in names:
        fields = {field.encode_name: field for field in msgspec.structs.fields(section)}
        if name not in fields:
            raise unknown("field", name, fields, ".".join(walked) or "run file")
        walked.append(name)
        field = fields[name]
        inner = _section_in(field.type)
        lines = [_line(section, field), *_docs(section).get(field.name, ())]
        if inner is None:
            if name is not names[-1]:
                raise unknown("field", names[-1], (), ".".join(walked))
            return "\n".join(lines)
        section = inner
        lines.append(_doc(section))
    lines += ["", *(f"  {_line(section, field)}" for field in msgspec.structs.fields(section))]
    return "\n".join(lines)


def _line(section: type[msgspec.Struct], field: msgspec.structs.FieldInfo) -> str:
    text = f"{field.encode_name}: {_type(field.type)}"
    if field.required:
        return f"{text}, required"
    inner = _section_in(field.type)
    default = field.default
    if default is msgspec.NODEFAULT or (inner is not None and default not in ((), None)):
        return text
    del section
    return f"{text}, default {_value(default)}"


def _value(value: object) -> str:
    return "none" if value is None else msgspec.json.encode(value).decode()


def _type(annotation: Any) -> str:  # noqa: ANN401 - a type expression
    if typing.get_origin(annotation) is Annotated:
        base, *metas = typing.get_args(annotation)
        return _type(base) + "".join(_bounds(meta, _parts(base)) for meta in metas)
    if typing.get_origin(annotation) is Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        kinds = [_type(a) for a in typing.get_args(annotation) if a is not types.NoneType]
        return " or ".join(kinds)
    if typing.get_origin(annotation) is tuple:
        return f"list of {_type(typing.get_args(annotation)[0])}"
    if typing.get_origin(annotation) is dict or annotation is dict:
        return "object"
    names = {int: "number", float: "number", str: "text", bool: "true or false"}
    inner = _section_in(annotation)
    return "section" if inner else names.get(annotation, str(annotation))


def _parts(annotation: Any) -> str:  # noqa: ANN401 - a type expression
    """Return what the length of a value counts."""
    kinds = {tuple: "entries", dict: "names"}
    return kinds.get(typing.get_origin(annotation) or annotation, "characters")


def _bounds(meta: object, parts: str) -> str:
    if not isinstance(meta, msgspec.Meta):
        return ""
    bounds = ((">=", meta.ge), (">", meta.gt), ("<=", meta.le), ("<", meta.lt))
    told = [f"{sign} {_bound(value)}" for sign, value in bounds if value is not None]
    if meta.pattern:
        told.append(f"like {meta.pattern}")
    if meta.min_length is not None:
        told.append(f"of at least {meta.min_length} {parts}")
    if meta.max_length is not None:
        told.append(f"of at most {meta.max_length} {parts}")
    return f" {' and '.join(told)}" if told else ""


def _bound(value: float) -> str:
    """Return a bound; a large one that is there for the machine's sake as the power that it is."""
    if isinstance(value, int) and value >= 1 << 20 and value.bit_count() == 1:
        return f"2^{value.bit_length() - 1}"
    return f"{value:g}"


def _section_in(annotation: Any) -> type[msgspec.Struct] | None:  # noqa: ANN401 - a type expression
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return annotation
    for argument in typing.get_args(annotation):
        found = _section_in(argument)
        if found is not None:
            return found
    return None


def _doc(section: type) -> str:
    return inspect.cleandoc(section.__doc__ or "").partition("\n\n")[0]


@functools.cache
def _docs(section: type) -> dict[str, list[str]]:
    """Return the text below each field in the source, which Python itself does not keep."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        match field, after:
            case (
                ast.AnnAssign(target=ast.Name(id=found)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                texts[found] = [f"  {line}" for line in inspect.cleandoc(text).splitlines()]
    return texts
