"""What the command line says of what is not there or broken, and how it is interrupted."""

import errno
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import msgspec
import pytest

from orchestrator.cli.errors import asks_for_json
from orchestrator.worlds.folder import RunFolder
from tests.conftest import RUN, Cluster
from tests.journals import (
    holdfast,
    refused,
    told,
)

pytestmark = pytest.mark.usefixtures("home")


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("get", "nodez"), "no kind 'nodez'", "`nodes`"),
        (("describe", "incidnt"), "no kind 'incidnt'", "`incident`"),
        (("report", "dmeo"), "no run 'dmeo'", "`demo`"),
        (("describe", "incident", "inc-2"), "no incident 'inc-2': demo", "`inc-1`"),
        (("describe", "node", "nod-1"), "no node 'nod-1': demo", "`node-1`"),
        (("describe", "node"), "no node is named", "node-0, node-1, node-2"),
        (("describe", "checkpoint", "11"), "no checkpoint 'step-11': demo", "`step-10`"),
        (("describe", "run", "a", "--run", "b"), "two runs are named", "once"),
        (("logs", "--rank", "4"), "rank is 4, expected 0 to 3: demo", "get ranks"),
        (("explain", "spec.nod"), "no field 'nod': spec", "`nodes`"),
        (("explain", "spec.trainer.steps.x"), "no field 'x'", "no fields"),
    ],
)
@pytest.mark.usefixtures("demo")
def test_a_name_that_is_not_there_is_refused_with_the_nearest(
    arguments: tuple[str, ...], message: str, hint: str
) -> None:
    found = refused(*arguments, code=2)

    assert message in found[0]
    assert hint in found[1]


READING: tuple[tuple[str, ...], ...] = (
    ("get", "nodes"),
    ("get", "events"),
    ("describe", "run"),
    ("describe", "incident"),
    ("report",),
    ("replay",),
    ("logs",),
    ("stop",),
)


def _flip(folder: RunFolder) -> None:
    data = bytearray(folder.journal.read_bytes())
    data[len(data) // 2] ^= 1
    folder.journal.write_bytes(data)


def _empty(folder: RunFolder) -> None:
    folder.journal.write_bytes(b"")


def _other_file(folder: RunFolder) -> None:
    folder.journal.write_text("Dear diary,\ntoday\n")


def _folder_instead(folder: RunFolder) -> None:
    folder.journal.unlink()
    folder.journal.mkdir()


@pytest.mark.parametrize(
    ("arguments", "shows"),
    [
        (("get", "nodes"), "node-1"),
        (("get", "ranks", "--watch"), "node-0"),
        (("get", "events"), "ControllerStarted"),
        (("describe", "run"), "Name:         demo"),
        (("describe", "node", "node-1"), "Joined:"),
        (("report",), "Run:            demo"),
        (("logs",), "said by rank 0"),
        (("logs", "-f"), "said by rank 0"),
    ],
)
def test_what_a_journal_says_before_a_damaged_line_is_shown_and_the_damage_told(
    arguments: tuple[str, ...], shows: str, demo: RunFolder
) -> None:
    demo.rank_log(0).write_text("said by rank 0\n")
    lines = demo.journal.read_bytes().splitlines(keepends=True)
    lines[30] = b"0123456789abcdef" + lines[30][16:]
    demo.journal.write_bytes(b"".join(lines))

    result = holdfast(*arguments)

    assert result.exit_code == 1
    assert shows in result.stdout
    assert "line 31 is damaged: checksum is " in result.stderr
    assert "the line says 0123456789abcdef, " in result.stderr
    assert str(demo.journal) in result.stderr
    assert "\nhint: " in result.stderr


def test_a_run_with_a_damaged_line_is_listed_as_far_as_it_can_be_told(demo: RunFolder) -> None:
    lines = demo.journal.read_bytes().splitlines(keepends=True)
    lines[30] = b"0123456789abcdef" + lines[30][16:]
    demo.journal.write_bytes(b"".join(lines))

    (row,) = json.loads(told("get", "runs", "-o", "json"))

    assert (row["name"], row["state"], row["ranks"]) == ("demo", "Damaged", 4)
    assert "line 31 is damaged" in row["reason"]


@pytest.mark.parametrize("damage", [_flip, _empty, _other_file, _folder_instead])
@pytest.mark.parametrize("arguments", READING)
def test_a_journal_that_can_not_be_read_is_one_message_and_a_hint(
    arguments: tuple[str, ...], damage: Callable[[RunFolder], None], demo: RunFolder
) -> None:
    damage(demo)

    message, _ = refused(*arguments, code=1)

    assert str(demo.journal) in message


@pytest.mark.parametrize("damage", [_empty, _other_file])
def test_logs_are_shown_by_what_the_run_file_says_where_the_journal_says_nothing(
    damage: Callable[[RunFolder], None], demo: RunFolder
) -> None:
    damage(demo)
    demo.rank_log(3).write_text("said by rank 3\n")
    demo.run_file.write_bytes(msgspec.json.encode(Cluster(RUN).run))

    result = holdfast("logs", "--rank", "3")

    assert (result.exit_code, result.stdout) == (1, "said by rank 3\n")
    assert str(demo.journal) in result.stderr
    assert "rank is 4, expected 0 to 3" in refused("logs", "--rank", "4", code=2)[0]


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_journal_of_somebody_else_is_named(demo: RunFolder) -> None:
    demo.journal.chmod(0)

    assert refused("report", code=1)[0] == f"Permission denied: {demo.journal}"


def test_a_full_disk_is_told_with_what_helps(
    demo: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    del demo

    message, hint = refused("report", "--file", "/dev/full/report.json", code=1)
    assert message.startswith("Not a directory: /dev/full/")
    assert "path" in hint

    def full(_: Path, __: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "report.json")

    monkeypatch.setattr(Path, "write_bytes", full)
    message, hint = refused("report", "--file", "report.json", code=1)
    assert message == "No space left on device: report.json"
    assert "make room" in hint


@pytest.mark.parametrize("arguments", READING)
def test_without_any_run_the_user_is_told_how_to_start_one(arguments: tuple[str, ...]) -> None:
    message, hint = refused(*arguments, code=1)

    assert message.startswith("no runs: ")
    assert "holdfast run" in hint


def test_a_folder_that_is_not_that_of_a_run_is_refused(tmp_path: Path) -> None:
    message, _ = refused("report", str(tmp_path), code=1)

    assert message == f"no journal in this folder: {tmp_path}"


@pytest.mark.parametrize(
    "arguments", [("--bogus",), ("get",), ("get", "runs", "-o", "xml"), ("run",), ("fly",)]
)
def test_bad_usage_ends_with_2_and_no_traceback(arguments: tuple[str, ...]) -> None:
    result = holdfast(*arguments)

    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert "Usage" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "kind", "code"),
    [
        (("get", "nodez", "-o", "json"), "CliError", 2),
        (("report", "dmeo", "--output", "json"), "CliError", 2),
        (("checkpoint", "verify", "{home}/absent", "-ojson"), "CliError", 2),
        (("checkpoint", "ls", "{home}", "--bogus", "-o", "json"), "NoSuchOption", 2),
        (("checkpoint", "gc", "{home}", "--keep-last", "0", "-o", "json"), "BadParameter", 2),
        (("plan", "ettr", "--gpus", "x", "--output=json"), "BadParameter", 2),
        (("simulate", "--record", "{home}/absent", "-o", "json"), "BadFileError", 2),
        (("measure", "{home}/absent", "-o", "json"), "BadFileError", 2),
        (("checkpoint", "gc", "{home}", "--dry-run", "--yes", "-o", "json"), "CliError", 2),
    ],
)
def test_who_asks_for_json_is_told_in_json_what_is_wrong(
    arguments: tuple[str, ...], kind: str, code: int, home: Path
) -> None:
    words = [word.format(home=home) for word in arguments]
    in_words = [word for word in words if word not in {"-ojson", "--output=json"}]

    result, plain = holdfast(*words), holdfast(*in_words[: len(words)])

    told = json.loads(result.stderr.splitlines()[-1])["error"]
    assert result.stdout == ""
    assert (told["kind"], told["exit_code"], result.exit_code) == (kind, code, code)
    assert told["message"]
    assert told["hint"]
    assert plain.exit_code == code


