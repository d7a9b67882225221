"""`holdfast simulate`: what it prints, what it writes, and what it refuses."""

import json
from pathlib import Path

import pytest
import yaml

from orchestrator.core import journal
from orchestrator.simulation.summary import estimate, student_t
from tests.journals import holdfast

SMALL = ("simulate", "--gpus", "16", "--days", "0.005", "--spares", "1")
RATES = ("--rates", "2000")


def test_the_answer_has_ettr_with_its_interval_and_everything_it_rests_on() -> None:
    result = holdfast(*SMALL, *RATES, "--seeds", "2", "--jobs", "2", "-o", "json")

    told = json.loads(result.stdout)
    assert result.exit_code == 0
    assert told["ettr"]["low"] <= told["ettr"]["mean"] <= told["ettr"]["high"]
    assert len(told["ettr"]["per_seed"]) == 2
    assert sum(told["ledger"].values()) == pytest.approx(432)
    assert set(told["interruptions"]) >= {"unexpected", "planned", "by_class"}
    assert set(told["controller"]) >= {"cpu_s", "max_rss_mb"}
    assert told["wall_s"] > 0
    profile = told["profile"]
    known = [*profile["constants"].values(), *profile["cluster"].values()]
    assert {each["origin"] for each in known} <= {"measured", "published", "assumed"}
    assert all(each["source"] for each in known)
    assert profile["cluster"]["gpuProbeEvery"]["value_s"] == 10.0
    assert profile["habits"]["silent"] == profile["silent"]
    assert "2 of 2 runs" in result.stderr


def test_the_same_is_told_in_tables_and_as_yaml() -> None:
    text = holdfast(*SMALL, *RATES)
    plain = holdfast(*SMALL, *RATES, "-o", "yaml")

    told = yaml.safe_load(plain.stdout)
    assert f"{told['ettr']['mean'] * 100:.2f} %" in text.stdout
    assert "one seed, no interval" in text.stdout
    assert "BUCKET" in text.stdout
    assert "ORIGIN" in text.stdout


def test_a_record_happens_again_scaled_to_the_cluster() -> None:
    result = holdfast(
        "simulate", "--gpus", "64", "--days", "0.02", "--record", "llama3", "-o", "json"
    )

    assert json.loads(result.stdout)["experiment"]["record"] == "llama3"


def test_the_journal_of_a_seed_is_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "journal"

    result = holdfast(*SMALL, *RATES, "--first", "3", "--journal", str(file), "-o", "json")

    read = journal.read(file.read_bytes())
    assert len(read.entries) == json.loads(result.stdout)["controller"]["events"]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--gpus", "12"), "gpus is 12, expected a multiple of 8"),
        (("--gpus", "1000000"), "--gpus is 1000000: expected `int` <= 131072"),
        (("--days", "0"), "--days is 0.0: expected `float` > 0"),
        (("--rates", "-1"), "--rates is -1.0: expected `float` >= 0"),
        (("--clock", "sundial"), "'sundial', expected poisson | weibull | bursty"),
        (("--watch", "all"), "'all', expected none | digests | both"),
        (("--class-rate", "gpu-fault"), "expected CLASS=FACTOR, 0 or more, found no `=`"),
        (("--class-rate", "gpu-fault=many"), "found a factor 'many'"),
        (("--class-rate", "gpu-fault=-2"), "0 or more, found a factor '-2'"),
        (("--class-rate", "gpu-falt=2"), "there is no class 'gpu-falt'"),
        (("--save-every", "30"), "saveEvery: span is '30', expected a number and a unit"),
        (("--save-every", "0s"), "saveEvery is 0s, expected at least 1ms"),
        (("--replicas", "7"), "replicas is 7, expected a divisor of 16 GPUs"),
        (("--without", "restart"), "no policy 'restart', expected some of planned-swap"),
        (("--profile", "fast"), "there is no profile 'fast'"),
        (("--record", "llama4"), "no record 'llama4' comes with holdfast"),
        (("--model", "llama3-record"), "no model 'llama3-record' comes with holdfast"),
        (("--record", "llama3", "--rates", "2"), "has counts, not rates"),
        (("--record", "llama3", "--no-scale-record"), "faults of nodes, expected at most 2"),
        (("--journal", "j", "--seeds", "2"), "--journal is of one seed"),
    ],
)
def test_what_can_not_be_is_refused_in_the_words_of_the_command(
    options: tuple[str, ...], words: str
) -> None:
    result = holdfast(*SMALL, *options)

    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert "hint: " in result.stderr


