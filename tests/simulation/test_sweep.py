"""Sweeps: a grid is run cell by cell, interrupted without loss, and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest

from orchestrator.agent import linux
from orchestrator.cli import plots, pool, sweeping
from orchestrator.cli.errors import CliError, Exit
from orchestrator.document import BadFileError
from orchestrator.faults.sections import ModelError
from orchestrator.simulation.settings import Settings, SettingsError
from orchestrator.worlds.simulated import profiles
from tests.journals import holdfast
from tests.runs import HEEDING

ROOT = Path(__file__).parents[2]
SMALL = """
kind: Sweep
name: spares
base: {gpus: 16, days: 0.004, rates: 2000}
grid: {spares: [0, 1], saveEvery: [30s]}
seeds: 2
"""


def written(folder: Path, text: str = SMALL) -> Path:
    file = folder / "spares.yaml"
    file.write_text(text)
    return file


def test_every_cell_is_run_with_every_seed_and_told_in_a_table(tmp_path: Path) -> None:
    file, page = written(tmp_path), tmp_path / "page.html"

    result = holdfast("simulate", "sweep", str(file), "--html", str(page), "-o", "json")

    told = json.loads(result.stdout)
    assert (told["done"], told["runs"]) == (4, 4)
    assert [row["varied"] for row in told["rows"]] == [
        {"spares": 0, "saveEvery": "30s"},
        {"spares": 1, "saveEvery": "30s"},
    ]
    assert all(len(row["ettr"]["per_seed"]) == 2 for row in told["rows"])
    files = {
        f"run-{row['experiment']}-seed-0000{seed}.json" for row in told["rows"] for seed in "01"
    }
    assert {f.name for f in (tmp_path / "spares").iterdir()} == files | {"results.json"}
    assert len(files) == 4
    assert page.read_text().count("<svg") == 1


def runs_in(folder: Path) -> dict[str, bytes]:
    """Return the results in a folder, by the names of their files."""
    return {file.name: file.read_bytes() for file in folder.glob("run-*.json")}


def test_what_is_there_is_not_run_again_unless_it_was_asked_otherwise(tmp_path: Path) -> None:
    file = written(tmp_path)
    first = holdfast("simulate", "sweep", str(file))
    kept = runs_in(tmp_path / "spares")
    (tmp_path / "spares" / min(kept)).unlink()

    again = holdfast("simulate", "sweep", str(file))
    other = holdfast("simulate", "sweep", str(written(tmp_path, SMALL.replace("2000", "1000"))))

    assert "3 runs of 4 are there already" in again.stderr
    assert again.stdout == first.stdout
    assert "are there already" not in other.stderr
    assert len(runs_in(tmp_path / "spares")) == 8


def test_a_grid_that_grew_and_was_turned_around_goes_on_with_what_is_there(
    tmp_path: Path,
) -> None:
    before = holdfast("simulate", "sweep", str(written(tmp_path)), "-o", "json")
    kept = runs_in(tmp_path / "spares")
    grown = SMALL.replace("days: 0.004, ", "").replace(
        "{spares: [0, 1], saveEvery: [30s]}",
        "{saveEvery: [20s, 30s], days: [0.003, 0.004], spares: [2, 1, 0]}",
    )

    after = holdfast("simulate", "sweep", str(written(tmp_path, grown)), "-o", "json")

    assert "4 runs of 24 are there already" in after.stderr
    assert kept.items() < runs_in(tmp_path / "spares").items()
    was, is_now = (
        {row["experiment"]: (row["varied"]["spares"], row["ettr"]) for row in told["rows"]}
        for told in map(json.loads, (before.stdout, after.stdout))
    )
    assert was.items() < is_now.items()


def test_an_experiment_is_named_by_all_that_it_is_and_not_by_the_order_it_is_said_in() -> None:
    one = Settings(gpus=16, class_rates={"nic": 2, "gpu-fault": 3})
    turned = Settings(class_rates={"gpu-fault": 3, "nic": 2}, gpus=16, days=54.0)
    others = [Settings(gpus=16), Settings(gpus=16, class_rates={"nic": 3, "gpu-fault": 2})]

    assert sweeping.name(one, "a") == sweeping.name(turned, "a")
    assert len({sweeping.name(each, it) for each in (one, *others) for it in "ab"}) == 6


def test_a_result_under_the_name_of_another_is_not_taken_for_it(tmp_path: Path) -> None:
    file = written(tmp_path)
    first = holdfast("simulate", "sweep", str(file), "-o", "json")
    folder = tmp_path / "spares"
    kept = runs_in(folder)
    one, *_, other = sorted(kept)
    (folder / one).write_bytes(kept[other])

    again = holdfast("simulate", "sweep", str(file), "-o", "json")

    assert "3 runs of 4 are there already" in again.stderr
    assert again.stdout == first.stdout


def test_an_interrupted_sweep_leaves_whole_results_only_and_goes_on(tmp_path: Path) -> None:
    file = written(tmp_path, SMALL.replace("seeds: 2", "seeds: 60"))
    program = "from orchestrator.cli.main import main; main()"
    command = [*HEEDING, sys.executable, "-c", program, "simulate", "sweep", str(file)]
    sweep = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert sweep.stderr is not None
    try:
        assert "1 of 120 runs" in sweep.stderr.readline()
        sweep.send_signal(signal.SIGINT)
        assert sweep.wait(60) == 130
    finally:
        if sweep.poll() is None:
            os.killpg(sweep.pid, signal.SIGKILL)
            sweep.wait(10)
        sweep.stderr.close()

    left = sorted((tmp_path / "spares").glob("run-*.json"))
    assert 0 < len(left) < 120
    for each in left:
        assert json.loads(each.read_bytes())["outcome"]["ettr"] >= 0
    before = {each.name: each.stat().st_mtime_ns for each in left}
    time.sleep(0.01)
    written(tmp_path)
    resumed = holdfast("simulate", "sweep", str(file), "--out", str(tmp_path / "spares"))
    assert "of 4 are there already" in resumed.stderr
    after = {each.name: each.stat().st_mtime_ns for each in left}
    assert before == after


def test_results_of_a_profile_that_has_changed_since_are_not_taken_for_its(tmp_path: Path) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text(profiles.text(profiles.packaged("measured"), json=False))
    file = written(tmp_path, SMALL.replace("base: {", f"base: {{profile: {profile}, "))
    assert holdfast("simulate", "sweep", str(file)).exit_code == 0

    profile.write_text(profiles.text(profiles.packaged("byterobust-like"), json=False))
    again = holdfast("simulate", "sweep", str(file))

    assert again.exit_code == 0
    assert "are there already" not in again.stderr


def test_a_sweep_without_an_ending_needs_a_folder_for_its_results(tmp_path: Path) -> None:
    file = tmp_path / "plain"
    file.write_text(SMALL)

    result = holdfast("simulate", "sweep", str(file))

    assert result.exit_code == 2
    assert "say with --out where they shall lie" in result.stderr


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Callable[[], tuple[subprocess.Popen[str], list[int]]]]:
    """Two processes that work for one, each of which has said that it does; the older one first."""
    made: list[subprocess.Popen[str]] = []

    def make() -> tuple[subprocess.Popen[str], list[int]]:
        one = subprocess.Popen(
            [*HEEDING, sys.executable, "-m", "tests.programs.pooled", str(tmp_path)],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        made.append(one)
        deadline = time.monotonic() + 60
        while len(said := list(tmp_path.iterdir())) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        said.sort(key=lambda path: path.stat().st_mtime_ns)
        return one, [int(path.name) for path in said]

    yield make
    for one in made:
        if one.poll() is None:
            one.kill()
        one.communicate(timeout=10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_process_that_it_works_for(
    workers: Callable[[], tuple[subprocess.Popen[str], list[int]]], number: signal.Signals
) -> None:
    one, pids = workers()

    one.send_signal(number)
    one.wait(10)

    deadline = time.monotonic() + 10
    while any(linux.vitals(pid) is not None for pid in pids):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.05)


@pytest.mark.parametrize("which", [0, -1])
def test_a_worker_that_is_ended_from_outside_is_said_to_have_been(
    workers: Callable[[], tuple[subprocess.Popen[str], list[int]]], which: int
) -> None:
    one, pids = workers()

    os.kill(pids[which], signal.SIGKILL)
    _, told = one.communicate(timeout=30)

    assert "CliError: a process that worked on it was ended from outside" in told


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("gpus: 16", "gpu: 16"), "base has no setting 'gpu'"),
        (("saveEvery: [30s]", "saveEvery: []"), "grid.saveEvery has no values"),
        (("saveEvery: [30s]", "gpus: [16]"), "gpus is in base and in grid"),
        (("spares: [0, 1]", "spares: [0, -1]"), "cell 1"),
        (("spares: [0, 1]", "spares: [1, 1]"), "grid.spares has a value twice"),
        (("[30s]", "[30]"), "expected `str | null`, got `int`"),
        (("[30s]", "[30 x]"), "saveEvery: span is '30 x'"),
        (("rates: 2000", "rates: -1"), "expected `float` >= 0"),
        (("seeds: 2", "sseeds: 2"), "unknown field `sseeds`"),
        (("kind: Sweep", "kind: Grid"), "invalid enum value 'Grid'"),
        (("rates: 2000", "record: llama3, scaleRecord: false"), "expected at most 2, as many as"),
    ],
)
def test_a_sweep_that_can_not_be_is_refused_before_anything_is_run(
    tmp_path: Path, change: tuple[str, str], words: str
) -> None:
    result = holdfast("simulate", "sweep", str(written(tmp_path, SMALL.replace(*change))))

    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert not (tmp_path / "spares").exists()


@pytest.mark.parametrize(
    "error",
    [
        ModelError("no such class", "add it"),
        SettingsError("gpus is 9, expected 16", "whole nodes"),
        BadFileError("not a sweep: a.yaml", "write one"),
        CliError("no file: a.yaml", "write one", Exit.USAGE),
    ],
)
def test_what_a_worker_refuses_is_said_in_its_own_words(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        list(pool.each(partial(raising, error), [1, 2], jobs=1))

    assert str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)


def raising(error: Exception, number: int) -> None:
    del number
    raise error


def test_a_file_in_the_folder_that_is_no_result_is_named(tmp_path: Path) -> None:
    file = written(tmp_path)
    holdfast("simulate", "sweep", str(file))
    torn = min((tmp_path / "spares").glob("run-*.json"))
    torn.write_text("{")

    result = holdfast("simulate", "sweep", str(file))

    assert result.exit_code == 2
    assert "not the result of a run" in result.stderr
    assert torn.name in result.stderr


class Tags(HTMLParser):
    """Which tags a page has, and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [v or "" for name, v in attrs if name in ("src", "href")]


def test_the_page_of_an_experiment_stands_by_itself(tmp_path: Path) -> None:
    page = tmp_path / "report.html"

    holdfast("simulate", "--gpus", "16", "--days", "0.05", "--rates", "100", "--spares", "4",
             "--html", str(page))  # fmt: skip

    text = page.read_text()
    tags = Tags()
    tags.feed(text)
    assert text.count("<svg") == 4
    assert tags.loads == []
    assert "script" not in tags.tags
    assert "ETTR" in text


def test_what_a_plot_says_is_escaped() -> None:
    drawn = plots.bars([plots.Bar("<script>", 1.0, "a & b")])

    assert "&lt;script&gt;" in drawn
    assert "a &amp; b" in drawn


def test_the_fields_of_a_sweep_and_of_its_settings_are_explained() -> None:
    assert "every combination is a cell" in holdfast("explain", "sweep.grid").stdout
    assert "Between two saves to memory" in holdfast("explain", "settings.saveEvery").stdout
