"""`holdfast measure`: real runs with faults become a profile; and what it refuses."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from orchestrator.cli.choices import Form
from orchestrator.cli.measure import Measured
from orchestrator.worlds.simulated import profiles
from tests.journals import holdfast
from tests.runs import HEEDING, REPOSITORY, steps_job

pytestmark = pytest.mark.process
LIVE = ("order", "exit", "stop", "seat", "warm", "rendezvous", "load", "fetch", "first_step")


def own_run(folder: Path, *, options: dict[str, object] | None = None, **changes: object) -> Path:
    """A run file of the trainer without torch, so that nothing takes long."""
    together = folder / "together"
    together.mkdir()
    sizes = {"steps": 60, "step_s": 0.05, "save_every": 2, "durable_every": 10}
    sizes |= {"lockstep": str(together)} | (options or {})
    saves = {"checkpoint__everySteps": 10, "checkpoint__memoryEverySteps": 2}
    job = steps_job(**({"trainer__options": sizes} | saves | changes))
    file = folder / "own.yaml"
    file.write_text(yaml.safe_dump(job), encoding="utf-8")
    return file


def started(
    folder: Path, *options: str, job: dict[str, object] | None = None
) -> subprocess.Popen[str]:
    """The command in a process of its own, with a folder of its own for what is temporary."""
    command = [*HEEDING, str(Path(sys.executable).with_name("holdfast")), "measure"]
    (folder / "temporary").mkdir()
    return subprocess.Popen(
        [*command, str(own_run(folder, options=job)), "--repeat", "1", *options],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"TMPDIR": str(folder / "temporary"), "HOLDFAST_HOME": str(folder / "home")},
    )


def test_a_live_run_becomes_a_profile_that_simulations_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    command = started(tmp_path, "--file", str(file))
    out, err = command.communicate(timeout=120)
    assert command.returncode == 0, err

    profile = profiles.read(file)
    small = profile.scaled(gpus=4).constants()
    for name in LIVE:
        assert small[name].origin == "measured", name
        assert small[name].source.startswith("holdfast measure own.yaml --repeat 1, "), name
        assert 0 < small[name].value < 10, name
    assert {"read", "reboot", "write", "found-freeze-rank", "decided-kill-rank"} <= set(
        profile.observed
    )
    assert profile.write == profiles.packaged("measured").write
    assert out.startswith("1 run of 60 steps with 4 ranks; used at 16384 GPUs unless scaled\n")
    assert "Succeeded" in err
    assert list((tmp_path / "temporary").iterdir()) == []
    assert not (tmp_path / "home").exists()  # it is none of the user's runs


def test_what_was_measured_is_printed_as_a_table_or_as_the_file_has_it(tmp_path: Path) -> None:
    measured = Measured(profiles.packaged("measured"), "a table")
    file = tmp_path / "told.json"

    file.write_text(measured.told(Form.JSON), encoding="utf-8")

    assert profiles.read(file) == measured.profile
    assert measured.told(Form.TEXT) == "a table"


def test_ctrl_c_ends_the_run_that_is_measured_and_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    command = started(tmp_path, "--file", str(file))
    deadline = time.monotonic() + 30
    while not list((tmp_path / "temporary").glob("*/run-0/journal")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=40)

    assert command.returncode == 130, err
    assert not file.exists()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_of_a_run_that_fails_nothing_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    command = started(tmp_path, "-q", "--file", str(file), job={"refuse": True})
    out, err = command.communicate(timeout=60)

    assert (command.returncode, out) == (2, "")
    assert "run steps failed" in err
    assert "it was at step 0 of 60\nhint: nothing was measured" in err
    assert not file.exists()
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said", "hint"),
    [
        (["--file", "profile.txt"], "--file is profile.txt, expected a name that ends in", "name"),
        (["--file", "/nowhere/profile.json"], "no such folder: /nowhere", "make it first"),
        (["--base", "{run}"], "invalid enum value 'TrainingRun'", "explain"),
        (["--base", "absent.yaml"], "No such file or directory: absent.yaml", "check the path"),
        (["{run}", "--steps", "80"], "--steps is 80, expected none with a run file", "trainer"),
        (["{small}"], "spec.nodes.spares is 0, expected at least 1", "a node is lost"),
        (["{run}x"], "No such file or directory", "check the path"),
    ],
)
def test_what_can_not_be_measured_is_refused_before_anything_runs(
    options: list[str], said: str, hint: str, tmp_path: Path
) -> None:
    (tmp_path / "small").mkdir()
    run = own_run(tmp_path)
    small = own_run(tmp_path / "small", nodes__spares=0)
    given = [option.format(run=run, small=small) for option in options]

    result = holdfast("measure", *given)

    assert result.exit_code == 2
    message, advice = result.stderr.split("\nhint: ")
    assert said in message
    assert hint in advice
    assert not list(Path(tempfile.gettempdir()).glob("holdfast-measure-*"))