def test_a_model_with_a_field_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("kind: FaultModel\nname: mine\nclassez: []\n")

    result = holdfast(*SMALL, "--model", str(tmp_path / "mine.yaml"))

    assert result.exit_code == 2
    assert "unknown field `classez`" in result.stderr
    assert "did you mean `classes`?" in result.stderr


def test_more_faults_than_nodes_are_refused_and_not_dropped() -> None:
    result = holdfast("simulate", "--gpus", "64", "--record", "llama3", "--no-scale-record")

    assert result.exit_code == 2
    assert "faults of nodes, expected at most 8, as many as the cluster has nodes" in result.stderr
    assert "hint: have the record scaled" in result.stderr


def test_who_has_a_record_scaled_already_is_not_told_to() -> None:
    result = holdfast("simulate", "--gpus", "64", "--record", "llama3", "--days", "365")

    assert result.exit_code == 2
    assert "10 faults of nodes, expected at most 8" in result.stderr
    assert "hint: choose fewer days or more GPUs" in result.stderr


def test_options_of_an_experiment_in_front_of_another_command_are_refused() -> None:
    result = holdfast("simulate", "--gpus", "64", "swarm", "--seeds", "1")

    assert result.exit_code == 2
    assert "--gpus is of `holdfast simulate` itself" in result.stderr


def test_an_interval_is_that_of_students_t() -> None:
    found = estimate([0.98, 0.99, 0.97, 0.98])

    # The half width by hand: t of 3 degrees of freedom, 3.182, times 0.008165 / 2.
    assert found.high is not None
    assert found.high - found.mean == pytest.approx(3.182 * 0.0081650 / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.706), (30, 2.042), (40, 2.0211), (120, 1.9799)]
)
def test_the_quantiles_of_students_t_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_t(freedom) == pytest.approx(quantile, abs=2e-4)


@pytest.mark.parametrize("values", [[1.0, 0.999], [0.0, 0.001]])
def test_an_interval_of_a_share_holds_nothing_that_is_none(values: list[float]) -> None:
    found = estimate(values)

    assert found.low is not None
    assert found.high is not None
    assert 0.0 <= found.low <= found.mean <= found.high <= 1.0


def test_one_seed_has_no_interval() -> None:
    found = json.loads(holdfast("simulate", "--gpus", "64", "--days", "0.01", "-o", "json").stdout)

    assert (found["ettr"]["low"], found["ettr"]["high"]) == (None, None)


@pytest.mark.parametrize("option", ["--html", "--journal"])
def test_a_file_that_can_not_be_written_is_refused_before_anything_is_run(
    option: str, tmp_path: Path
) -> None:
    result = holdfast("simulate", "--days", "54", option, str(tmp_path / "none" / "file"))

    assert result.exit_code == 2
    assert f"{option} {tmp_path / 'none' / 'file'}: No such file or directory" in result.stderr


@pytest.mark.parametrize("beside", ["--seeds", "--first"])
def test_one_seed_of_a_swarm_is_not_asked_for_beside_many(beside: str) -> None:
    result = holdfast("simulate", "swarm", "--seed", "7", beside, "3")

    assert result.exit_code == 2
    assert f"{beside} says nothing beside --seed" in result.stderr
