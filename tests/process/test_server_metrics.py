"""What Prometheus gets of a controller: the program itself, and what it says after events."""

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator import compose
from orchestrator.core.decisions import CommitCheckpoint, Decision
from orchestrator.core.events import (
    CheckpointCommitted,
    CheckpointFound,
    CheckpointJudged,
    CommitFailed,
    Event,
    Reported,
)
from orchestrator.core.ledger import micros
from orchestrator.core.phases import Bucket, RunPhase
from orchestrator.core.trust import Verdict
from orchestrator.protocol.ids import Generation, NodeId, Seconds, Step
from orchestrator.protocol.messages import Receipt, WriteFailed
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.server.counts import Counts
from orchestrator.server.metrics import Metrics, Watched, reading_token
from orchestrator.worlds.folder import HOME_VARIABLE, RunFolder
from tests import runfiles
from tests.programs.played import wait_for
from tests.runs import REPOSITORY

Samples = dict[tuple[str, str], float]
TOKEN = "a-token-for-tests"  # noqa: S105 - it opens nothing but this test
WAIT_S = 30.0


def samples(text: str) -> Samples:
    """Return numbers by name and by the one label beside the run's; each is of the run "demo"."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert sample.name == "holdfast_build_info" or labels.pop("run") == "demo"
            found[sample.name.removeprefix("holdfast_"), ",".join(labels.values())] = sample.value
    return found


def scrape(url: str, token: str) -> str:
    request = urllib.request.Request(  # noqa: S310 - of the controller that the test has started
        f"{url}/metrics", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=WAIT_S) as answer:  # noqa: S310 - the same
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        return str(answer.read().decode())


def listed_names() -> set[str]:
    """Return the names in docs/metrics.md."""
    text = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    return set(re.findall(r"`(holdfast_[a-z_]+)", text))


def watched(*before: tuple[Event, list[Decision]]) -> Watched:
    run = compose.parse(runfiles.text(), TrainingRun, "run.yaml")
    counts = Counts()
    for event, decisions in before:
        counts.take(event, decisions)
    return Watched(compose.controller(run), counts)


@pytest.mark.process
def test_a_controller_is_scraped_with_the_token_that_it_leaves_for_that_and_no_other(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path)
    run = compose.parse(runfiles.text(), TrainingRun, "run.yaml")
    folder.run_file.write_bytes(msgspec.json.encode(run))
    folder.token.write_text(TOKEN, encoding="ascii")
    command = [sys.executable, "-m", "orchestrator.server", str(tmp_path), "0"]
    # The ledger of devices that runs share is there, too: not the user's own.
    environment = os.environ | {HOME_VARIABLE: str(tmp_path / "home")}
    with subprocess.Popen(command, env=environment) as controller:
        try:
            wait_for(folder.address.exists, within_s=WAIT_S)
            url = json.loads(folder.address.read_bytes())["url"]
            token = folder.metrics_token.read_text(encoding="ascii")

            found = samples(scrape(url, token))
            refused = []
            for wrong in (TOKEN, "", "x"):
                with pytest.raises(urllib.error.HTTPError) as caught:
                    scrape(url, wrong)
                with caught.value as answer:
                    refused.append(answer.code)
        finally:
            folder.stop_request.write_text("the test", encoding="ascii")
            assert controller.wait(WAIT_S) == 0

    assert url.startswith("http://127.0.0.1:")
    assert token == reading_token(TOKEN) != TOKEN
    assert folder.metrics_token.stat().st_mode & 0o077 == 0
    assert refused == [401, 401, 401]
    assert found["run_state", str(RunPhase.GATHERING)] == 1
    assert found["agent_streams", ""] == found["run_step", ""] == 0
    assert found["checkpoint_commits_total", ""] == 0
    assert ("checkpoint_age_seconds", "") not in found


def test_checkpoints_are_counted_from_what_is_on_record_and_from_what_comes_then() -> None:
    def at(seconds: float) -> Seconds:
        return Seconds(seconds)

    order = CommitCheckpoint(
        generation=Generation(1),
        reason="written",
        step=Step(10),
        receipts=(Receipt(0, 700, "0" * 64), Receipt(1, 300, "1" * 64)),
        model="m",
    )
    ten = {"step": Step(10), "epoch": Generation(1)}
    failed = CommitFailed(at=at(1), **ten, reason="slow", again=True)
    # Two nodes say of one save that it failed, and one of the next.
    lost = [
        Reported(
            at=at(0),
            node=NodeId(node),
            fact=WriteFailed(generation=Generation(1), step=Step(step), reason="full"),
        )
        for node, step in (("node-0", 4), ("node-1", 4), ("node-1", 8))
    ]
    seen = watched(
        *((one, []) for one in lost),
        (failed, [order]),
        (CheckpointCommitted(at=at(2), **ten, key="a"), []),
    )
    seen.handle(CheckpointCommitted(at=at(5), step=Step(20), epoch=Generation(1), key="b"))
    seen.handle(
        CheckpointJudged(
            at=at(6), step=Step(20), epoch=Generation(1), verdict=Verdict.SUSPECT, reason="a bit"
        )
    )
    seen.handle(CheckpointFound(at=at(9), **ten, key="a", rejected=("step 20: a bit",)))

    found = samples(Metrics(seen).text().decode())

    assert found["checkpoint_commits_total", ""] == 2
    assert found["checkpoint_failures_total", ""] == 3
    assert found["checkpoint_bytes_total", ""] == 1000
    assert found["checkpoint_verify_failures_total", ""] == 2
    assert found["checkpoint_step", ""] == 10
    assert found["checkpoint_age_seconds", ""] == 0


def test_what_the_run_spent_its_seconds_on_is_told_in_full() -> None:
    seen = watched()
    ledger = seen.state.ledger
    ledger.charge(Seconds(30.0), Bucket.EFFECTIVE, None)
    ledger.charge(Seconds(40.0), Bucket.RESTORE, None)
    seen.state.losses[Step(0)] = 2.5
    seen.state.experience.write_s.extend((1.0, 3.0, 2.0))

    found = samples(Metrics(seen).text().decode())

    spent = {bucket: found["run_time_seconds", str(bucket)] for bucket in Bucket}
    assert listed_names() >= {f"holdfast_{name}" for name, _ in found}
    assert spent[Bucket.EFFECTIVE] == 30
    assert sum(spent.values()) == micros(Seconds(40.0)) / 1e6
    assert found["run_goodput_ratio", ""] == 0.75
    assert found["run_loss", ""] == 2.5
    assert found["checkpoint_save_seconds", "durable"] == 2
    assert ("checkpoint_save_seconds", "memory") not in found
    assert sum(found["run_state", str(phase)] for phase in RunPhase) == 1
