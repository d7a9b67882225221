from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import compose, document
from orchestrator.cli import intake
from orchestrator.faults.plan import FaultPlan, PlanError, check
from orchestrator.protocol.ids import NodeId
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.worker import MisconfiguredError
from tests import runfiles
from trainer.job import read_job

HEAD = runfiles.head()
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
    assert set(run.job()) == {"trainer", "parallelism", "checkpoint", "detection"}


def test_a_rank_is_told_how_many_shards_a_replica_has_even_if_the_file_leaves_it_out(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(HEAD + "spec: {nodes: {count: 8}, parallelism: {dpReplicate: 2}}\n")

    run = compose.read_run(path)

    assert run.spec.parallelism.dp_shard is None
    assert run.job()["parallelism"]["dpShard"] == 4


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
        ("spec: {recovery: {backoff: 2m}}", "backoff is 2m, expected at most backoffMax = 1m"),
        ("spec: {checkpoint: {uri: 'gs://bucket/run'}}", "gs://bucket/run, supported are a folder"),
        ("spec: {checkpoint: {uri: 'file://host/run'}}", "file://host/run, supported are"),
        ("spec: {checkpoint: {uri: 'file://[/run'}}", "spec.checkpoint.uri is 'file://[/run'"),
        (r'spec: {checkpoint: {uri: "s3://\e2J"}}', "s3://\N{REPLACEMENT CHARACTER}2J"),
        ("spec: {checkpoint: {uri: ''}}", "spec.checkpoint.uri names nothing"),
        (
            "spec: {recovery: {deviceLedger: 'gs://fleet'}}",
            "spec.recovery.deviceLedger: address is gs://fleet, supported are a folder",
        ),
        ("spec: {recovery: {deviceLedger: ' '}}", "spec.recovery.deviceLedger names nothing"),
        (
            "spec: {nodes: {serials: {node-0: 'rack 7'}}}",
            "spec.nodes.serials.node-0 is 'rack 7', expected 1 to 128 characters",
        ),
        (
            "spec: {nodes: {serials: {node-0: r7, node-1: r7}}}",
            "spec.nodes.serials.node-1 is 'r7', and node-0 has the same",
        ),
        ("spec: [", "not YAML"),
        ("", "missing required field `spec`"),
    ],
)
def test_a_run_that_can_not_be_is_refused_with_what_was_expected(
    spec: str, says: str, tmp_path: Path
) -> None:
    assert says in str(refused(HEAD + spec, tmp_path))


EMBEDDED_ONLY = [
    ("trainer: {model: 9B}", "spec.trainer.model is '9B', expected one of debug, 8B, 70B, 405B"),
    ("trainer: {model: ''}", "spec.trainer.model is '', expected one of"),
    ("trainer: {model: {}}", "spec.trainer.model lacks dim, layers, heads, kvHeads, ffnDim"),
    (
        "trainer: {model: {dim: 8, layers: 1, heads: 1, kvHeads: 1, ffnDim: 8, deep: 1}}",
        "spec.trainer.model has unknown field 'deep'",
    ),
    (
        "trainer: {model: {dim: 30, layers: 1, heads: 4, kvHeads: 2, ffnDim: 8}}",
        "spec.trainer.model: dim is 30, expected a multiple of 2 x heads = 8",
    ),
    (
        "trainer: {model: {dim: wide, layers: 1, heads: 4, kvHeads: 2, ffnDim: 8}}",
        "spec.trainer.model: Expected `int`",
    ),
    ("nodes: {count: 3}", "globalBatch is 8, expected a multiple of the 3 ranks"),
    ("trainer: {microBatch: 3}", "microBatch is 3, expected a divisor of each rank's 8 samples"),
    ("trainer: {globalBatch: 4, microBatch: 8}", "expected a divisor of each rank's 4 samples"),
    (
        "nodes: {count: 3}, trainer: {reduction: deterministic}",
        "globalBatch is 8, expected a multiple of dpShard x microBatch = 3 x 1",
    ),
    ("nodes: {count: 4}, parallelism: {tp: 4}", "kvHeads is 2, expected a multiple of tp = 4"),
    ("nodes: {count: 2}, parallelism: {pp: 2}", "microBatch is 8, which makes 1 of a share of 8"),
    ("nodes: {count: 4}, parallelism: {cp: 4}", "kvHeads is 2, expected a multiple of tp x cp = 4"),
]


