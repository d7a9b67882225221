"""Any file that a user names is read, or refused in one line with a hint, within a second.

What is read is what a run's folder and journal will say again: it survives being written as JSON.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator import document
from orchestrator.cli import intake
from orchestrator.faults.plan import FaultPlan, PlanError
from orchestrator.protocol.runfile import TrainingRun
from tests import runfiles

RUN = (
    runfiles.head()
    + """spec:
  nodes: {count: 2, ranksPerNode: 2, spares: 1}
  parallelism: {dpReplicate: 2, dpShard: 2}
  trainer:
    model: {dim: 64, layers: 1, heads: 2, kvHeads: 2, ffnDim: 64}
    steps: 100
    learningRate: 3e-4
    data: {sources: [{uri: a.txt, weight: 2.5}, {uri: b/, field: body}], validation: 0.005}
    options: {x: [1, {y: null}], when: 2024-02-30, at: 10:30}
  detection: {detectWithin: 10s}
"""
)
PLAN = """
kind: FaultPlan
seed: 7
faults:
- {when: {step: 3}, fault: kill-rank, rank: 1}
- {when: {after: 2s, probability: 0.5}, fault: freeze-rank, rank: 0, for: 500ms}
"""
SLOWEST_S = 1.0
TRIPLED = "[&a0 x, x, x]\n" + "".join(
    f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def outcome(folder: Path, run: bytes, plan: bytes | None) -> Any:
    """What the reader makes of two files; anything but an object or our refusal is raised."""
    run_file, plan_file = folder / "run.yaml", folder / "plan.yaml"
    run_file.write_bytes(run)
    plan_file.write_bytes(plan or b"")
    # Time that this process had, not what others on the machine took of it.
    began = time.process_time()
    read = _read(run_file, plan_file if plan is not None else None)
    assert time.process_time() - began < SLOWEST_S
    if isinstance(read, Exception):
        assert read.hint
        assert str(folder) in str(read)
        assert "\n" not in str(read)
        assert len(str(read)) < 1500
    if isinstance(read, tuple):
        for value, kind in zip(read, (TrainingRun, FaultPlan), strict=True):
            if value is not None:
                assert msgspec.json.decode(msgspec.json.encode(value), type=kind) == value
        assert intake.words(*read)
    return read


def _read(run_file: Path, plan_file: Path | None) -> Any:
    try:
        return intake.read(run_file, plan_file)
    except (document.BadFileError, PlanError) as error:
        return error


def test_what_the_mutations_start_from_is_read(folder: Path) -> None:
    run, plan = outcome(folder, RUN.encode(), PLAN.encode())

    assert run.spec.trainer.learning_rate == 3e-4
    assert run.spec.trainer.options == {
        "x": [1, {"y": None}],
        "when": "2024-02-30",
        "at": "10:30",
    }
    assert len(plan.faults) == 2


PIECES = st.sampled_from(
    ["&a ", "*a", "!!int ", "!!python/name:os.system ", "<<: ", "? ", "[", "]", "{", "}", "- ",
     ": ", "\n", "\n---\n", "...\n", "'", '"', "|\n", ">", "%YAML 9.9\n", "# ", "\t", ".nan",
     "-.inf", "9" * 5000, "0x" + "f" * 300, "1e999", "08", "1_", "\\ud800", "\0", "\x85", "=",
     "~", "[" * 60, "{a: " * 60, "1:60:61", "2024-13-45", "name: x\n", '"\\UFFFFFFFF"',
     '"\\U00110000"', "%YAML 1." + "9" * 5000 + "\n---\n"]
)  # fmt: skip


@st.composite
def spoilt(draw: Callable[[Any], Any], text: str) -> bytes:
    """A file that was right until pieces were put in, cut out, doubled, or bytes changed."""
    for _ in range(draw(st.integers(1, 4))):
        start, end = sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        piece = draw(PIECES | st.text(max_size=3) | st.just("") | st.just(text[start:end] * 2))
        end = draw(st.sampled_from([start, end]))
        text = text[:start] + piece + text[end:]
    data = bytearray(text.encode())
    for _ in range(draw(st.integers(0, 2))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


MANY = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


@MANY
@given(run=spoilt(RUN), plan=spoilt(PLAN))
def test_a_spoilt_file_is_read_or_refused(folder: Path, run: bytes, plan: bytes) -> None:
    outcome(folder, run, None)
    outcome(folder, RUN.encode(), plan)


@MANY
@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(folder: Path, data: bytes) -> None:
    outcome(folder, data, None)
    outcome(folder, RUN.encode(), data)


FIELDS = st.sampled_from(
    ["apiVersion", "kind", "metadata", "name", "spec", "nodes", "count", "trainer", "options",
     "model", "data", "recovery", "backoff", "seed", "faults", "when", "fault", "step", "for"]
)  # fmt: skip
WORDS = st.sampled_from(["holdfast.dev/v1alpha1", "TrainingRun", "FaultPlan", "10s", "9" * 9 + "h"])
DOCUMENTS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=1 << 62, max_value=1 << 300)
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["holdfast.dev/v1alpha1", "TrainingRun", "FaultPlan", "10s", "9" * 9 + "h"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(FIELDS | st.text(max_size=4), inner, max_size=5)
    ),
    max_leaves=20,
)
SECTIONS = st.dictionaries(FIELDS, DOCUMENTS, max_size=4)


@MANY
@given(document_=DOCUMENTS, section=SECTIONS, ascii_=st.booleans())
def test_any_json_document_is_read_or_refused(
    folder: Path, document_: Any, section: dict[str, Any], ascii_: Any
) -> None:
    def written(data: Any) -> bytes:
        return json.dumps(data, ensure_ascii=ascii_).encode("utf-8", "surrogatepass")

    run = yaml.safe_load(RUN.replace("2024-02-30", "x"))
    outcome(folder, written(document_), written(document_))
    outcome(folder, written(run | section), None)
    outcome(folder, written(run | {"spec": run["spec"] | section}), None)
    trainer = run["spec"]["trainer"] | {"options": section}
    outcome(folder, written(run | {"spec": {"trainer": trainer}}), None)
    outcome(folder, RUN.encode(), written({"kind": "FaultPlan", "faults": [section]}))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("&a {x: *a}", "aliases"),
        ("\n      a0: " + TRIPLED.replace("\n", "\n      "), "aliases"),
        ("{<<: [1]}\n    options: 3", "there twice"),
        ("{x: 1, x: 2}", "`x` is there twice"),
        ("[" * 5000, "32 sections"),
        ("{a: " * 5000, "32 sections"),
        ("{a: " + "9" * 20_000 + "}", "64 bits"),
        ("{a: 0x" + "f" * 20_000 + "}", "64 bits"),
        ("{a: 1" + ":59" * 9000 + "}\n    options: 1", "there twice"),
        ("{a: .nan}", "not a finite number"),
        ("{a: -.inf}", "not a finite number"),
        ("{a: 1e400}", "not a finite number"),
        ('{a: "\\ud800"}', "no character"),
        ('{a: "x\\0"}', "no character"),
        ('{"\\ud800\\udc00": 1}', "no character"),
        ('{a: "\\U00110000"}', "number that can not be"),
        ('{a: "\\UFFFFFFFF"}', "number that can not be"),
        ("{a: !!python/object/apply:os.system [ls]}", "tags"),
        ("{a: !!set {x}}", "tags"),
        ("{[1, 2]: 3}", "name can not be"),
        ("{}\n---\nspec: 2", "another document"),
        ("@", "not YAML"),
        ("'" + "x" * 100_000, "expected at most 32768 bytes"),
    ],
    ids=range(23),
)
def test_what_would_burst_or_surprise_is_refused_with_its_place(
    folder: Path, options: str, says: str
) -> None:
    text = RUN[: RUN.index("    options")] + f"    options: {options}\n"

    refusal = outcome(folder, text.encode(), None)

    assert isinstance(refusal, document.BadFileError)
    assert says in str(refusal)
    assert "line " in str(refusal) or "bytes" in str(refusal)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (RUN.encode("utf-16"), "not UTF-8 text, byte 0 is 0xff"),
        (RUN.replace("demo", "d\xe9mo").encode("latin-1"), "not UTF-8 text, byte"),
        (RUN.replace("demo", "d\0mo").encode(), "not text: character 0x0"),
        (b"", "found nothing"),
        (b"\xef\xbb\xbf# only a comment\n", "found nothing"),
        (b"[1, 2]", "found a list"),
        (b"%YAML 1." + b"9" * 5000 + b"\n---\na: 1\n", "number that can not be"),
        (b"%YAML " + b"9" * 5000 + b".1\n---\na: 1\n", "number that can not be"),
        (RUN.replace("name: demo", 'name: "demo\\n"').encode(), "metadata.name"),
        (RUN.replace("10s", "9" * 400 + "h").encode(), "detection.detectWithin"),
        (RUN.replace("count: 2", f"count: {1 << 40}").encode(), "multiplies to 4"),
        (RUN.replace("spares: 1", f"spares: {1 << 40}").encode(), "processes on one machine"),
    ],
    ids=range(12),
)
def test_what_is_no_run_file_is_refused_for_what_it_is(
    folder: Path, text: bytes, says: str
) -> None:
    refusal = outcome(folder, text, None)

    assert isinstance(refusal, document.BadFileError)
    assert says in str(refusal)
