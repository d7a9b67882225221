"""Any file handed in as a fault model or record is read and drawn from, or refused in one line."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import compose, document
from orchestrator.faults.cluster import Cluster
from orchestrator.faults.draw import draw, replay
from orchestrator.faults.expected import expected
from orchestrator.faults.model import FaultModel
from orchestrator.faults.record import FaultRecord
from orchestrator.faults.sections import ModelError

MODEL_TEXT = """
kind: FaultModel
name: mine
classes:
- {name: gpu-fault, entity: gpu, rate: 7e-6 per gpu-hour, blast: node, effect: crash, fatal: 1,
   cause: hardware, out: standard, notice: {share: 0.5, span: 60s to 10m}, source: a paper}
- {name: flap, entity: link, rate: 0.1 per link-day, blast: none, effect: network, fatal: 0.5,
   cause: network, slow: 0.05 to 0.2, lasts: mean 3s, atStart: 1e-4, assumption: a guess}
repairs:
- name: standard
  parts: [{share: 0.4, span: 10m to 40m}, {share: 0.6, span: median 3h sigma 1}]
  assumption: a guess
lemons: {share: 0.01, hazard: 20, assumption: a guess}
bursts: {calm: 0.8, bad: 3, lasts: 1d to 3d, assumption: a guess}
"""
RECORD_TEXT = """
kind: FaultRecord
name: mine
model: mine
days: 3
gpus: 64
source: a log
rows:
- {component: GPU, category: GPU, count: 3, class: gpu-fault}
- {component: Net, category: Network, count: 2, class: {flap: 1, gpu-fault: 1}}
"""
CLUSTER = Cluster(gpus=80)
BOTH = compose.parse(MODEL_TEXT, FaultModel, "file").checked()


def read_model(text: str) -> None:
    try:
        model = compose.parse(text, FaultModel, "file").checked()
        chance = np.random.Generator(np.random.Philox(1))
        for clock in ("poisson", "bursty") if model.bursts else ("poisson",):
            drawn = draw(model, CLUSTER, days=2, rng=chance, clock=clock)  # type: ignore[arg-type]
            assert (np.diff(drawn.faults.at_s) >= 0).all()
        assert expected(model, CLUSTER).interruptions_per_day >= 0
    except (document.BadFileError, ModelError) as error:
        told(error)


def read_record(text: str) -> None:
    try:
        record = compose.parse(text, FaultRecord, "file").checked(BOTH)
        chance = np.random.Generator(np.random.Philox(1))
        drawn = replay(record, BOTH, CLUSTER, days=2, rng=chance)
        assert len(drawn) == sum(record.counts.values())
    except (document.BadFileError, ModelError) as error:
        told(error)


def told(error: document.BadFileError | ModelError) -> None:
    assert str(error)
    assert error.hint
    assert "\n" not in str(error)
    assert len(str(error)) < 1500


def test_what_the_mutations_start_from_is_read() -> None:
    assert len(BOTH.classes) == 2
    record = compose.parse(RECORD_TEXT, FaultRecord, "file").checked(BOTH)
    assert record.counts == {"gpu-fault": 4, "flap": 1}


PIECES = st.sampled_from(
    ["&a ", "*a", "[", "]", "{", "}", "- ", ": ", "\n", "'", '"', ".nan", "-1", "1e999", "1e-999",
     "9" * 400, " per ", "-hour", "-step", " to ", "median ", "mean ", " sigma 9", "0s",
     "999999999d", "\0", "rack", "power-domain", "pod", "job", "0.999999", "1e308"]
)  # fmt: skip


@st.composite
def spoilt(draw_: Callable[[Any], Any], text: str) -> str:
    """A file that was right until pieces were put in, cut out, or doubled."""
    for _ in range(draw_(st.integers(1, 4))):
        start, end = sorted(draw_(st.tuples(*[st.integers(0, len(text))] * 2)))
        piece = draw_(PIECES | st.text(max_size=3) | st.just("") | st.just(text[start:end] * 2))
        end = draw_(st.sampled_from([start, min(start + 6, len(text)), end]))
        text = text[:start] + piece + text[end:]
    return text[: document.FILE_MAX_BYTES]


@settings(max_examples=150)
@given(model=spoilt(MODEL_TEXT), record=spoilt(RECORD_TEXT))
def test_a_spoilt_file_is_read_or_refused(model: str, record: str) -> None:
    read_model(model)
    read_record(record)


@given(st.text(max_size=300))
def test_any_text_is_refused(text: str) -> None:
    read_model(text)
    read_record(text)


QUANTITIES = st.sampled_from(
    ["7e-6 per gpu-hour", "1 per job-step", "-1 per gpu-hour", "1e300 per gpu-hour", "3",
     "10m to 40m", "median 3h sigma 4", "mean 10m", "0s", "0s to 0s", "999999999d", "gpu", "node",
     "job", "crash", "standard", "mine", "FaultModel"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(0, 2) | st.text(max_size=6) | QUANTITIES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def changed(data: dict[str, Any], path: tuple[int | str, ...], value: Any) -> str:
    copied = json.loads(json.dumps(data))
    inner = copied
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return json.dumps(copied)


def paths(data: Any, above: tuple[int | str, ...] = ()) -> list[tuple[int | str, ...]]:
    """Where something could be put instead: every value at every depth."""
    children = data.items() if isinstance(data, dict) else enumerate(data)
    found = []
    for key, value in children:
        found.append((*above, key))
        if isinstance(value, dict | list):
            found += paths(value, (*above, key))
    return found


WHOLE: Any = document.parse(MODEL_TEXT, "file")
ROWS: Any = document.parse(RECORD_TEXT, "file")


@settings(max_examples=200)
@given(at=st.sampled_from(paths(WHOLE)), of=st.sampled_from(paths(ROWS)), value=VALUES | QUANTITIES)
def test_any_value_in_any_place_is_read_or_refused(
    at: tuple[int | str, ...], of: tuple[int | str, ...], value: Any
) -> None:
    read_model(changed(WHOLE, at, value))
    read_record(changed(ROWS, of, value))


@given(section=st.dictionaries(st.text(max_size=8), VALUES, max_size=3))
def test_any_field_more_is_refused(section: dict[str, Any]) -> None:
    read_model(json.dumps(WHOLE | section))
    read_record(json.dumps(ROWS | section))
