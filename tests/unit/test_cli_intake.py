"""Whatever a user hands in is read, or refused with a message and a hint; nothing else happens."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.cli import intake
from orchestrator.document import BadFileError
from orchestrator.faults.catalogue import KINDS
from orchestrator.faults.plan import FaultPlan, PlanError
from orchestrator.protocol.runfile import TrainingRun
from tests import runfiles

RUN = runfiles.fields(
    parallelism={**runfiles.PARALLELISM, "tp": 1, "pp": 1, "cp": 1},
    trainer={
        "model": {"dim": 64, "layers": 1, "heads": 2, "kvHeads": 2, "ffnDim": 64},
        "steps": 100,
        "learningRate": 0.1,
        "data": ["a.txt"],
        "options": {"x": [1, {"y": None}]},
    },
    checkpoint={"uri": "file:///tmp/x", "everySteps": 5, "keepLast": 2},
    detection={"detectWithin": "10s", "warmupLimit": "5m"},
    recovery={"backoff": "1s", "spareWait": "1m", "hardwareBudget": 3},
)
PLAN: dict[str, Any] = {
    "kind": "FaultPlan",
    "seed": 7,
    "faults": [
        {"when": {"step": 12}, "fault": "kill-rank", "rank": 1},
        {"when": {"after": "5s", "probability": 0.5}, "fault": "partition-node", "node": "node-1"},
        {"when": {"step": 3}, "fault": "freeze-rank", "rank": 0, "for": "2s"},
    ],
}
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(2**62, 2**70)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["10s", "0s", "1e9h", "-1s", "node-1", "٣s", "x" * 70, *KINDS])
    | st.dates()
    | st.binary(max_size=3)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.text(max_size=4) | st.integers() | st.none(), inner, max_size=2)
    ),
    max_leaves=4,
)


def paths(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a structure."""
    if not isinstance(data, dict | list):
        return [at]
    items = data.items() if isinstance(data, dict) else enumerate(data)
    return [at, *(path for key, value in items for path in paths(value, (*at, key)))]


def changed(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    data = copy.deepcopy(data)
    inside = data
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return data


def misshapen(data: dict[str, Any]) -> st.SearchStrategy[Any]:
    """A file that is right but for one place, or has a field too many."""
    anywhere = st.builds(changed, st.just(data), st.sampled_from(paths(data)), VALUES)
    sections = [p for p in paths(data) if p and p[-1] in ("spec", "nodes", "trainer", "recovery")]
    more = st.builds(
        lambda path, name, value: changed(data, (*path, name), value),
        st.sampled_from([(), *sections]),
        st.text(max_size=8),
        VALUES,
    )
    return anywhere | more


@settings(max_examples=100)
@given(misshapen(RUN), misshapen(PLAN) | st.just(PLAN))
def test_any_structure_is_read_or_refused_with_a_message_and_a_hint(run: Any, plan: Any) -> None:
    with tempfile.TemporaryDirectory() as root:
        run_file, plan_file = Path(root, "run.yaml"), Path(root, "plan.yaml")
        run_file.write_text(yaml.dump(run), encoding="utf-8")
        plan_file.write_text(yaml.dump(plan), encoding="utf-8")
        read = outcome(run_file, plan_file)

        if isinstance(read, BadFileError | PlanError):
            assert read.hint
            assert str(run_file) in str(read) or str(plan_file) in str(read)
            assert "\n" not in str(read)
        else:
            assert intake.words(*read)


def outcome(
    run_file: Path, plan_file: Path
) -> tuple[TrainingRun, FaultPlan | None] | BadFileError | PlanError:
    try:
        return intake.read(run_file, plan_file)
    except (BadFileError, PlanError) as error:
        return error


def test_what_is_right_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.dump(RUN))
    (tmp_path / "plan.yaml").write_text(yaml.dump(PLAN))

    run, plan = intake.read(tmp_path / "run.yaml", tmp_path / "plan.yaml")

    assert run.world_size == 4
    assert plan is not None
    assert len(plan.faults) == 3


def test_sequences_that_get_longer_are_told_with_how_many_a_step_has_then(tmp_path: Path) -> None:
    ramps = {
        "batchRamp": [{"tokens": 4000, "globalBatch": 16}, {"tokens": 9000, "globalBatch": 4}],
        "lengthRamp": [{"tokens": 9000, "seqLen": 512, "microBatch": 1}],
    }
    path = tmp_path / "run.yaml"
    path.write_text(runfiles.text(trainer={"globalBatch": 8, **ramps}))

    told = intake.words(*intake.read(path, None))

    assert "; 16 from 4096 tokens on; 4 samples of 512 tokens from 10240 tokens on" in told


def test_a_batch_that_grows_is_told_with_what_it_grows_from(tmp_path: Path) -> None:
    ramp = [{"tokens": 4000, "globalBatch": 16}]
    path = tmp_path / "run.yaml"
    path.write_text(runfiles.text(trainer={"globalBatch": 8, "batchRamp": ramp}))

    told = intake.words(*intake.read(path, None))

    assert "8 samples of 128 tokens per step; 16 from 4096 tokens on" in told
