"""The command line on journals of scripted runs: what it prints, and how it ends."""

import errno
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from orchestrator.cli import explain
from orchestrator.core import journal
from orchestrator.core.events import CheckpointJudged, CommitFailed, StopRequested
from orchestrator.core.report import report
from orchestrator.core.trust import Verdict
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.messages import BadCopy, DetectorFailed, MendedCopy, Prepared
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.protocol.timeouts import Timeouts
from orchestrator.worlds.folder import HOME_VARIABLE, RunFolder
from tests.conftest import RUN, Cluster
from tests.journals import (
    commit,
    holdfast,
    killed_rank,
    raising,
    refused,
    succeeded,
    text,
    told,
    write,
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


KILLED_RANK = text(killed_rank())


@pytest.fixture
def demo(home: Path) -> RunFolder:
    folder = RunFolder(home / "demo")
    folder.logs.mkdir(parents=True)
    folder.journal.write_bytes(KILLED_RANK)
    return folder


# get ------------------------------------------------------------------------------------------


def test_runs_are_listed_the_one_written_to_last_first(home: Path) -> None:
    write(succeeded(), home / "short")
    later = write(killed_rank(), home / "demo")
    os.utime(later.journal, (2e9, 2e9))

    rows = told("get", "runs").splitlines()

    assert rows[0].split()[:4] == ["NAME", "STATE", "CONTROLLER", "STEP"]
    assert rows[1].split()[:3] == ["demo", "Training", "gone"]
    assert rows[2].split()[:3] == ["short", "Succeeded", "ended"]


def test_a_run_that_was_started_elsewhere_is_found_by_its_link(home: Path, tmp_path: Path) -> None:
    elsewhere = write(killed_rank(), tmp_path / "elsewhere").root
    (home / "demo").symlink_to(elsewhere)

    assert told("get", "runs", "-o", "name") == "run/demo\n"
    for run in ("demo", str(elsewhere)):
        assert f"Folder:       {elsewhere}" in told("describe", "run", run)
        assert "Reduction:    fast" in told("describe", "run", run)


def test_a_run_whose_journal_is_damaged_is_listed_with_the_reason(home: Path) -> None:
    write(killed_rank(), home / "demo")
    broken = write(killed_rank(), home / "broken")
    broken.journal.write_bytes(b"nonsense\nnonsense\n")

    (row,) = [r for r in json.loads(told("get", "runs", "-o", "json")) if r["name"] == "broken"]

    assert row["state"] == "Unreadable"
    assert "line 1 is damaged" in row["reason"]


def test_there_is_a_table_with_headers_when_there_are_no_runs() -> None:
    assert told("get", "runs").startswith("NAME")


@pytest.mark.parametrize("kind", ["nodes", "ranks", "incidents", "checkpoints", "events"])
@pytest.mark.usefixtures("demo")
def test_every_list_comes_in_every_form(kind: str) -> None:
    table = told("get", kind).splitlines()
    wide = told("get", kind, "-o", "wide").splitlines()
    as_json = json.loads(told("get", kind, "-o", "json"))
    as_yaml = yaml.safe_load(told("get", kind, "-o", "yaml"))
    names = told("get", kind, "-o", "name").splitlines()

    assert len(table) == len(wide) == len(as_json) + 1 > 1
    assert len(wide[0].split()) > len(table[0].split())
    assert as_yaml == as_json
    assert names == [f"{kind[:-1]}/{row['name']}" for row in as_json]


@pytest.mark.usefixtures("demo")
def test_columns_that_are_quantities_have_their_unit_in_the_title() -> None:
    heads = [
        told("get", kind, "-o", "wide").splitlines()[0] for kind in ("runs", "ranks", "incidents")
    ]

    for unit in ("ETTR (%)", "WALL (s)", "SPEED (tokens/s)"):
        assert unit in heads[0]
    assert "STANDING STILL (s)" in heads[1]
    assert "LOST (steps)" in heads[2]


@pytest.mark.usefixtures("demo")
def test_an_incident_is_listed_with_what_it_was_and_cost() -> None:
    (row,) = json.loads(told("get", "incidents", "-o", "json"))

    assert row["suspects"] == ["rank 1", "node-0"]
    assert (row["rung"], row["lost_steps"], row["state"]) == ("restart in place", 3, "Recovered")
    assert "SIGKILL" in row["evidence"][0]


def test_events_leave_out_what_is_periodic_unless_asked(demo: RunFolder) -> None:
    entries = journal.read(demo.journal.read_bytes()).entries

    rows = json.loads(told("get", "events", "-o", "json"))
    everything = json.loads(told("get", "events", "--all", "--tail", "0", "-o", "json"))

    assert {row["kind"] for row in rows} >= {"Joined", "RankExited", "FaultInjected"}
    assert "Telemetry" not in {row["kind"] for row in rows}
    assert len(everything) == len(entries)
    assert len(json.loads(told("get", "events", "--tail", "2", "-o", "json"))) == 2


def test_checkpoints_of_both_tiers_are_listed_newest_first(home: Path) -> None:
    cluster = killed_rank()
    commit(cluster, 20)
    write(cluster, home / "demo")

    rows = json.loads(told("get", "checkpoints", "-o", "json"))

    assert [(row["name"], row["tier"]) for row in rows] == [
        ("step-20", "durable"),
        ("step-10", "memory"),
    ]
    assert rows[1]["copies"] == 2


def test_of_a_run_that_has_ended_nothing_is_told_as_if_it_went_on(home: Path) -> None:
    write(succeeded(), home / "short")

    nodes = json.loads(told("get", "nodes", "-o", "json"))
    ranks = json.loads(told("get", "ranks", "-o", "json"))
    checkpoints = json.loads(told("get", "checkpoints", "-o", "json"))

    assert {node["name"]: node["condition"] for node in nodes} == {
        "node-0": "Ended",
        "node-1": "Lost",
        "node-2": "Ended",
    }
    assert [node["memory_steps"] for node in nodes] == [[], [], []]
    assert {(rank["phase"], rank["process"], rank["still_s"]) for rank in ranks} == {
        ("ended", None, None)
    }
    assert {row["tier"] for row in checkpoints} == {"durable"}
    for words in (told("describe", "run"), told("describe", "node", "node-0")):
        assert "Training" not in words
    assert "In its memory" not in told("describe", "node", "node-0")
    assert "Memory" not in told("describe", "checkpoint")
    assert refused("describe", "checkpoint", "8", code=2)[1].startswith("did you mean `step-20")


def test_who_pays_for_an_incident_is_told_when_somebody_does(home: Path) -> None:
    folder = write(raising(), home / "demo")
    assert "(paid from the software budget, 7 of 8" in told("describe", "incident", "inc-1")
    assert "software (nothing was paid)" in told("describe", "incident", "inc-2")

    cluster = killed_rank()
    cluster.lose("node-2")
    cluster.lose("node-1")
    folder.journal.write_bytes(text(cluster))
    assert "(to be paid from the hardware budget, 15 of 16" in told("describe", "incident")


def test_a_checkpoint_that_is_on_two_tiers_is_named_once(home: Path) -> None:
    cluster = killed_rank()
    commit(cluster, 10)
    write(cluster, home / "demo")

    assert len(json.loads(told("get", "checkpoints", "-o", "json"))) == 2
    assert told("get", "checkpoints", "-o", "name") == "checkpoint/step-10\n"


def test_checkpoints_that_were_not_kept_and_that_can_not_be_read_say_so(home: Path) -> None:
    cluster = Cluster()
    cluster.start()
    for step in range(10, 60, 10):
        cluster.train(10)
        commit(cluster, step)
    cluster.after(0.1).exit(0, step=50)
    cluster.found(40, rejected=("step 50: shard 1 is corrupt",))
    write(cluster, home / "demo")

    rows = json.loads(told("get", "checkpoints", "-o", "json"))

    assert {row["step"]: row["state"] for row in rows if row["tier"] == "durable"} == {
        50: "Rejected",
        40: "Committed",
        30: "Committed",
        20: "Committed",
        10: "Expired",
    }
    assert "keepLast" in next(row["why"] for row in rows if row["state"] == "Expired")
    assert "Rejected" in told("describe", "checkpoint", "50")


def test_a_checkpoint_is_described_with_every_verdict_and_what_kept_one_from_being_committed(
    home: Path,
) -> None:
    cluster = Cluster()
    cluster.start()
    cluster.train(20)
    commit(cluster, 10)
    ten = {"step": Step(10), "epoch": Generation(1)}
    for verdict, reason in (
        (Verdict.STATE_VERIFIED, "2 replicas have the same bytes"),
        (Verdict.SUSPECT, "scrub found a bit in shard 1"),
    ):
        judged = CheckpointJudged(at=cluster.at(), **ten, verdict=verdict, reason=reason)
        cluster.tell(judged)
    why = "not committed: shard 2 is of step 19, others of 20"
    cluster.tell(CommitFailed(at=cluster.at(), step=Step(20), epoch=Generation(1), reason=why))
    write(cluster, home / "demo")

    out = told("describe", "checkpoint", "10")
    assert "state-verified (epoch 1): 2 replicas have the same bytes" in out
    assert out.count("scrub found a bit in shard 1") == 2  # as why it is rejected, and as verdict
    assert why in told("describe", "checkpoint", "20")
    assert why not in out


def test_what_was_bad_in_memory_or_on_the_way_is_told_with_what_was_found_and_whose_copy_it_was(
    home: Path,
) -> None:
    cluster = killed_rank()
    node, other, rank, step = NodeId("node-0"), NodeId("node-1"), Rank(0), Step(10)
    cluster.say(
        node,
        Prepared(
            generation=cluster.state.generation,
            step=step,
            own=2,
            fetched=0,
            durable=0,
            seconds=0.1,
            mended=(
                MendedCopy(rank, NodeId(""), 1, 4096, "xxh3-128 is 1: w"),
                MendedCopy(Rank(1), other, 2, 4096, "xxh3-128 is 2: v", other),
            ),
            lacking=(BadCopy(other, rank, step, "xxh3-128 is 3: w"),),
        ),
    )
    write(cluster, home / "demo")

    story = told("describe", "node", node)
    assert "4.0 KiB, had gone bad in memory and came from the durable tier (xxh3-128 is 1" in story
    assert "4.0 KiB, came damaged from node-1 and came from node-1 (xxh3-128 is 2" in story
    assert "of rank 0, step 10 node-1 has no good copy (xxh3-128 is 3: w)" in story
    assert "shard of rank 0 on node-1: xxh3-128 is 3: w" in told("describe", "checkpoint", "10")


def test_what_a_rank_said_is_no_command_to_the_terminal(home: Path) -> None:
    cluster = Cluster()
    cluster.start()
    cluster.lose("node-1\x1b[31m\n")
    cluster.exit(0, 1, kind="Value\x1b[2JError")
    write(cluster, home / "demo")

    for arguments in (
        ("get", "events", "-o", "wide"),
        ("get", "incidents", "-o", "wide"),
        ("describe", "incident"),
        ("describe", "run"),
        ("report",),
    ):
        assert "\x1b" not in told(*arguments)


def test_a_list_that_is_watched_is_printed_when_it_changes_until_the_run_is_over(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = killed_rank()
    folder = write(cluster, home / "demo")

    def go_on(_seconds: float) -> None:
        cluster.lose("node-2")
        cluster.tell(StopRequested(at=cluster.at(), by="test"))
        folder.journal.write_bytes(text(cluster))

    # It happens between two looks, however long one of them takes.
    monkeypatch.setattr(time, "sleep", go_on)
    out = told("get", "nodes", "--watch")

    first, second = out.split("NAME")[1:]
    assert "Spare" in first
    assert "Lost" in second


def test_the_newest_run_is_meant_when_none_is_named(home: Path) -> None:
    older = write(killed_rank(), home / "demo")
    os.utime(older.journal, (1e9, 1e9))
    write(succeeded(), home / "short")

    assert "short" in told("report")
    assert "demo" in told("report", "demo")


# describe -------------------------------------------------------------------------------------


def test_describe_run_prints_every_timeout_with_its_rule(demo: RunFolder) -> None:
    out = told("describe", "run", "demo")

    rows = Cluster(RUN).state.timeouts.table()
    assert len(rows) == len(Timeouts.__struct_fields__) - 1
    for name, value, rule in rows:
        (line,) = [line for line in out.splitlines() if f" {name} " in line]
        assert f" {value:g} " in line
        assert line.endswith(rule)
    assert str(demo.root) in out
    assert "kill-rank rank 1 at step 13: found by inc-1 after 20 ms" in out


def test_describe_run_says_which_detectors_raised_and_where(home: Path) -> None:
    cluster = killed_rank()
    for rank in (2, 0):
        off = DetectorFailed(
            generation=cluster.state.generation,
            ranks=(Rank(rank),),
            detector="digests",
            reason="ValueError: no",
        )
        assert cluster.say("node-1", off) == []
    write(cluster, home / "demo")

    out = told("describe", "run")

    assert "detector digests was switched off on rank 2: ValueError: no" in out
    assert "detector digests was switched off on rank 0" not in out, "the first is enough"
    assert "detector digests was switched off on rank 0" in told("get", "events")


@pytest.mark.usefixtures("demo")
def test_describe_incident_tells_what_broke_what_was_done_why_and_what_it_cost() -> None:
    out = told("describe", "incident", "inc-1")

    for part in (
        "training again after 250 ms",
        "rank 1 on node-0 was ended by signal 9 (SIGKILL) in forward after step 13",
        "it was planned: fault 0 of the fault plan",
        "restart in place: every node looks well",
        "continued from step 10: own memory (4 ranks)",
        "3 steps done again (11 to 13)",
        "lost_work: steps that are done again",
        "planned fault: kill-rank rank 1 at step 13",
        "+0.250 s",
        "docs/runbook.md#crash",
        "holdfast logs demo --rank 1",
    ):
        assert part in out


def test_describe_run_says_how_much_arithmetic_the_newest_whole_line_tells_of(
    demo: RunFolder,
) -> None:
    assert "Arithmetic" not in told("describe", "run", "demo")

    numbers = '"loss":2.5,"gradNorm":0.5,"learningRate":0.1,"tokens":64,"seconds":0.5'
    rates = '"tokensPerS":128.0,"tflopsPerGpu":{},"mfu":{}'
    lines = [
        f'{{"generation":1,"step":{step},{numbers},{rates.format(speed, share)}}}'
        for step, speed, share in ((4, 399.96, 0.404), (5, 0.5, "null"))
    ]
    demo.steps.write_text(lines[0] + "\n" + lines[1])
    assert "Arithmetic:   400 TFLOPS per rank, MFU 40.4 % (step 4)" in told("describe", "run")

    demo.steps.write_text("\n".join(lines) + "\n")
    assert "Arithmetic:   0.5 TFLOPS per rank (step 5)" in told("describe", "run", "demo")


def test_describe_run_says_what_the_newest_evaluation_came_to(demo: RunFolder) -> None:
    assert "Evaluation" not in told("describe", "run", "demo")

    sources = "{" + ",".join(f'"s{n}/":{n}.5' for n in range(1, 7)) + "}"
    numbers = '"generation":1,"step":{},"loss":2.25,"samples":32,"sources":{}'
    lines = [f"{{{numbers.format(step, of)}}}\n" for step, of in ((20, "{}"), (40, sources))]

    demo.evaluations.write_text(lines[0])
    assert "Evaluation:   loss 2.2500 on 32 samples after step 20\n" in told(
        "describe", "run", "demo"
    )
    demo.evaluations.write_text("".join(lines))
    words = "after step 40; s1/ 1.5000; s2/ 2.5000; s3/ 3.5000; s4/ 4.5000; 2 more\n"
    assert words in told("describe", "run", "demo")


def test_describe_incident_shows_the_traceback_of_what_ended_the_run(home: Path) -> None:
    write(raising(), home / "demo")

    out = told("describe", "incident")

    assert "inc-2: exception, ended the run (Failed)" in out
    assert '|   File "a.py", line 1, in f' in out
    assert "signature: ValueError at a.py:1:f (after step 5)" in out


def test_an_incident_that_is_open_says_so(home: Path) -> None:
    cluster = killed_rank()
    cluster.lose("node-2")
    cluster.lose("node-1")
    cluster.after(2).tick()
    write(cluster, home / "demo")

    out = told("describe", "incident")

    assert "inc-2: node-lost, OPEN for 2.00 s; the run is Gathering" in out
    assert "nothing yet; the run is Gathering" in out
    assert "began: node-1 ended" in out


def test_describe_incident_cuts_a_long_time_line_in_its_middle(home: Path) -> None:
    cluster = killed_rank()
    cluster.lose("node-2")
    cluster.lose("node-1")
    for incarnation in range(2, 102):
        cluster.after(0.1).join("node-2", incarnation=incarnation)
        cluster.lose("node-2")
    write(cluster, home / "demo")

    out = told("describe", "incident")

    assert "lines: holdfast get events --run demo" in out
    assert out.count("\n") < 120


@pytest.mark.usefixtures("demo")
def test_describe_node_and_checkpoint_tell_who_holds_what() -> None:
    assert "step 10: shards of ranks 0, 1, 2, 3" in told("describe", "node", "node-1")
    assert "inc-1" in told("describe", "node", "node-0")
    for name in ("step-10", "10", "checkpoint/step-10"):
        assert "node-0, node-1" in told("describe", "checkpoint", name)


# report and replay ----------------------------------------------------------------------------


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


# logs -----------------------------------------------------------------------------------------


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


# stop -----------------------------------------------------------------------------------------


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


# validate, explain ----------------------------------------------------------------------------


def test_validate_says_back_what_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "plan.yaml").write_text(
        "kind: FaultPlan\nfaults: [{when: {step: 12}, fault: kill-rank, rank: 1}]"
    )

    out = told("validate", str(tmp_path / "run.yaml"), "--faults", str(tmp_path / "plan.yaml"))

    assert "2 nodes of 2 ranks, 1 spare\n" in out
    assert "kill-rank rank 1 at step 12" in out


@pytest.mark.parametrize("command", ["validate", "run"])
def test_a_bad_run_file_or_plan_is_refused_before_anything_starts(
    command: str, tmp_path: Path, home: Path
) -> None:
    run, plan = tmp_path / "run.yaml", tmp_path / "plan.yaml"
    run.write_text(RUN.replace("ranksPerNode", "ranksPerNod"))
    message, hint = refused(command, str(run), code=2)
    assert str(run) in message
    assert hint == "did you mean `ranksPerNode`?"

    run.write_text(RUN)
    plan.write_text("kind: FaultPlan\nfaults: [{when: {step: 1}, fault: kill-rank, rank: 9}]")
    message, _ = refused(command, str(run), "--faults", str(plan), code=2)
    assert "rank is 9, expected 0 to 3" in message
    assert str(plan) in message
    assert list(home.iterdir()) == []


def test_a_timeout_without_a_unit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)

    message, _ = refused("run", str(tmp_path / "run.yaml"), "--timeout", "10", code=2)

    assert message.startswith("--timeout: duration is '10'")


