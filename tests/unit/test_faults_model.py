"""Fault models and records: what is packaged, and what is refused, in which words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from orchestrator import compose, document
from orchestrator.faults.cluster import Cluster
from orchestrator.faults.expected import expected
from orchestrator.faults.model import FaultModel
from orchestrator.faults.quantities import rate, ratios, span_s, spread
from orchestrator.faults.record import FaultRecord

CLASS: dict[str, Any] = {
    "name": "gpu-fault",
    "entity": "gpu",
    "rate": "7e-6 per gpu-hour",
    "blast": "node",
    "effect": "crash",
    "cause": "hardware",
    "fatal": 1,
    "source": "a paper",
}
MODEL: dict[str, Any] = {"kind": "FaultModel", "name": "mine", "classes": [CLASS]}
ROW: dict[str, Any] = {"component": "GPU", "category": "GPU", "count": 3, "class": "gpu-fault"}
RECORD: dict[str, Any] = {
    "kind": "FaultRecord",
    "name": "mine",
    "model": "mine",
    "days": 3,
    "gpus": 64,
    "source": "a log",
    "rows": [ROW],
}


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    def refuse(data: dict[str, Any]) -> str:
        path = tmp_path / "file.yaml"
        path.write_text(json.dumps(data), encoding="utf-8")
        model = msgspec.convert(MODEL, FaultModel)
        read = {
            "FaultModel": compose.read_model,
            "FaultRecord": lambda path: compose.read_record(path, model),
        }[data["kind"]]
        with pytest.raises(document.BadFileError) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert caught.value.hint
        return f"{caught.value}\n{caught.value.hint}"

    return refuse


def test_the_packaged_record_has_the_419_unexpected_and_47_planned_interruptions() -> None:
    model = compose.packaged_model()
    record = compose.packaged_record(model)

    by_category: dict[str, int] = {}
    for row in record.rows:
        by_category[row.category] = by_category.get(row.category, 0) + row.count

    assert len(record.rows) == 19
    assert by_category == {
        "GPU": 268,
        "Dependency": 56,
        "Network": 35,
        "Unplanned Maintenance": 32,
        "Host": 21,
        "Unknown": 7,
        "Planned maintenance": 47,
    }
    for name in record.counts:
        fault = model.class_named(name)
        assert fault.planned or fault.interrupting


def test_every_number_of_the_packaged_model_has_a_source_or_is_an_assumption() -> None:
    model = compose.packaged_model()

    for section in (*model.classes, *model.repairs, model.lemons, model.coincidence, model.weibull,
                    model.bursts, model.diurnal, model.diagnosis):  # fmt: skip
        assert section is not None
        assert section.source or section.assumption


def test_the_packaged_model_comes_to_what_was_recorded() -> None:
    model = compose.packaged_model()
    record = compose.packaged_record(model)
    cluster = Cluster(gpus=record.gpus)

    for name, count in record.counts.items():
        fault = model.class_named(name)
        mean = fault.hazard.per_s(6.5) * cluster.count(fault.entity) * record.days * 86_400
        share = 1 if fault.planned else fault.interrupting
        assert mean * share == pytest.approx(count, abs=0.01 * count + 0.5), name

    means = expected(model, cluster)
    assert means.unexpected_per_day * 54 == pytest.approx(419, abs=1)
    assert means.planned_per_day * 54 == pytest.approx(47, abs=0.05)
    assert 24 / means.unexpected_per_day == pytest.approx(3.09, abs=0.01)


def test_rates_of_hardware_grow_with_the_cluster_and_those_of_software_do_not() -> None:
    model = compose.packaged_model()
    small, large = (expected(model, Cluster(gpus=n)) for n in (16_384, 98_304))

    software = (54 + 2 + 7) / 54
    assert large.unexpected_per_day - software == pytest.approx(
        6 * (small.unexpected_per_day - software), rel=0.001
    )
    assert large.planned_per_day == small.planned_per_day


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"effectt": "crash"}, "did you mean `effect`?"),
        ({"rate": "-7e-6 per gpu-hour"}, "rate is '-7e-6 per gpu-hour', expected 0 or more"),
        ({"rate": 7e-6}, "rate is '7e-06', expected a number and its unit"),
        ({"rate": "7e-6"}, "expected a number and its unit: 6.97e-6 per gpu-hour"),
        ({"rate": "7e-6 per hour"}, "expected a number and its unit"),
        ({"rate": "7e-6 per gpu-parsec"}, "rate is per 'parsec', expected one of hour, day"),
        ({"rate": "7e-6 per gnu-hour"}, "rate is per 'gnu', expected one of gpu, nic"),
        ({"rate": "7e-6 per node-hour"}, "rate is per node, expected per gpu"),
        ({"rate": "1e999 per gpu-hour"}, "expected 0 or more"),
        ({"rate": "x" * 5000}, "...'"),
        ({"fatal": 1.5}, "`float` <= 1.0, found 1.5 at `classes[0].fatal`"),
        ({"rollback": -0.1}, "`float` >= 0.0, found -0.1 at `classes[0].rollback`"),
        ({"slow": 1.2}, "ratio is 1.2, expected 0 or more and less than 1"),
        ({"slow": "0.3 to 0.1"}, "expected the smaller one first"),
        ({"slow": "much"}, "expected such as 0.1"),
        ({"lasts": "10 parsecs"}, "expected a number and a unit: 10s, 40m, 3h, 14d"),
        ({"lasts": "5m to 1m"}, "expected the smaller one first"),
        ({"lasts": "median 3h sigma 99"}, "sigma is 99, expected 0 to 4"),
        ({"source": None}, "found neither of `source` and `assumption`, expected exactly one"),
        ({"assumption": "a guess"}, "found both of `source` and `assumption`"),
        ({"effect": "melt"}, "invalid enum value 'melt', expected crash | "),
        ({"out": "standrad"}, "there is no repair 'standrad'"),
        ({"detect": {"good": "soon"}}, "`classes[0].detect`"),
        ({"notice": {"span": "soon"}}, "`classes[0].notice`"),
    ],
)
def test_a_class_that_can_not_be_is_refused_with_what_was_expected(
    change: dict[str, Any], says: str, refused: Callable[[dict[str, Any]], str]
) -> None:
    assert says in refused(MODEL | {"classes": [CLASS | change]})


REPAIR = {"name": "r", "assumption": "x", "parts": [{"share": 1, "span": "4h"}]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"classes": []}, "length >= 1"),
        ({"classes": [CLASS, CLASS]}, "class 'gpu-fault' is there twice"),
        ({"repairs": [REPAIR, REPAIR]}, "repair 'r' is there twice"),
        ({"repairs": [REPAIR | {"parts": [{"share": 0.4, "span": "4h"}]}]}, "sum to 0.4"),
        ({"lemons": {"share": 2, "assumption": "x"}}, "lemons.share"),
        ({"lemons": {"share": 0.1}}, "found neither of"),
        ({"bursts": {"calm": 0.8, "bad": 3, "lasts": "0s", "assumption": "x"}}, "more than 0 s"),
        ({"bursts": {"calm": 1.0, "bad": 3, "lasts": "1d", "assumption": "x"}}, "bursts.calm"),
        ({"classez": [CLASS]}, "did you mean `classes`?"),
        (
            {"classes": [CLASS | {"out": "standrad"}], "repairs": [REPAIR | {"name": "standard"}]},
            "did you mean 'standard'?",
        ),
    ],
)
def test_a_model_that_does_not_fit_together_is_refused(
    change: dict[str, Any], says: str, refused: Callable[[dict[str, Any]], str]
) -> None:
    assert says in refused(MODEL | change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rows": [ROW | {"class": "gpu-falt"}]}, "did you mean 'gpu-fault'?"),
        ({"rows": [ROW | {"count": -1}]}, "`int` >= 0"),
        ({"rows": [ROW | {"class": {"gpu-fault": 2}}]}, "classes of 'GPU' sum to 2, count is 3"),
        ({"rows": []}, "length >= 1"),
        ({"days": 0}, "`float` > 0.0"),
        ({"source": None}, "found neither of `source` and `assumption`"),
        ({"model": "other"}, "is of model 'other', expected 'mine'"),
    ],
)
def test_a_record_that_can_not_be_is_refused(
    change: dict[str, Any], says: str, refused: Callable[[dict[str, Any]], str]
) -> None:
    assert says in refused(RECORD | change)


def test_a_record_may_split_a_row_over_classes() -> None:
    row = ROW | {"class": {"gpu-fault": 2, "nic": 1}}

    record = msgspec.convert(RECORD | {"rows": [row, ROW]}, FaultRecord)

    assert record.counts == {"gpu-fault": 5, "nic": 1}


def test_quantities_are_read_with_their_units() -> None:
    assert rate("0.1 per link-day").per_s(step_s=1) == pytest.approx(0.1 / 86_400)
    assert rate("2.35e-3 per job-step").per_s(step_s=6.5) == pytest.approx(2.35e-3 / 6.5)
    assert rate("1 per power-domain-week").entity == "power-domain"
    assert span_s("1.5d") == 129_600
    assert spread("10m to 40m").mean_s == 1500
    assert spread("mean 48m").mean_s == 2880
    assert spread("45s").mean_s == 45
    assert spread("median 3h sigma 1").mean_s == pytest.approx(3 * 3600 * 1.6487, rel=1e-4)
    assert ratios("0.05 to 0.2") == (0.05, 0.2)
    assert ratios(0.1) == (0.1, 0.1)