@pytest.mark.parametrize(("spec", "says"), EMBEDDED_ONLY)
def test_what_the_embedded_trainer_would_refuse_is_refused_with_the_file(
    spec: str, says: str, tmp_path: Path
) -> None:
    assert says in str(refused(HEAD + f"spec: {{{spec}}}", tmp_path))

    run = compose.parse(HEAD + f"spec: {{{spec}}}", TrainingRun, "run.yaml")
    with pytest.raises(MisconfiguredError):
        read_job(run.job(), run.world_size)


@pytest.mark.parametrize(
    "data",
    ["''", "[]", "['']", "[a.txt, '']", "{sources: []}", "{sources: [{uri: a.txt}, {uri: ' '}]}"],
)
def test_data_that_names_nothing_is_refused_with_the_file(data: str, tmp_path: Path) -> None:
    says = str(refused(HEAD + f"spec: {{trainer: {{data: {data}}}}}", tmp_path))

    assert "spec.trainer.data names nothing" in says


@pytest.mark.parametrize(
    ("trainer", "says"),
    [
        ("data: {}", "missing required field `sources`"),
        ("data: {sources: [{}]}", "missing required field `uri`"),
        ("data: {sources: [{uri: a, weight: 0}]}", "`float` >= 1e-06"),
        ("data: {sources: [{uri: a, weightt: 1}]}", "unknown field `weightt`"),
        ("data: {sources: [{uri: a, format: csv}]}", "enum value 'csv'"),
        ("data: {sources: [{uri: a}], validation: 1}", "`float` < 1.0"),
        ("data: {sources: [{uri: a}], onBadRecord: ignore}", "enum value 'ignore'"),
        ("data: {sources: [{uri: a}], waitMax: long}", "data.waitMax: duration is 'long'"),
        ("data: {sources: [{uri: a}], prefetch: 65}", "`int` <= 64"),
        ("data: {sources: [{uri: a}]}, evalEverySteps: 5", "no document is held back"),
        ("data: a.txt, evalEverySteps: 5", "no document is held back"),
    ],
)
def test_data_that_can_not_be_trained_on_as_written_is_refused_with_the_place_and_a_hint(
    trainer: str, says: str, tmp_path: Path
) -> None:
    refusal = refused(HEAD + f"spec: {{trainer: {{{trainer}}}}}", tmp_path)

    assert says in str(refusal)
    assert refusal.hint


def test_a_source_with_a_misspelt_field_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    spec = "spec: {trainer: {data: {sources: [{uri: a, weightt: 1}]}}}"

    assert refused(HEAD + spec, tmp_path).hint == "did you mean `weight`?"


@pytest.mark.parametrize(("spec", "says"), EMBEDDED_ONLY)
def test_what_means_something_to_the_embedded_trainer_only_is_left_to_others(
    spec: str, says: str, tmp_path: Path
) -> None:
    del says
    path = tmp_path / "run.yaml"
    entrypoint = "entrypoint: 'mine:main'"
    spec = spec if "trainer: {" in spec else f"{spec}, trainer: {{}}"
    path.write_text(HEAD + f"spec: {{{spec.replace('trainer: {', f'trainer: {{{entrypoint}, ')}}}")

    assert compose.read_run(path).spec.trainer.entrypoint == "mine:main"


def test_a_warm_up_limit_that_is_not_taken_as_it_stands_is_told(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for limit, told in (("19s", True), ("20s", False)):
        path.write_text(HEAD + f"spec: {{detection: {{warmupLimit: {limit}}}}}")
        words = intake.words(compose.read_run(path), None)
        assert (f"detection.warmupLimit is {limit}, taken as 20 s" in words) is told


def test_a_journal_of_a_run_that_would_be_refused_today_can_still_be_read() -> None:
    text = HEAD + "spec: {trainer: {model: 9B}, checkpoint: {uri: 's3://bucket'}}"
    run = compose.parse(text, TrainingRun, "run.yaml")

    assert compose.controller(run).state.run == run


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


EXAMPLES = Path(__file__).parents[2] / "deploy/examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*-faults.yaml")), ids=lambda path: path.name)
def test_the_faults_of_an_example_fit_its_run(path: Path) -> None:
    run = compose.read_run(path.with_name(path.name.replace("-faults", "")))
    names = tuple(
        NodeId(f"node-{index}") for index in range(run.spec.nodes.count + run.spec.nodes.spares)
    )

    check(
        compose.read_plan(path),
        world_size=run.world_size,
        nodes=names,
        steps=run.spec.trainer.steps,
    )
