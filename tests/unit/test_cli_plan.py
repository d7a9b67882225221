"""`holdfast plan`: the three questions of planning, answered by the closed form or refused."""

import json
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cli import laying, planning
from orchestrator.cli.answers import Answer
from orchestrator.cli.choices import Output
from orchestrator.cli.errors import CliError
from orchestrator.policy.arithmetic import daly_interval_s, renewal_ettr
from orchestrator.protocol.runfile import TrainingRun
from tests import runfiles
from tests.journals import holdfast

MINE = """
kind: FaultModel
name: mine
classes:
- {name: fan, entity: node, rate: 1 per node-day, blast: node, effect: crash, cause: hardware,
   fatal: 1, out: fan, detect: {good: 30s}, assumption: it rattles}
repairs:
- {name: fan, parts: [{share: 1, span: 2h}], assumption: a screwdriver}
"""


def told(*arguments: str) -> str:
    result = holdfast("plan", *arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def answer(*arguments: str) -> dict[str, dict[str, float]]:
    """The rows of an answer by name."""
    data = json.loads(told(*arguments, "-o", "json"))
    assert data["method"] == "closed form"
    assert data["assumptions"]
    return {row.pop("name"): row for row in data["rows"]}


def test_spares_are_those_of_the_published_repair_times() -> None:
    # 6.1 nodes leave per day in the source.
    rows = answer("spares", "--mtti", "236m")

    assert [rows[f"repair-{r}"]["spares"] for r in ("4h", "12h", "1d", "3d", "7d")] == [
        4, 8, 13, 29, 59,
    ]  # fmt: skip


def test_spares_for_the_model_say_how_many_are_out_on_average_and_at_most() -> None:
    rows = answer("spares", "--gpus", "16384")

    assert rows["repair-1d"]["mean_nodes"] == pytest.approx(6.5, abs=0.1)
    assert (rows["repair-1d"]["independent"], rows["repair-1d"]["spares"]) == (13, 21)
    assert rows["repair-model"]["away_s"] == pytest.approx(93 * 3600, rel=0.01)
    assert (rows["hot"]["independent"], rows["hot"]["spares"]) == (5, 8)


def test_spares_that_are_enough_all_along_are_more_the_longer_a_run_is() -> None:
    week, months = (
        answer("spares", "--gpus", "16384", "--days", days)["repair-model"] for days in ("7", "54")
    )

    assert week["spares"] == months["spares"] == 46
    assert week["all_along"] < months["all_along"] == 57


def test_nodes_leave_one_by_one_if_nobody_says_what_takes_several() -> None:
    row = answer("spares", "--mtti", "236m")["repair-1d"]

    assert row["independent"] == row["spares"] == 13
    assert "--mtti says nothing of what takes several" in told("spares", "--mtti", "236m")


def test_spares_of_a_model_in_which_no_node_leaves_are_none(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE.replace(" out: fan,", ""))

    rows = answer("spares", "--model", str(tmp_path / "mine.yaml"), "--gpus", "80")

    assert {row["spares"] for row in rows.values()} == {0}


def test_a_higher_quantile_and_a_longer_repair_need_more_spares() -> None:
    few = answer("spares", "--repair", "1d", "--quantile", "0.9")["repair-1d"]["spares"]
    more = answer("spares", "--repair", "1d", "--quantile", "0.999")["repair-1d"]["spares"]

    assert few < 13 < more


def test_the_best_interval_is_better_than_a_quarter_and_than_four_times_of_it() -> None:
    rows = answer("interval", "--mtti", "2.781h")

    assert rows["daly"]["interval_s"] == pytest.approx(31.6, abs=0.1)
    assert rows["young"]["interval_s"] == pytest.approx(31.6, abs=0.1)
    assert rows["daly-x0.25"]["ettr"] < rows["daly"]["ettr"] > rows["daly-x4"]["ettr"]


def test_ettr_is_that_of_the_renewal_form_and_the_losses_make_up_the_rest() -> None:
    rows = answer(
        "ettr", "--mtti", "2.781h", "--detect", "15s", "--restart", "30s", "--interval", "30s"
    )

    assert rows["ettr-renewal"]["share"] == pytest.approx(0.9924, abs=0.0001)
    lost = sum(row["share"] for name, row in rows.items() if name.startswith("lost-"))
    assert rows["ettr-renewal"]["share"] + lost == pytest.approx(1)
    assert rows["ettr-renewal"]["hours"] == pytest.approx(0.9924 * 54 * 24, abs=0.1)


def test_without_options_the_model_of_llama_3_and_the_best_interval_are_taken() -> None:
    data = json.loads(told("ettr", "-o", "json"))

    assert data["gpus"] == 16_384
    assert data["mtti_s"] == pytest.approx(2.78 * 3600, rel=0.005)
    assert data["interval_s"] == daly_interval_s(data["stall_s"], data["mtti_s"])
    assert data["rows"][0]["share"] == renewal_ettr(
        interval_s=data["interval_s"],
        stall_s=data["stall_s"],
        outage_s=data["outage_s"],
        mtti_s=data["mtti_s"],
    )


def test_a_model_of_ones_own_gives_rates_repair_and_detection(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    model = ("--model", str(tmp_path / "mine.yaml"), "--gpus", "80")

    spares, ettr = answer("spares", *model), json.loads(told("ettr", *model, "-o", "json"))

    assert spares["repair-model"]["away_s"] == 7200
    assert spares["repair-4h"]["mean_nodes"] == pytest.approx(10 / 6)
    assert ettr["mtti_s"] == pytest.approx(8640)
    assert ettr["outage_s"] == pytest.approx(30 + 45)


@pytest.mark.parametrize("question", ["spares", "interval", "ettr"])
def test_every_answer_says_that_it_is_the_closed_form_and_what_it_assumes(question: str) -> None:
    text = told(question)

    assert "closed form, not simulated" in text.splitlines()[0]
    assert "\nAssumes:\n  fault model 'llama3': " in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_answers_come_as_yaml_and_as_names_too() -> None:
    assert yaml.safe_load(told("ettr", "-o", "yaml")) == json.loads(told("ettr", "-o", "json"))
    assert told("spares", "--repair", "3d", "-o", "name").splitlines() == [
        "spares/repair-3d",
        "spares/hot",
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("ettr", "--gpus", "12"), "gpus is 12, expected a multiple of 8"),
        (("ettr", "--interval", "soon"), "--interval: span is 'soon', expected a number and"),
        (("ettr", "--interval", "0s"), "--interval is 0s, expected at least 1 ms"),
        (("ettr", "--mtti", "0.5s"), "--mtti is 0.5s, expected at least 1.00 s"),
        (("ettr", "--detect", "-3s"), "--detect: span is '-3s'"),
        (("ettr", "--rates", "0"), "0 interruptions a day"),
        (("ettr", "--rates", "1e300"), "expected one in a thousand years to one a second"),
        (("ettr", "--days", "inf"), "--days is inf"),
        (("interval", "--stall", "0s"), "--stall is 0s, expected at least 1 ms"),
        (("spares", "--quantile", "1"), "--quantile is 1, expected more than 0 and less"),
        (("spares", "--quantile", "nan"), "--quantile is nan"),
        (("spares", "--mtti", "1m", "--repair", "9d"), "nodes would be out on average"),
        (("spares", "--model", "/none.yaml"), "No such file or directory: /none.yaml"),
    ],
)
def test_what_can_not_be_is_refused_with_a_hint_and_exit_code_2(
    arguments: tuple[str, ...], says: str
) -> None:
    result = holdfast("plan", *arguments)

    assert result.exit_code == 2
    message, hint = result.stderr.strip().split("\nhint: ")
    assert says in message
    assert hint


