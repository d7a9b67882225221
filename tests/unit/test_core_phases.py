from pathlib import Path

import pytest

from orchestrator.core.phases import BUCKET_OF, TRANSITIONS, RunPhase, mermaid, require

ROOT = Path(__file__).parents[2]


def test_the_diagram_in_the_docs_is_the_table() -> None:
    assert f"```mermaid\n{mermaid()}\n```" in (ROOT / "docs/states.md").read_text()


def test_every_phase_can_be_reached_and_is_charged_to_a_bucket() -> None:
    seen = {RunPhase.GATHERING}
    while more := {after for phase in seen for after in TRANSITIONS[phase]} - seen:
        seen |= more
    assert seen == set(RunPhase) == set(BUCKET_OF) == set(TRANSITIONS)


def test_every_phase_that_is_not_final_can_be_stopped_and_can_fail() -> None:
    for phase in RunPhase:
        if not phase.final:
            assert {RunPhase.STOPPED, RunPhase.FAILED} <= set(TRANSITIONS[phase])


def test_a_transition_that_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no transition Succeeded -> Training"):
        require(RunPhase.SUCCEEDED, RunPhase.TRAINING)
