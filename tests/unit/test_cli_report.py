"""Reports, replays and logs of scripted runs, and how a run is stopped."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.core import journal
from orchestrator.core.events import StopRequested
from orchestrator.core.report import report
from orchestrator.worlds.folder import RunFolder
from tests.conftest import Cluster
from tests.journals import (
    holdfast,
    killed_rank,
    raising,
    refused,
    succeeded,
    text,
    told,
    write,
)

pytestmark = pytest.mark.usefixtures("home")


def test_the_report_is_the_same_in_every_form_and_file(home: Path, tmp_path: Path) -> None:
    cluster = succeeded()
    write(cluster, home / "short")
    file = tmp_path / "report.json"

    out = told("report", "short", "-o", "json", "--file", str(file))
    words = told("report", "short")

    assert json.loads(out) == json.loads(file.read_text())
    assert json.loads(out)["final_state_digest"] == report(cluster.state).final_state_digest
    assert json.loads(out)["losses_digest"] in words
    assert "lose-node node-1 at step 10: found by inc-1" in words
    assert list(tmp_path.glob(".report*")) == []


def test_every_life_of_a_run_can_be_looked_at(home: Path, tmp_path: Path) -> None:
    folder = write(killed_rank(), home / "demo")
    folder.journal.rename(folder.root / "journal.1")
    (folder.root / "journal.2").write_bytes(text(raising()))
    folder.journal.write_bytes(text(Cluster()))

    for run in ("demo/journal.1", str(folder.root / "journal.1")):
        assert "rank 1 on node-0" in told("describe", "incident", "--run", run)
        assert "byte for byte the same" in told("replay", run)
        assert json.loads(told("report", run, "-o", "json"))["final_step"] == 30
    assert json.loads(told("get", "incidents", "--run", "demo", "-o", "json")) == []
    assert "a former one, journal.1" in told("describe", "run", "demo/journal.1")
    newest = folder.root / "journal.2"
    assert f"of the 2 former ones `holdfast report {newest}`" in told("describe", "run")
    assert "no run 'demo/journal.3'" in refused("report", "demo/journal.3", code=2)[0]
    (tmp_path / "else").symlink_to(folder.root)
    assert "a former one" in told("describe", "run", f"{tmp_path}/else/journal.2")


def test_a_report_file_in_a_folder_that_is_not_there_is_refused(demo: RunFolder) -> None:
    del demo

    message, _ = refused("report", "--file", "/nowhere/report.json", code=1)

    assert message.startswith("No such file or directory: /nowhere/")


def test_replay_says_how_much_was_decided_again_and_that_it_is_the_same(demo: RunFolder) -> None:
    entries = journal.read(demo.journal.read_bytes()).entries
    decisions = sum(len(entry.decisions) for entry in entries)

    assert told("replay") == (
        f"{len(entries)} events, {decisions} decisions, byte for byte the same\n"
    )


def test_replay_shows_the_first_decision_that_comes_out_differently(home: Path) -> None:
    cluster = killed_rank()
    index = next(i for i, e in enumerate(cluster.entries) if e.seq > 20 and e.decisions)
    cluster.entries[index] = journal.Entry(
        seq=index + 1, event=cluster.entries[index].event, decisions=()
    )
    write(cluster, home / "demo")

    result = holdfast("replay")

    assert result.exit_code == 1
    assert f"1 differ; the first is event {index + 1}" in result.stdout
    assert "recorded: []" in result.stdout


def test_replay_names_a_torn_tail_and_does_not_count_it(demo: RunFolder) -> None:
    data = demo.journal.read_bytes()
    demo.journal.write_bytes(data[:-5])

    out = told("replay")

    assert "byte for byte the same\nline " in out
    assert out.endswith("it has no end; it is not counted\n")


@pytest.mark.parametrize(
    ("tail", "lines"),
    [(None, range(1, 30_001)), (0, ()), (1, (30_000,)), (3, (29_998, 29_999, 30_000))],
)
def test_logs_are_printed_whole_or_from_their_end(
    tail: int | None, lines: Any, demo: RunFolder
) -> None:
    demo.rank_log(1).write_text("".join(f"line {n}\n" for n in range(1, 30_001)))

    out = told("logs", "demo", "--rank", "1", *(() if tail is None else ("--tail", str(tail))))

    assert out == "".join(f"line {n}\n" for n in lines)


def test_the_tail_of_a_log_may_be_longer_than_a_block_and_end_without_a_newline(
    demo: RunFolder,
) -> None:
    demo.rank_log(0).write_text("a\n" + "x" * 100_000 + "\n" + "y" * 100_000)

    assert told("logs", "--tail", "2") == "x" * 100_000 + "\n" + "y" * 100_000
    assert told("logs", "--tail", "9").startswith("a\n")


def test_logs_are_followed_until_the_run_is_over(home: Path) -> None:
    cluster = killed_rank()
    folder = write(cluster, home / "demo")

    def go_on() -> None:
        folder.rank_log(0).write_text("said late\n")
        cluster.tell(StopRequested(at=cluster.at(), by="test"))
        folder.journal.write_bytes(text(cluster))

    later = threading.Timer(0.3, go_on)
    later.start()
    out = told("logs", "-f")
    later.join()

    assert out == "said late\n"


def test_stop_asks_in_the_name_of_the_user_and_waits_for_the_end(home: Path) -> None:
    cluster = killed_rank()
    folder = write(cluster, home / "demo")
    asked = []

    def heed() -> None:
        while not folder.stop_request.exists():
            time.sleep(0.01)
        asked.append(folder.stop_request.read_text())
        cluster.tell(StopRequested(at=cluster.at(), by=asked[0].strip()))
        folder.journal.write_bytes(text(cluster))

    controller = threading.Thread(target=heed)
    controller.start()
    out = told("stop", "demo")
    controller.join()

    assert out.startswith("demo: Stopped, stopped by ")
    assert asked[0].endswith("with `holdfast stop`\n")
    assert list(folder.root.glob(".stop*")) == []


def test_stopping_a_run_that_nobody_runs_says_so_and_leaves_no_request(demo: RunFolder) -> None:
    message, hint = refused("stop", "--wait", "300ms", code=1)

    assert message.startswith("no controller is running: demo")
    assert "holdfast run" in hint
    assert not demo.stop_request.exists()


def test_a_controller_that_does_not_heed_is_waited_for_no_longer_than_asked(
    demo: RunFolder,
) -> None:
    idle = "import sys, time; time.sleep(30)"
    with subprocess.Popen([sys.executable, "-c", idle, "orchestrator.server"]) as controller:
        demo.address.write_text(
            json.dumps({"url": "http://127.0.0.1:1", "pid": controller.pid, "incarnation": 1})
        )
        try:
            assert json.loads(told("get", "runs", "-o", "json"))[0]["controller"] == "running"
            message, _ = refused("stop", "--wait", "300ms", code=4)
        finally:
            controller.kill()

    assert "expected Stopped" in message
    assert demo.stop_request.exists()


def test_stopping_a_run_that_has_ended_says_how_it_did(home: Path) -> None:
    write(succeeded(), home / "short")

    assert "had already ended: Succeeded" in told("stop")