def test_a_model_that_is_none_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MINE.replace("1 per node-day", "-1 per node-day"))

    result = holdfast("plan", "ettr", "--model", str(path))

    assert result.exit_code == 2
    assert "rate is '-1 per node-day', expected 0 or more at `classes[0]`" in result.stderr
    assert str(path) in result.stderr


def test_a_model_that_comes_with_holdfast_is_taken_by_its_name() -> None:
    assert told("ettr", "--model", "llama3") == told("ettr")


def test_of_restarts_of_days_no_more_than_all_time_is_lost() -> None:
    rows = answer("ettr", "--mtti", "2.781h", "--restart", "100000d")

    lost = [row["share"] for name, row in rows.items() if name.startswith("lost-")]
    assert sum(lost) == pytest.approx(1)
    assert rows["lost-restart"]["hours"] == pytest.approx(54 * 24)


LLAMA = planning.faults("llama3")
SPANS = st.builds(
    "{:.9f}{}".format, st.floats(0, 999_999_999), st.sampled_from(["ms", "s", "m", "h", "d"])
) | st.text(max_size=5)


@given(
    gpus=st.integers(-8, 1 << 30),
    spans=st.lists(SPANS, min_size=6, max_size=6),
    rates=st.floats(0, 1e9),
    quantile=st.floats(0, 1),
    days=st.floats(allow_nan=True),
)
def test_any_options_are_answered_or_refused(
    gpus: int, spans: list[str], rates: float, quantile: float, days: float
) -> None:
    mtti, detect, restart, stall, repair, interval = spans
    answers: list[Answer | CliError] = []
    for given_mtti in (mtti, None):
        try:
            site = planning.site(gpus=gpus * 8, model=LLAMA, mtti=given_mtti, rates=rates)
            answers.append(
                planning.spares(site, repair=None, refill=repair, quantile=quantile, days=days)
            )
            outage = planning.outage(site, detect=detect, restart=restart, stall=stall)
            answers.append(planning.interval(site, outage))
            answers.append(planning.ettr(site, outage, interval=interval, days=days))
        except CliError as error:
            answers.append(error)
    for each in answers:
        assert isinstance(each, Answer) or each.hint
        for row in each.rows if isinstance(each, Answer) else ():
            assert 0 <= row.get("ettr", 0) <= 1


