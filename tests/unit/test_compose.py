from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import compose, document
from orchestrator.faults.plan import FaultPlan, PlanError, check
from orchestrator.protocol.ids import NodeId
from orchestrator.protocol.runfile import TrainingRun

HEAD = "apiVersion: holdfast.dev/v1alpha1\nkind: TrainingRun\nmetadata: {name: demo}\n"
NODES = (NodeId("node-0"), NodeId("node-1"))


def refused(text: str, tmp_path: Path) -> document.BadFileError:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(document.BadFileError) as caught:
        compose.read_run(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint
    return caught.value


def test_a_run_file_with_only_a_name_gets_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(HEAD + "spec: {}\n")

    run = compose.read_run(path)

    assert run.world_size == 1
    assert run.spec.detection.detect_within == "10s"
    assert set(run.job()) == {"trainer", "parallelism", "checkpoint"}


@pytest.mark.parametrize(
    ("spec", "near"),
    [
        ("spec: {nods: {count: 2}}", "nodes"),
        ("spec: {nodes: {cuont: 2}}", "count"),
        ("spec: {checkpoint: {every_steps: 3}}", "everySteps"),
        ("spec: {trainer: {globalBtach: 3}}", "globalBatch"),
    ],
)
def test_a_misspelt_field_is_refused_with_the_nearest_name(
    spec: str, near: str, tmp_path: Path
) -> None:
    assert refused(HEAD + spec, tmp_path).hint == f"did you mean `{near}`?"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("spec: {nodes: {count: two}}", "expected `int`, got `str`"),
        ("spec: {nodes: {count: 0}}", "`int` >= 1"),
        ("spec: {detection: {detectWithin: 10}}", "expected `str`, got `int`"),
        ("spec: {detection: {detectWithin: 10 parsecs}}", "a number and a unit"),
        ("spec: {detection: {detectWithin: 2h}}", "expected 0.5 s to 3600 s"),
        ("spec: {nodes: {count: 2}, parallelism: {dpReplicate: 3}}", "multiplies to 3, expected 2"),
        ("spec: [", "not YAML"),
        ("", "missing required field `spec`"),
    ],
)
def test_a_run_that_can_not_be_is_refused_with_what_was_expected(
    spec: str, says: str, tmp_path: Path
) -> None:
    assert says in str(refused(HEAD + spec, tmp_path))


def test_a_file_that_is_not_there_not_text_or_huge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(document.BadFileError, match="No such file"):
        compose.read_run(tmp_path / "none.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(document.BadFileError, match="not UTF-8"):
        compose.read_run(tmp_path / "binary")
    (tmp_path / "huge").write_bytes(b"#" * (document.FILE_MAX_BYTES + 1))
    with pytest.raises(document.BadFileError, match="expected at most"):
        compose.read_run(tmp_path / "huge")


YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["spec", "nodes", "count", "kind", "faults", "when", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.text(max_size=200) | YAML_VALUES.map(repr))
def test_any_text_is_read_or_refused_and_nothing_else(text: str) -> None:
    kinds: tuple[type, ...] = (TrainingRun, FaultPlan)
    for kind in kinds:
        try:
            read = compose.parse(text, kind, "file")
        except document.BadFileError as error:
            read = error
        assert read.hint if isinstance(read, document.BadFileError) else isinstance(read, kind)


def plan(text: str) -> FaultPlan:
    return compose.parse(f"kind: FaultPlan\nfaults: [{text}]", FaultPlan, "plan.yaml")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("{when: {step: 3}, fault: kill-rank, rank: 4}", "rank is 4, expected 0 to 3"),
        ("{when: {step: 3}, fault: kill-rank}", "no rank is named"),
        ("{when: {step: 3}, fault: lose-node, node: node-7}", "expected one of node-0, node-1"),
        ("{when: {step: 3}, fault: lose-node}", "no node is named"),
        ("{when: {step: 101}, fault: kill-controller}", "the run ends at 100"),
        ("{when: {}, fault: kill-controller}", "exactly one of step, after"),
        ("{when: {step: 1, after: 2s}, fault: kill-controller}", "exactly one of step, after"),
        ("{when: {after: soon}, fault: kill-controller}", "a number and a unit"),
        ("{when: {step: 1}, fault: kill-rank, rank: 0, for: 2s}", "`for` does not apply"),
        ("{when: {step: 1}, fault: kill-rank, rank: 0, share: 0.5}", "`share` does not apply"),
        ("{when: {step: 1}, fault: slow-rank, rank: 0, delay: 1s}", "`delay` does not apply"),
        ("{when: {step: 1}, fault: slow-disk, rank: 0, holdGil: false}", "`holdGil` does not"),
        ("{when: {step: 1}, fault: freeze-rank, rank: 0, holdGil: true}", "`holdGil` does not"),
        ("{when: {step: 1}, fault: kill-controller, rank: 0}", "it is not aimed at a rank"),
        ("{when: {step: 1}, fault: kill-controller, node: node-0}", "it is not aimed at a rank"),
        ("{when: {step: 1}, fault: kill-rank, rank: 0, node: node-0}", "both rank 0 and node-0"),
        ("{when: {step: 1}, fault: slow-disk, rank: 0, node: node-1}", "both rank 0 and node-1"),
    ],
)
def test_a_plan_that_names_what_the_run_does_not_have_is_refused(fault: str, says: str) -> None:
    with pytest.raises(PlanError) as caught:
        check(plan(fault), world_size=4, nodes=NODES, steps=100)

    assert says in str(caught.value)
    assert caught.value.hint


def test_a_fault_that_is_not_shaped_has_the_defaults_that_are_explained() -> None:
    slow, full, shaped = plan(
        "{when: {step: 1}, fault: slow-rank, rank: 0}, "
        "{when: {step: 1}, fault: slow-disk, node: node-0}, "
        "{when: {step: 1}, fault: slow-disk, node: node-0, delay: 50ms, for: 2s}"
    ).faults

    check(FaultPlan(kind="FaultPlan", faults=(shaped,)), world_size=4, nodes=NODES, steps=100)
    assert (slow.runs_share, full.delay_s, shaped.delay_s, shaped.lasts_s) == (0.5, 0.2, 0.05, 2.0)


def test_an_unknown_kind_of_fault_is_refused() -> None:
    with pytest.raises(document.BadFileError, match="'melt-rank'"):
        plan("{when: {step: 3}, fault: melt-rank, rank: 1}")


def test_a_plan_draws_the_same_faults_from_the_same_seed_and_others_from_another() -> None:
    fault = "{when: {step: 3, probability: 0.5}, fault: kill-rank, rank: 1}"

    def drawn(seed: int) -> list[int]:
        text = f"kind: FaultPlan\nseed: {seed}\nfaults: [{', '.join([fault] * 40)}]"
        return [a.index for a in compose.parse(text, FaultPlan, "plan.yaml").drawn()]

    assert drawn(1) == drawn(1) != drawn(2)
    assert 5 < len(drawn(1)) < 35