def test_explain_gives_type_default_and_meaning_of_a_field() -> None:
    saves = "memoryEverySteps: number >= 1 and <= 2^40, default 5"
    assert saves in told("explain", "spec.checkpoint")
    assert "probability: number > 0 and <= 1, default 1.0" in told("explain", "plan.faults.when")
    assert "of at most 63 characters, required" in told("explain", "metadata.name")
    assert "`debug`, `8B`, `70B`, `405B`" in told("explain", "spec.trainer.model")
    assert "How long it lasts" in told("explain", "plan.faults.for")
    assert "kind: TrainingRun, required" in told("explain")


def test_explain_knows_every_field_of_a_run_file_and_lists_it_in_its_section() -> None:
    paths = list(fields_in(TrainingRun))
    new = ("trainer.data.sources.uri", "trainer.batchRamp.tokens", "recovery.minReplicas")
    assert {f"spec.{path}" for path in new} <= set(paths)

    for path in paths:
        section = path.rpartition(".")[0]
        line = explain.explain(path).splitlines()[0]
        assert f"  {line}" in explain.explain(section).splitlines()
        # Words for who writes the file, not Python's for the type.
        assert not re.search(r"typing\.|msgspec|<class|NoneType|\.runfile", line)
        # And what it is for, in a sentence.
        assert len(explain.explain(path).splitlines()) > 1, path


def fields_in(section: type[msgspec.Struct], at: str = "") -> Iterator[str]:
    for field in msgspec.structs.fields(section):
        path = f"{at}{field.encode_name}"
        yield path
        inner = [a for a in annotations_in(field.type) if issubclass(a, msgspec.Struct)]
        for each in inner:
            yield from fields_in(each, f"{path}.")


def annotations_in(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from annotations_in(argument)


# What is not there, and what is broken ----------------------------------------------------------


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


# Interrupted ----------------------------------------------------------------------------------


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