def test_the_readme_shows_what_the_command_prints() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    command = "holdfast plan ettr --gpus 16384"

    shown = text.split(f"$ {command}\n")[1].split("```")[0]

    assert shown == told(*command.split()[2:])


def test_an_output_that_is_not_there_is_refused() -> None:
    assert holdfast("plan", "ettr", "-o", "pie").exit_code == 2
    assert set(Output) == {"table", "wide", "json", "yaml", "name"}


SMALL = ("--gpus", "64", "--rates", "100")


def simulated(*arguments: str, seeds: int) -> dict[str, dict[str, float]]:
    result = holdfast("plan", *arguments, *SMALL, "--simulate", str(seeds), "-o", "json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["method"] == "closed form, with a simulation beside it"
    return {row.pop("name"): row for row in data["rows"]}


def test_ettr_of_a_simulation_stands_beside_that_of_the_closed_form() -> None:
    rows = simulated("ettr", "--days", "0.1", "--interval", "26s", seeds=2)

    assert rows["simulated-low"]["share"] <= rows["simulated-mean"]["share"]
    assert rows["simulated-mean"]["share"] <= rows["simulated-high"]["share"]
    assert 0 < rows["ettr-renewal"]["share"] < 1


def test_every_interval_and_every_number_of_spares_is_simulated() -> None:
    # One seed is simulated here; of two, each row would start two processes of its own.
    by_interval = simulated("interval", "--simulated-days", "0.01", seeds=1)
    by_spares = simulated("spares", "--simulated-days", "0.01", "--repair", "1h", seeds=1)

    assert all(0 <= row["simulated"] <= 1 for row in by_interval.values())
    assert all(row["waited_s_per_day"] >= 0 for row in by_spares.values())


def test_a_simulation_needs_to_know_what_breaks() -> None:
    result = holdfast("plan", "ettr", "--mtti", "3h", "--simulate", "1")

    assert result.exit_code == 2
    assert "expected rates by class of fault" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ettr", "--gpus", "262144"), "gpus is 262144, expected `int` <= 131072"),
        (("ettr", "--days", "5000"), "days is 5000.0, expected `float` <= 3660"),
        (("interval", "--simulated-days", "5000"), "days is 5000.0, expected `float` <= 3660"),
    ],
)
def test_what_is_too_large_to_simulate_is_refused_and_not_only_in_a_worker(
    arguments: tuple[str, ...], words: str
) -> None:
    result = holdfast("plan", *arguments, "--simulate", "1")

    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert "hint: " in result.stderr