def test_who_does_not_ask_for_json_gets_none() -> None:
    assert not asks_for_json(["get", "runs", "-o", "table"])
    assert not asks_for_json(["checkpoint", "quarantine", "u", "5", "--", "-o", "json"])
    assert not asks_for_json(["logs", "json", "-o"])


def test_an_interrupted_command_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.cli import get  # noqa: PLC0415 - the module, to interrupt its wait

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(get.time, "sleep", interrupt)

    assert holdfast("get", "runs", "--watch").exit_code == 130


def test_the_command_says_which_version_it_is() -> None:
    assert holdfast("--version").stdout == f"holdfast {version('holdfast')}\n"


def test_help_loads_neither_numpy_nor_rich_nor_torch() -> None:
    code = """
import sys
from orchestrator.cli.commands import app
try:
    app(["--help"])
except SystemExit:
    pass
print(*(name for name in ("numpy", "rich", "torch", "starlette") if name in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )

    assert done.stdout.splitlines()[-1] == ""


def test_who_starts_a_run_does_not_load_what_the_controller_serves_with() -> None:
    code = """
import sys
from orchestrator.cli import supervise
print(*(name for name in ("uvicorn", "websockets", "asyncio", "torch") if name in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )

    assert done.stdout.splitlines()[-1] == ""


def test_an_interrupt_while_the_command_is_loading_ends_it_without_a_traceback(
    tmp_path: Path,
) -> None:
    slow = "import time\nprint('loading', flush=True)\ntime.sleep(30)\n"
    (tmp_path / "typer.py").write_text(slow)
    # Whoever runs the tests in the background has them ignore interrupts, and so their children.
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{heeding}; from orchestrator.cli.main import main; main()"
    command = [sys.executable, "-c", program, "get"]
    started = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    with started:
        assert started.stdout is not None
        assert started.stdout.readline() == "loading\n"
        started.send_signal(signal.SIGINT)
        _, err = started.communicate(timeout=20)

    assert (started.returncode, err) == (130, "")


def test_an_error_that_nobody_can_read_keeps_its_exit_code() -> None:
    master, slave = pty.openpty()
    os.close(master)
    command = [sys.executable, "-c", "from orchestrator.cli.main import main; main()"]

    ended = subprocess.run([*command, "get", "nothing"], stderr=slave, timeout=20, check=False)

    os.close(slave)
    assert ended.returncode == 2
