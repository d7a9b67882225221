"""Whatever is wrong with what a user hands in: one message, a hint, an exit code, nothing lost.

Everything here goes through the command itself, in processes of its own.
"""

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from math import nan
from pathlib import Path
from typing import Any

import msgspec
import pytest

from orchestrator import compose
from orchestrator.cli.follow import Follower
from orchestrator.core import journal
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.worker import beacon
from tests.journals import killed_rank, text
from tests.runs import REPOSITORY, Job, steps_job
from tests.weights import retensor, written
from trainer.config import ModelConfig

pytestmark = pytest.mark.process
Make = Callable[..., Job]
SHORT: dict[str, Any] = {
    "nodes__spares": 0,
    "trainer__steps": 20,
    "trainer__options": {"steps": 20, "step_s": 0.01, "save_every": 5, "durable_every": 10},
    "checkpoint__everySteps": 10,
}
ENDLESS: dict[str, Any] = {
    "trainer__steps": 5000,
    "trainer__options": {"steps": 5000, "step_s": 0.02, "save_every": 5, "durable_every": 20},
}


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Make]:
    made: list[Job] = []

    def make(*faults: dict[str, Any], name: str = "", **changes: Any) -> Job:
        run = steps_job(**(SHORT | changes))
        run["metadata"]["name"] = name or "steps"
        made.append(Job(tmp_path / str(len(made)), run, list(faults)))
        made[-1].root.mkdir()
        return made[-1]

    yield make
    for one in made:
        one.close()


def refused(one: Job, *options: str, code: int, timeout_s: float = 40.0) -> tuple[str, str]:
    """Run it to its bad end; return the one message and the hint."""
    (one.root / "err").unlink(missing_ok=True)
    one.start("--quiet", *options)
    assert one.finish(timeout_s) == code, one.output()
    return said(one)


