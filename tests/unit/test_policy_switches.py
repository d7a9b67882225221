"""Which policies a run can do without, and how it is told so."""

from pathlib import Path

import msgspec
import pytest

from orchestrator import compose
from orchestrator.cli import explain
from orchestrator.document import BadFileError
from orchestrator.policy.switches import SWITCHABLE, enabled, without
from orchestrator.protocol.runfile import TrainingRun
from tests import runfiles
from tests.conftest import RUN

PARSED = compose.parse(RUN, TrainingRun, "run.yaml")


@pytest.mark.parametrize("name", SWITCHABLE)
def test_a_policy_is_used_unless_the_run_file_says_otherwise(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(runfiles.text(recovery={"disable": [name]}))

    assert enabled(compose.controller(PARSED).state, name)
    assert not enabled(compose.controller(compose.read_run(path)).state, name)


def test_a_policy_that_there_is_not_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(runfiles.text(recovery={"disable": ["planed-swap"]}))

    with pytest.raises(BadFileError) as refused:
        compose.read_run(path)

    assert "spec.recovery.disable: no policy 'planed-swap', expected some of planned-swap" in str(
        refused.value
    )
    assert str(path) in str(refused.value)
    assert refused.value.hint == "did you mean `planned-swap`?"


def test_a_run_is_made_to_do_without_policies_in_addition_to_those_it_does_without() -> None:
    every = tuple(sorted(SWITCHABLE))
    one = without(PARSED, every[:1])

    assert one.spec.recovery.disable == every[:1]
    assert without(one, every).spec.recovery.disable == every
    assert msgspec.structs.replace(one, spec=PARSED.spec) == PARSED
    with pytest.raises(ValueError, match="no policy 'luck', expected some of planned-swap"):
        without(PARSED, ["luck"])


def test_every_policy_that_can_be_switched_off_is_explained_where_it_is() -> None:
    told = explain.explain("spec.recovery.disable")

    assert [name for name in SWITCHABLE if f"`{name}`" not in told] == []
