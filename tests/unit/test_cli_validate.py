"""Run files that are validated, and their fields explained."""

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from orchestrator.cli import explain
from orchestrator.protocol.runfile import TrainingRun
from tests.conftest import RUN
from tests.journals import (
    refused,
    told,
)

pytestmark = pytest.mark.usefixtures("home")


def test_validate_says_back_what_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "plan.yaml").write_text(
        "kind: FaultPlan\nfaults: [{when: {step: 12}, fault: kill-rank, rank: 1}]"
    )

    out = told("validate", str(tmp_path / "run.yaml"), "--faults", str(tmp_path / "plan.yaml"))

    assert "2 nodes of 2 ranks, 1 spare\n" in out
    assert "kill-rank rank 1 at step 12" in out


@pytest.mark.parametrize("command", ["validate", "run"])
def test_a_bad_run_file_or_plan_is_refused_before_anything_starts(
    command: str, tmp_path: Path, home: Path
) -> None:
    run, plan = tmp_path / "run.yaml", tmp_path / "plan.yaml"
    run.write_text(RUN.replace("ranksPerNode", "ranksPerNod"))
    message, hint = refused(command, str(run), code=2)
    assert str(run) in message
    assert hint == "did you mean `ranksPerNode`?"

    run.write_text(RUN)
    plan.write_text("kind: FaultPlan\nfaults: [{when: {step: 1}, fault: kill-rank, rank: 9}]")
    message, _ = refused(command, str(run), "--faults", str(plan), code=2)
    assert "rank is 9, expected 0 to 3" in message
    assert str(plan) in message
    assert list(home.iterdir()) == []


def test_a_timeout_without_a_unit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)

    message, _ = refused("run", str(tmp_path / "run.yaml"), "--timeout", "10", code=2)

    assert message.startswith("--timeout: duration is '10'")


def test_explain_gives_type_default_and_meaning_of_a_field() -> None:
    saves = "memoryEverySteps: number >= 1 and <= 2^40, default 5"
    assert saves in told("explain", "spec.checkpoint")
    assert "probability: number > 0 and <= 1, default 1.0" in told("explain", "plan.faults.when")
    assert "of at most 63 characters, required" in told("explain", "metadata.name")
    assert "of at least 1 entries and of at most 256 entries" in told("explain", "record")
    assert "`debug`, `8B`, `70B`, `405B`" in told("explain", "spec.trainer.model")
    assert "How long it lasts" in told("explain", "plan.faults.for")
    assert "kind: TrainingRun, required" in told("explain")


def test_explain_knows_every_field_of_a_run_file_and_lists_it_in_its_section() -> None:
    paths = list(fields_in(TrainingRun))
    new = ("trainer.data.sources.uri", "trainer.batchRamp.tokens", "recovery.minReplicas")
    assert {f"spec.{path}" for path in new} <= set(paths)

    for path in paths:
        section = path.rpartition(".")[0]
        line = explain.explain(path).splitlines()[0]
        assert f"  {line}" in explain.explain(section).splitlines()
        # Words for who writes the file, not Python's for the type.
        assert not re.search(r"typing\.|msgspec|<class|NoneType|\.runfile", line)
        # And what it is for, in a sentence.
        assert len(explain.explain(path).splitlines()) > 1, path


def fields_in(section: type[msgspec.Struct], at: str = "") -> Iterator[str]:
    for field in msgspec.structs.fields(section):
        path = f"{at}{field.encode_name}"
        yield path
        inner = [a for a in annotations_in(field.type) if issubclass(a, msgspec.Struct)]
        for each in inner:
            yield from fields_in(each, f"{path}.")


def annotations_in(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from annotations_in(argument)