def said(one: Job) -> tuple[str, str]:
    error = (one.root / "err").read_text()
    message, *hints = error.rstrip("\n").split("\nhint: ")
    assert message, one.output()
    assert len(hints) == 1, error
    assert hints[0]
    assert "orchestrator/cli" not in error, error
    assert one.leftovers() == []
    return message, hints[0]


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def look(one: Job, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Call another command on what a run left."""
    return subprocess.run(
        [str(Path(sys.executable).with_name("holdfast")), *arguments],
        capture_output=True,
        cwd=REPOSITORY,
        env=dict(os.environ, HOLDFAST_HOME=str(one.root / "home")),
        text=True,
        timeout=40,
        check=False,
    )


def await_step(one: Job, step: int) -> None:
    follower = Follower(one.folder)
    deadline = time.monotonic() + 30
    while (state := follower.poll()) is None or state.reached_step < step:
        assert time.monotonic() < deadline, one.output()
        time.sleep(0.05)


# Before anything starts -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        (
            {"nodes__ranksPerNod": 2},
            "unknown field `ranksPerNod` at `spec.nodes`",
            "`ranksPerNode`",
        ),
        (
            {"trainer__steps": "many"},
            "expected `int`, got `str` at `spec.trainer.steps`",
            "explain",
        ),
        ({"detection__detectWithin": "2 parsecs"}, "duration is '2 parsecs'", "10s"),
        ({"parallelism__dpShard": 3}, "multiplies to 3, expected 4 (nodes.count 2 x", "dpShard"),
        (
            {"checkpoint__uri": "gs://bucket"},
            "supported are a folder, file:///folder and s3",
            "/path",
        ),
    ],
    ids=["field", "type", "unit", "parallelism", "scheme"],
)
def test_a_bad_run_file_is_refused_and_no_folder_is_made(
    job: Make, changes: dict[str, Any], message: str, hint: str
) -> None:
    one = job(**changes)

    told = refused(one, code=2)

    assert message in told[0]
    assert hint in told[1]
    assert not one.folder.report.exists()
    assert not one.folder.journal.exists()


def test_a_plan_for_a_rank_that_the_run_does_not_have_is_refused(job: Make) -> None:
    one = job({"when": {"step": 3}, "fault": "kill-rank", "rank": 9})

    message, _ = refused(one, code=2)

    assert "rank is 9, expected 0 to 3" in message
    assert not one.folder.root.exists()


def _a_file(root: Path) -> Path:
    (root / "run").write_text("precious")
    return root / "run"


def _a_folder_of_something_else(root: Path) -> Path:
    (root / "run").mkdir()
    (root / "run" / "thesis.tex").write_text("precious")
    return root / "run"


def _below_a_file(root: Path) -> Path:
    (root / "file").write_text("precious")
    return root / "file" / "run"


@pytest.mark.parametrize(
    ("place", "code", "says"),
    [
        (_a_file, 2, "not a folder: "),
        (_a_folder_of_something_else, 2, "has files and is not that of a run: "),
        (_below_a_file, 1, "Not a directory: "),
        (lambda _: Path("/proc/nowhere/run"), 1, "No such file or directory: "),
    ],
    ids=["file", "folder", "below a file", "proc"],
)
def test_a_folder_that_can_not_be_had_is_named_and_what_is_there_stays(
    job: Make, place: Callable[[Path], Path], code: int, says: str
) -> None:
    one = job()
    out = place(one.root)
    before = files(one.root)

    message, _ = refused(one, "--out", str(out), code=code)

    assert message.startswith(says) or says in message
    assert str(out)[:12] in message
    after = files(one.root)
    assert {name: after[name] for name in before} == before


def test_a_folder_in_which_a_start_failed_can_be_used_once_there_is_room(job: Make) -> None:
    one = job()
    one.start()
    resource.prlimit(one.started.pid, resource.RLIMIT_FSIZE, (64, 64))  # type: ignore[union-attr]
    assert one.finish() == 1
    assert "File too large" in (one.root / "err").read_text()

    code, report = one.conduct("--quiet")

    assert (code, report.final_step) == (0, 20)


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({"checkpoint__uri": "/proc/nowhere"}, (), "spec.checkpoint.uri takes no checkpoints"),
        ({}, ("--report", "/proc/report.json"), "/proc/.report.json"),
    ],
    ids=["checkpoints", "report"],
)
def test_what_could_not_be_written_at_the_end_is_said_at_the_beginning(
    job: Make, changes: dict[str, Any], options: tuple[str, ...], says: str
) -> None:
    one = job(**changes)

    message, _ = refused(one, *options, code=1)

    assert says in message
    assert not one.folder.journal.exists()


def test_a_port_in_use_is_named(job: Make) -> None:
    one = job()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        message, hint = refused(one, "--port", str(port), code=1)

    assert message == f"Address already in use: 127.0.0.1:{port}"
    assert "another port" in hint
    assert not one.folder.root.exists()


@pytest.mark.parametrize(
    ("damage", "says", "hint"),
    [
        (
            lambda lines: [*lines[:5], b"x" + lines[5][1:], *lines[6:]],
            "line 6 is damaged",
            "cut it",
        ),
        (
            lambda lines: [_of_version(journal.VERSION + 1, lines[0]), *lines[1:]],
            f"line 1: version {journal.VERSION + 1}, expected {journal.VERSION}",
            "version of holdfast that wrote it",
        ),
        (
            lambda lines: [_of_version(1, lines[0]), *lines[1:]],
            f"line 1: version 1, expected {journal.VERSION}",
            "begins in another folder",
        ),
    ],
    ids=["corrupt in the middle", "newer version", "older version"],
)
def test_a_journal_that_can_not_be_gone_on_with_is_left_as_it_is(
    job: Make, damage: Callable[[list[bytes]], list[bytes]], says: str, hint: str
) -> None:
    one = job()
    one.folder.logs.mkdir(parents=True)
    lines = text(killed_rank()).splitlines(keepends=True)
    one.folder.journal.write_bytes(b"".join(damage(lines)))
    before = one.folder.journal.read_bytes()

    told = refused(one, code=1)

    assert says in told[0]
    assert hint in told[1]
    assert one.folder.journal.read_bytes() == before
    done = look(one, "replay", str(one.folder.root))
    assert done.returncode == 1
    assert says.partition(":")[0] in done.stderr


def _of_version(version: int, header: bytes) -> bytes:
    record, _ = journal.read_line(header)
    assert isinstance(record, journal.Header)
    return journal.line(journal.Header(version=version, run_id=record.run_id, run=record.run))


# While it runs ----------------------------------------------------------------------------------


def test_a_run_that_goes_on_is_refused_to_others_by_its_folder_and_by_its_name(job: Make) -> None:
    one = job(**ENDLESS)
    one.start("--quiet")
    await_step(one, 25)

    for out in (one.folder.root, one.root / "elsewhere"):
        done = look(one, "run", str(one.root / "run.yaml"), "--out", str(out))
        assert done.returncode == 1
        assert f"running already: {one.folder.root}\n" in done.stderr
        assert "`holdfast stop RUN` ends it" in done.stderr
    assert not (one.root / "elsewhere").exists()
    one.started.send_signal(signal.SIGINT)  # type: ignore[union-attr]
    assert one.finish() == 130
    assert "stopped by signal SIGINT; it was at step " in said(one)[0]

    # The next life needs neither: it is given the one, and makes the other.
    one.folder.run_file.write_bytes(b'{"kind')
    one.folder.token.write_bytes(b"")
    message, hint = refused(one, "--timeout", "1s", code=4)
    assert "did not end within --timeout 1 s, it was " in message
    assert "goes on from the newest checkpoint" in hint
    assert compose.read_run(one.root / "run.yaml") == msgspec.json.decode(
        one.folder.run_file.read_bytes(), type=TrainingRun
    )
    assert len(one.folder.token.read_bytes()) == 43


def test_a_full_disk_under_the_journal_stops_decisions_and_then_the_run_and_loses_nothing(
    job: Make,
) -> None:
    steps = {"steps": 200, "step_s": 0.02, "save_every": 5, "durable_every": 20}
    one = job(trainer__steps=200, trainer__options=steps, recovery={"spareWait": "2s"})
    one.start()
    limit_at = beacon.PAGE_BYTES  # every process has it, and a rank needs a beacon
    resource.prlimit(one.started.pid, resource.RLIMIT_FSIZE, (limit_at, -1))  # type: ignore[union-attr]

    assert one.finish() == 1

    message, hint = said(one)
    assert message == (
        f"File too large: {one.folder.journal}, for more than 2 s (spec.recovery.spareWait)"
    )
    assert hint.startswith("make room, then `holdfast run` with the same file goes on")
    assert "training goes on, and nothing is decided until there is room" in one.output()
    # On record is a beginning of what happened, every decision in it included.
    assert look(one, "replay", str(one.folder.root)).returncode == 0

    code, report = one.conduct("--quiet")
    assert code == 0
    assert report.losses == [(step, 1.0 / step) for step in range(1, 201)]
    assert report.divergences == []
    assert one.leftovers() == []


def test_a_disk_that_is_full_for_a_while_costs_no_step(job: Make) -> None:
    steps = {"steps": 200, "step_s": 0.02, "save_every": 5, "durable_every": 20}
    one = job(trainer__steps=200, trainer__options=steps)
    one.start()
    pid = one.started.pid  # type: ignore[union-attr]
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (beacon.PAGE_BYTES, -1))
    deadline = time.monotonic() + 30
    while "nothing is decided until there is room" not in one.output():
        assert time.monotonic() < deadline, one.output()
        time.sleep(0.05)

    resource.prlimit(pid, resource.RLIMIT_FSIZE, (-1, -1))

    assert one.finish() == 0
    report = one.report()
    assert report.losses == [(step, 1.0 / step) for step in range(1, 201)]
    assert (report.generations, report.false_alarms) == (1, 0)
    assert one.leftovers() == []


# The job itself ---------------------------------------------------------------------------------


def test_a_trainer_that_raises_on_every_start_ends_with_its_own_traceback(job: Make) -> None:
    one = job(trainer__options={"steps": 20, "step_s": 0.01, "raise_at": 1})

    message, hint = refused(one, code=3)

    assert "ArithmeticError at " in message
    assert "in 2 generations on node-0, node-1; the fault moves with the job" in message
    assert '    raise ArithmeticError(f"step {step} does not work out")' in message
    assert "ArithmeticError: step 1 does not work out" in message
    assert "holdfast describe incident" in hint


def test_an_entrypoint_that_is_not_there_is_named_at_once(job: Make) -> None:
    one = job(trainer__entrypoint="nowhere.such:main")

    message, hint = refused(one, code=2)

    assert "No module named 'nowhere'" in message
    assert "Import the entrypoint by hand" in hint
    assert one.report().generations == 1


def test_a_node_that_is_needed_and_that_nobody_has_ends_the_run(job: Make) -> None:
    lost = {"when": {"step": 12}, "fault": "lose-node", "node": "node-1"}
    # Its ranks do not wait for each other: the others must not be done before the node is lost.
    one = job(lost, recovery={"spareWait": "500ms"}, **ENDLESS)

    message, _ = refused(one, code=3)

    assert "needs 2 nodes and has 1, 0 of 0 spares free" in message


# Checkpoints ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The durable tier of a run called steps that ended at step 20: generations 10 and 20."""
    root = tmp_path_factory.mktemp("first")
    one = Job(root, steps_job(**SHORT, checkpoint__uri=str(root / "tier")))
    try:
        assert one.conduct("--quiet")[0] == 0
    finally:
        one.close()
    return root / "tier"


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


def _continued(job: Make, checkpoints: Path, tmp_path: Path, **changes: Any) -> tuple[Job, Path]:
    """A run in a folder of its own that finds a copy of the checkpoints."""
    tier = tmp_path / "tier"
    shutil.copytree(checkpoints, tier)
    steps = SHORT["trainer__options"] | {"steps": 30}
    changes = {"trainer__steps": 30, "trainer__options": steps} | changes
    return job(checkpoint__uri=str(tier), **changes), tier


def test_checkpoints_of_another_run_are_neither_used_nor_touched(
    job: Make, checkpoints: Path, tmp_path: Path
) -> None:
    one, tier = _continued(job, checkpoints, tmp_path, name="other")
    before = files(tier)

    message, hint = refused(one, code=3)

    assert "has checkpoints of run steps, expected checkpoints of run other or none" in message
    assert hint == "choose another folder"
    assert files(tier) == before


@pytest.mark.parametrize(
    "newest", ["gen/*/20-1/s2.st", "commits/*80-1.json"], ids=["shard", "manifest"]
)
def test_a_corrupt_newest_checkpoint_is_passed_over_for_the_next_and_said_to_be(
    job: Make, checkpoints: Path, tmp_path: Path, newest: str
) -> None:
    one, tier = _continued(job, checkpoints, tmp_path)
    (corrupt,) = tier.glob(newest)
    _flip(corrupt)

    code, report = one.conduct("--quiet")

    assert code == 0, one.output()
    assert [step for step, _ in report.losses] == list(range(11, 31))
    (failure,) = (f.reason for f in report.save_failures if "passed over" in f.reason)
    assert "passed over: step 20, epoch 1" in failure
    for command in (("report",), ("describe", "run")):
        assert "passed over: step 20, epoch 1" in look(one, *command, str(one.folder.root)).stdout
    assert one.leftovers() == []


def test_checkpoints_of_which_none_can_be_trusted_end_the_run_and_stay(
    job: Make, checkpoints: Path, tmp_path: Path
) -> None:
    one, tier = _continued(job, checkpoints, tmp_path)
    for path in tier.glob("gen/*/*/s0.st"):
        _flip(path)
    before = files(tier)

    message, hint = refused(one, code=3)

    assert "none can be trusted: step 20, epoch 1: " in message
    assert "step 10, epoch 1: " in message
    assert "nothing was deleted" in hint
    assert files(tier) == before


# The embedded trainer ---------------------------------------------------------------------------

TINY = {"dim": 64, "layers": 1, "heads": 4, "kvHeads": 2, "ffnDim": 128, "vocab": 1280}


def _llama(job: Make, **changes: Any) -> Job:
    one = job(
        nodes={"count": 1, "ranksPerNode": 1},
        parallelism={},
        checkpoint={"everySteps": 1},
        trainer={"model": TINY, "steps": 2, "seqLen": 32, "globalBatch": 2, "device": "cpu"},
        detection={"detectWithin": "5s"},
    )
    one.run["spec"]["trainer"] |= changes
    return one


def _no_documents(folder: Path) -> dict[str, Any]:
    (folder / "blank.jsonl").write_text('{"text": ""}\n{"text": "  "}\n')
    return {"data": [str(folder / "blank.jsonl")]}


def _weights_with_a_nan(folder: Path) -> dict[str, Any]:
    config = msgspec.convert(TINY, ModelConfig)
    written(folder / "weights", config=config)
    retensor(folder / "weights/model.safetensors", lambda t: t["lm_head.weight"][7, 1].fill_(nan))
    return {"initFrom": str(folder / "weights")}


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        (
            lambda _: {"data": ["/nowhere/*.txt"]},
            "/nowhere/*.txt",
            "a relative path may differ there",
        ),
        (_no_documents, "no text, expected at least one document", "name files"),
        (lambda _: {"model": TINY | {"vocab": 640}}, "640", "vocab"),
        (
            _weights_with_a_nan,
            "1 of 81920 values are NaN or infinite, the first is number 449: lm_head.weight: ",
            "damaged",
        ),
    ],
    ids=["data", "no documents", "tokenizer", "nan"],
)
def test_what_the_trainer_can_not_read_ends_the_run_at_once(
    job: Make, changes: Callable[[Path], dict[str, Any]], message: str, hint: str, tmp_path: Path
) -> None:
    one = _llama(job, **changes(tmp_path))

    # Importing torch takes its time where others compute, too.
    told = refused(one, code=2, timeout_s=100)

    assert "refused its job" in told[0]
    assert message in told[0]
    assert hint in told[1]
    assert one.report().generations == 1
    assert files(one.folder.checkpoints) == {}


def test_the_checkpoint_of_another_model_is_refused_with_what_differs(
    job: Make, tmp_path: Path
) -> None:
    one, other = _llama(job), _llama(job, model=TINY | {"ffnDim": 192}, steps=3)
    for either in (one, other):
        either.run["spec"]["checkpoint"]["uri"] = str(tmp_path / "tier")
    assert one.conduct("--quiet", timeout_s=100)[0] == 0
    before = files(tmp_path / "tier")

    message, hint = refused(other, code=2, timeout_s=100)

    assert "refused its job" in message
    assert "model" in message
    assert hint
    assert files(tmp_path / "tier") == before