# Layouts ----------------------------------------------------------------------------------------


def run_file(folder: Path, **trainer: object) -> str:
    """A run of 70B on 512 ranks, but for what is given."""
    given = {"model": "70B", "seqLen": 8192, "globalBatch": 512, **trainer}
    spec = runfiles.fields(
        "big",
        nodes={"count": 64, "ranksPerNode": 8},
        parallelism={"dpReplicate": 1, "dpShard": 512},
        trainer=given,
    )
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(spec))
    return str(path)


def test_a_layout_is_told_for_the_run_s_model_and_for_published_ones(tmp_path: Path) -> None:
    path = run_file(tmp_path, activationCheckpointing="selective")

    data = json.loads(told("layout", path, "-o", "json"))
    rows = {row["name"]: row for row in data["rows"]}

    assert list(rows) == ["run", "8B", "405B"]
    assert rows["run"]["weights"] == 4 * rows["run"]["parameters"]
    assert rows["run"]["parameters"] == pytest.approx(70_553_706_496 / 512, rel=0.001)
    for row in rows.values():
        parts = ("weights", "gradients", "optimizer", "gathered", "accumulated", "activations",
                 "recomputed", "logits")  # fmt: skip
        assert row["total"] == sum(row[part] for part in parts)
        assert row["80GB"] == (row["total"] + data["reserve_bytes"] <= 80_000_000_000)
    assert [rows[name]["80GB"] for name in rows] == [False, True, False]
    assert rows["405B"]["141GB"] is False
    assert any("left to all else (assumed)" in words for words in data["assumptions"])


def test_a_run_file_needs_no_name_of_a_question(tmp_path: Path) -> None:
    path = run_file(tmp_path)

    assert told(path, "-o", "json") == told("layout", path, "-o", "json")
    assert "No such file or directory" in holdfast("plan", "none.yaml").stderr


def test_computing_layers_again_makes_a_layout_fit(tmp_path: Path) -> None:
    table = told("layout", run_file(tmp_path, activationCheckpointing="full"))

    run = next(line for line in table.splitlines() if line.startswith("run "))
    assert run.split()[-4:-2] == ["fits", "fits"]


def test_a_model_that_can_not_be_cut_in_this_way_is_told_why() -> None:
    sizes = {"dim": 64, "layers": 2, "heads": 16, "kvHeads": 16, "ffnDim": 96, "vocab": 1280}
    run = runfiles.fields(
        "wide",
        nodes={"count": 2, "ranksPerNode": 8},
        parallelism={"tp": 16},
        trainer={"model": sizes, "globalBatch": 1},
    )

    rows = {row["name"]: row for row in laying.layout(msgspec.convert(run, TrainingRun)).rows}

    assert rows["run"]["note"] == ""
    assert rows["run"]["total"] > 0
    for size in ("8B", "70B", "405B"):
        assert "kvHeads is 8, expected a multiple of tp = 16" in rows[size]["note"]
        assert rows[size]["total"] is None


def test_a_layout_of_another_trainer_is_refused(tmp_path: Path) -> None:
    result = holdfast("plan", "layout", run_file(tmp_path, entrypoint="mine:main"))

    assert result.exit_code == 2
    assert "expected trainer.train:main" in result.stderr
