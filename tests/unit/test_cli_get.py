"""What `holdfast get` prints of scripted runs."""

import json
import os
import time
from pathlib import Path

import pytest
import yaml

from orchestrator.core import journal
from orchestrator.core.events import CheckpointJudged, CommitFailed, StopRequested
from orchestrator.core.trust import Verdict
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.messages import BadCopy, MendedCopy, Prepared
from orchestrator.worlds.folder import RunFolder
from tests.conftest import Cluster
from tests.journals import (
    commit,
    killed_rank,
    raising,
    refused,
    succeeded,
    text,
    told,
    write,
)

pytestmark = pytest.mark.usefixtures("home")


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
