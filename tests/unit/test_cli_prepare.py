"""What of a run's folder may be damaged or missing, and what is refused before it is touched."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from orchestrator import compose
from orchestrator.cli import prepare, runs
from orchestrator.cli.errors import CliError, Exit
from orchestrator.core.events import StopRequested
from orchestrator.core.heritage import left_by
from orchestrator.core.journal import JournalError
from orchestrator.faults.plan import FaultPlan
from orchestrator.protocol.ids import Seconds
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.server.journal import inheritance
from orchestrator.worlds.folder import RunFolder, former_journals
from storage.manifest import commit_key
from tests import runfiles
from tests.conftest import RUN, Cluster
from tests.journals import commit, killed_rank, succeeded, text, write

pytestmark = pytest.mark.usefixtures("home")

PLAN = compose.parse(
    "kind: FaultPlan\nfaults: [{when: {step: 12}, fault: kill-rank, rank: 1}]", FaultPlan, "plan"
)


def run(text: str = RUN) -> TrainingRun:
    return compose.parse(text, TrainingRun, "run.yaml")


@contextmanager
def prepared(
    out: Path | None, plan: FaultPlan | None = None, text: str = RUN
) -> Iterator[RunFolder]:
    folder, held = prepare.prepare(run(text), plan, out)
    try:
        yield folder
    finally:
        os.close(held)


def refused(out: Path | None, plan: FaultPlan | None = None, text: str = RUN) -> CliError:
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


def test_a_run_that_has_ended_goes_on_with_a_run_file_that_was_repaired(tmp_path: Path) -> None:
    life = killed_rank()
    life.tell(StopRequested(at=life.at(), by="a test"))
    folder = write(life, tmp_path / "run")
    repaired = RUN.replace("steps: 1000", "steps: 30, microBatch: 1").replace(
        "spares: 1", "spares: 2"
    )

    with prepared(folder.root, text=repaired):
        written = msgspec.json.decode(folder.run_file.read_bytes(), type=TrainingRun)
        assert written == run(repaired)
        assert not folder.journal.exists()
        (former,) = former_journals(folder)
        left = inheritance(former, written, at=Seconds(0.0))

    assert [step for step, _ in left[0].losses] == list(range(1, 31))
    other = run(repaired.replace("name: demo", "name: other"))
    with pytest.raises(JournalError, match="is of run demo, expected one of run other"):
        inheritance(former, other, at=Seconds(0.0))


def test_a_run_that_has_ended_is_not_taken_for_one_of_another_name(tmp_path: Path) -> None:
    life = killed_rank()
    life.tell(StopRequested(at=life.at(), by="a test"))
    folder = write(life, tmp_path / "run")

    error = refused(folder.root, text=RUN.replace("name: demo", "name: other"))

    assert "metadata.name was 'demo', is 'other'" in str(error)
    assert folder.journal.read_bytes() == text(life)


def test_a_run_is_not_made_shorter_than_what_it_has_committed(tmp_path: Path) -> None:
    life = killed_rank()
    commit(life, 20)
    life.tell(StopRequested(at=life.at(), by="a test"))
    folder = write(life, tmp_path / "run")
    record = folder.checkpoints / commit_key(20, 1)
    record.parent.mkdir(parents=True)
    record.touch()

    error = refused(folder.root, text=RUN.replace("steps: 1000", "steps: 19"))

    assert "spec.trainer.steps is 19, and the run has committed step 20 already" in str(error)
    assert error.code is Exit.USAGE
    with prepared(folder.root, text=RUN.replace("steps: 1000", "steps: 20")):
        assert not folder.journal.exists()


def test_the_durable_tier_of_a_repaired_run_file_has_to_have_what_was_committed(
    tmp_path: Path,
) -> None:
    life = killed_rank()
    commit(life, 20)
    life.tell(StopRequested(at=life.at(), by="a test"))
    folder = write(life, tmp_path / "run")
    moved = tmp_path / "moved"
    elsewhere = RUN + f"  checkpoint: {{uri: {moved}}}\n"

    assert f"the newest of step 20: {moved}" in str(refused(folder.root, text=elsewhere))

    record = moved / commit_key(20, 1)
    record.parent.mkdir(parents=True)
    record.touch()
    with prepared(folder.root, text=elsewhere):
        assert not folder.journal.exists()


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
    home.rmdir()
    home.write_text("not a folder")

    with pytest.raises(OSError, match="exists"), prepared(tmp_path / "run"):
        pass

    assert not (tmp_path / "run").exists()


def test_a_start_that_is_refused_leaves_the_former_life_where_reports_find_it(
    tmp_path: Path,
) -> None:
    tier = tmp_path / "tier"
    stored = RUN + f"  checkpoint: {{uri: {tier.as_uri()}}}\n"
    life = Cluster(stored)
    life.tell(StopRequested(at=1.0, by="a test"))
    folder = write(life, tmp_path / "run")
    tier.write_text("a file, not a folder")

    error = refused(folder.root, text=stored)

    assert "spec.checkpoint.uri" in str(error)
    assert folder.journal.read_bytes() == text(life)
    tier.unlink()
    with prepared(folder.root, text=stored):
        assert not folder.journal.exists()
    assert (folder.root / "journal.1").read_bytes() == text(life)


def test_a_name_means_the_run_that_was_started_last_even_beside_a_folder_of_that_name(
    home: Path, tmp_path: Path
) -> None:
    at_home = write(succeeded(), home / "demo")
    elsewhere = write(killed_rank(), tmp_path / "one")

    with prepared(elsewhere.root):
        assert runs.folder_of("demo").root == elsewhere.root
        for out in (tmp_path / "two", None):
            assert f"is running already: {elsewhere.root}" in str(refused(out))
        assert not (tmp_path / "two").exists()

    later = write(killed_rank(), tmp_path / "two")
    with prepared(later.root):
        assert runs.folder_of("demo").root == later.root
    assert {folder.root for folder in runs.folders()} == {at_home.root, later.root}


def test_a_run_that_is_started_at_home_again_is_what_its_name_means(
    home: Path, tmp_path: Path
) -> None:
    at_home = write(killed_rank(), home / "demo")
    with prepared(write(killed_rank(), tmp_path / "one").root):
        pass

    with prepared(None):
        assert runs.folder_of("demo").root == at_home.root
        assert "is running already" in str(refused(tmp_path / "one"))


def test_a_life_is_not_begun_where_the_checkpoints_of_the_former_one_are_gone(
    tmp_path: Path,
) -> None:
    life = killed_rank()
    commit(life, 20)
    life.tell(StopRequested(at=life.at(), by="a test"))
    folder = write(life, tmp_path / "run")

    for _ in range(2):
        error = refused(folder.root)
        assert "has no checkpoint, and the run committed some, the newest of step 20" in str(error)
        assert folder.journal.read_bytes() == text(life)

    record = folder.checkpoints / commit_key(20, 1)
    record.parent.mkdir(parents=True)
    record.touch()
    with prepared(folder.root):
        assert not folder.journal.exists()


def test_a_life_that_ended_before_it_found_anything_does_not_hide_what_others_committed(
    tmp_path: Path,
) -> None:
    life = killed_rank()
    commit(life, 20)
    life.tell(StopRequested(at=life.at(), by="a test"))
    between = Cluster()
    for event in left_by(life.state, between.at()):
        between.tell(event)
    between.tell(StopRequested(at=between.at(), by="a test"))
    folder = write(between, tmp_path / "run")

    error = refused(folder.root)

    assert "has no checkpoint, and the run committed some, the newest of step 20" in str(error)
    assert folder.journal.read_bytes() == text(between)


def test_a_journal_is_put_aside_behind_all_others_whatever_became_of_those(
    tmp_path: Path,
) -> None:
    life = Cluster()
    life.tell(StopRequested(at=life.at(), by="a test"))
    folder = write(life, tmp_path / "run")
    for name in ("journal.2", "journal.10", "journal.old"):
        (folder.root / name).write_text("of another life")
    folder.clock.write_text("of this one")

    with prepared(folder.root):
        assert (folder.root / "journal.11").read_bytes() == text(life)
        assert not folder.clock.exists()
        assert [path.name for path in former_journals(folder)] == [
            "journal.11",
            "journal.10",
            "journal.2",
        ]


def test_a_table_of_signals_goes_along_with_the_run_whatever_becomes_of_its_file(
    tmp_path: Path,
) -> None:
    file = tmp_path / "ours.yaml"
    table = "signals: [{name: fan, pattern: fan, text: fan}]"
    file.write_text(table, encoding="utf-8")
    asked = runfiles.text(detection={"signals": str(file)})
    with prepared(tmp_path / "run", text=asked) as folder:
        assert folder.signals.read_text(encoding="utf-8") == table

    with prepared(tmp_path / "other", text=runfiles.text()) as folder:
        assert not folder.signals.exists()


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (None, "spec.detection.signals: No such file or directory: "),
        ("signals: [{name: x, pattern: '('}]", "spec.detection.signals: no table of signals: "),
    ],
)
def test_a_table_of_signals_that_is_none_is_refused(
    tmp_path: Path, table: str | None, says: str
) -> None:
    file = tmp_path / "ours.yaml"
    if table is not None:
        file.write_text(table, encoding="utf-8")

    error = refused(tmp_path / "run", text=runfiles.text(detection={"signals": str(file)}))

    assert str(error).startswith(says)
    assert error.code is Exit.USAGE


def test_a_run_that_is_forgotten_leaves_no_name_behind_and_no_other_run_loses_its_own(
    home: Path, tmp_path: Path
) -> None:
    with prepared(tmp_path / "one") as one:
        assert (home / "demo").is_symlink()
    prepare.forget(RunFolder(tmp_path / "another"), "demo")
    assert (home / "demo").is_symlink()

    prepare.forget(one, "demo")

    assert not (home / "demo").is_symlink()
    assert one.run_file.exists()
