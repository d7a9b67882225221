"""What of a run's folder may be damaged or missing, and what is refused before it is touched."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from orchestrator import compose
from orchestrator.cli import prepare
from orchestrator.cli.errors import CliError, Exit
from orchestrator.faults.plan import FaultPlan
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.worlds.folder import HOME_VARIABLE, RunFolder
from tests.conftest import RUN
from tests.journals import killed_rank, write

PLAN = compose.parse(
    "kind: FaultPlan\nfaults: [{when: {step: 12}, fault: kill-rank, rank: 1}]", FaultPlan, "plan"
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    return tmp_path / "home"


def run(text: str = RUN) -> TrainingRun:
    return compose.parse(text, TrainingRun, "run.yaml")


@contextmanager
def prepared(out: Path, plan: FaultPlan | None = None, text: str = RUN) -> Iterator[RunFolder]:
    folder, held = prepare.prepare(run(text), plan, out)
    try:
        yield folder
    finally:
        os.close(held)


def refused(out: Path, plan: FaultPlan | None = None, text: str = RUN) -> CliError:
    with pytest.raises(CliError) as caught, prepared(out, plan, text):
        pass
    assert caught.value.hint
    return caught.value


def test_the_run_file_of_a_folder_is_that_of_its_journal_whatever_its_copy_says(
    tmp_path: Path,
) -> None:
    folder = write(killed_rank(), tmp_path / "run")
    other = run(RUN.replace("steps: 1000", "steps: 9"))

    for damaged in (b"", b'{"kind', b"\xff\xfe", msgspec.json.encode(other), None):
        folder.run_file.unlink(missing_ok=True)
        if damaged is not None:
            folder.run_file.write_bytes(damaged)
        with prepared(folder.root):
            assert msgspec.json.decode(folder.run_file.read_bytes(), type=TrainingRun) == run()


def test_another_run_file_is_refused_with_what_differs_and_nothing_is_written(
    tmp_path: Path,
) -> None:
    folder = write(killed_rank(), tmp_path / "run")

    error = refused(folder.root, text=RUN.replace("steps: 1000", "steps: 9"))

    assert "spec.trainer.steps was 1000, is 9" in str(error)
    assert error.code is Exit.USAGE
    assert not folder.run_file.exists()


@pytest.mark.parametrize("token", [b"", b"\n", b"short", b"\xff" * 43, b"x" * 4000])
def test_a_token_that_would_let_anybody_in_or_nobody_is_made_anew(
    token: bytes, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    with prepared(folder.root):
        good = folder.token.read_bytes()
    with prepared(folder.root):
        assert folder.token.read_bytes() == good

    folder.token.write_bytes(token)
    with prepared(folder.root):
        made = folder.token.read_bytes()

    assert made != good
    assert len(made) == 43
    assert folder.token.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", [b"", b'{"kind": "FaultPlan", "seed"', b'{"kind": "\xff"}'])
def test_a_plan_that_was_damaged_is_not_taken_for_another_plan(
    damage: bytes, tmp_path: Path
) -> None:
    folder = write(killed_rank(), tmp_path / "run")
    folder.plan_file.write_bytes(msgspec.json.encode(PLAN))
    with prepared(folder.root, PLAN):
        pass
    assert "its fault plan was another one" in str(refused(folder.root))

    folder.plan_file.write_bytes(damage)
    error = refused(folder.root, PLAN)

    assert f"is damaged: {error.__cause__}: {folder.plan_file}" in str(error)
    assert "remove that file" in error.hint
    assert folder.plan_file.read_bytes() == damage


def test_a_name_that_can_not_be_registered_leaves_no_folder(home: Path, tmp_path: Path) -> None:
    home.write_text("not a folder")

    with pytest.raises(OSError, match="exists"), prepared(tmp_path / "run"):
        pass

    assert not (tmp_path / "run").exists()
