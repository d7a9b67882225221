"""A durable tier that hangs: each order is answered all the same, in time, and why."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.core.decisions import CommitCheckpoint, EndRun
from orchestrator.core.events import (
    CheckpointCommitted,
    CheckpointFound,
    CommitFailed,
    SearchFailed,
)
from orchestrator.core.phases import RunPhase
from orchestrator.protocol.ids import Generation, NodeId, Step
from orchestrator.protocol.messages import RanksFinished, ShardsWritten
from orchestrator.worlds import lane
from orchestrator.worlds.vault import SEARCHES_MAX
from storage.local import LocalStore
from storage.manifest import body_key
from tests.conftest import Cluster
from tests.runs import REPOSITORY
from tests.vaults import WITHIN_S, Gate, Tier


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[Tier]:
    tier = Tier(tmp_path / "tier")
    yield tier
    tier.close()


def test_a_commit_that_hangs_is_answered_in_time_and_again_when_it_is_done_after_all(
    tier: Tier,
) -> None:
    gate = Gate("put", "commits/")
    vault = tier.open(gate, commit_s=0.3)
    begun = time.monotonic()
    tier.order(vault, 20, epoch=1)

    failed = tier.answer(CommitFailed)

    assert time.monotonic() - begun < 5
    assert (failed.step, failed.epoch, failed.again) == (20, 1, True)
    assert failed.reason == "the durable tier did not answer within 0.3 s"
    gate.opened.set()
    assert tier.answer(CheckpointCommitted).step == 20
    assert tier.steps() == [20]


def test_a_commit_that_is_late_and_then_fails_is_answered_once(tier: Tier) -> None:
    gate = Gate("keys", "gen/", by="holdfast-commit")
    vault = tier.open(gate, commit_s=0.3)
    tier.order(vault, 20, epoch=1)
    tier.answer(CommitFailed)
    (tier.root / body_key(20, 1, 0)).unlink()
    gate.opened.set()

    tier.commit(vault, 40, epoch=1)

    assert tier.told.empty()
    assert tier.steps() == [40]


def test_the_same_commit_is_done_by_the_second_attempt_while_the_first_still_hangs(
    tier: Tier,
) -> None:
    gate = Gate("put", "commits/")
    vault = tier.open(gate, commit_s=0.3)
    tier.order(vault, 20, epoch=1)
    tier.answer(CommitFailed)
    assert gate.reached.wait(WITHIN_S)
    gate.operation = "nothing any more"

    tier.order(vault, 20, epoch=1)

    assert tier.answer(CheckpointCommitted).step == 20
    gate.opened.set()
    assert tier.answer(CheckpointCommitted).step == 20
    assert tier.steps() == [20]


def test_a_commit_behind_one_that_hangs_is_done_all_the_same(tier: Tier) -> None:
    vault = tier.open(Gate("put", "commits/8999999999999980"), commit_s=0.5)
    tier.order(vault, 20, epoch=1)
    time.sleep(0.3)
    tier.order(vault, 40, epoch=1)

    assert tier.answer(CommitFailed).step == 20
    assert tier.answer(CheckpointCommitted).step == 40


def test_a_search_waits_for_a_commit_that_hangs_no_longer_than_that_may_take(tier: Tier) -> None:
    gate = Gate("put", "commits/8999999999999960")
    vault = tier.open(gate, commit_s=0.3)
    tier.commit(vault, 20, epoch=1)
    tier.order(vault, 40, epoch=1)
    begun = time.monotonic()

    vault.search(tier.told.put)

    # Both waits end at the same moment, and either answer may be the first.
    answers = [tier.told.get(timeout=WITHIN_S) for _ in range(2)]
    assert {type(answer): answer.step for answer in answers} == {
        CommitFailed: 40,
        CheckpointFound: 20,
    }
    assert time.monotonic() - begun < 5


def test_a_search_that_hangs_keeps_neither_commits_nor_another_search_waiting(tier: Tier) -> None:
    gate = Gate("get", ".st", by="holdfast-search")
    vault = tier.open(gate, commit_s=2)
    tier.commit(vault, 20, epoch=1)
    vault.search(tier.told.put)
    assert gate.reached.wait(WITHIN_S)
    gate.key = "nothing any more"

    tier.commit(vault, 40, epoch=1)
    assert tier.search(vault).step == 40

    # Whoever asked has long gone on; it can tell by whom it was asked.
    vault.begin(Generation(2))
    gate.opened.set()
    late = tier.answer(CheckpointFound)
    assert (late.step, late.generation) == (20, 1)


def test_searches_that_hang_do_not_become_more_and_more(tier: Tier) -> None:
    gate = Gate(by="holdfast-search")
    vault = tier.open(gate)
    for _ in range(SEARCHES_MAX):
        vault.search(tier.told.put)

    vault.search(tier.told.put)

    failed = tier.answer(SearchFailed)
    assert failed.again
    assert failed.reason == f"{SEARCHES_MAX} searches hang already"
    gate.opened.set()
    for _ in range(SEARCHES_MAX):
        tier.answer(CheckpointFound)
    tier.search(vault)


def test_commits_that_hang_do_not_become_more_and_more_and_each_is_answered(tier: Tier) -> None:
    gate = Gate(by="holdfast-commit")
    vault = tier.open(gate, commit_s=0.2)
    for step in range(1, lane.LEFT_MAX + 4):
        tier.order(vault, step, epoch=1)
        assert tier.answer(CommitFailed).step == step

    hanging = [thread for thread in threading.enumerate() if "commit-work" in thread.name]
    assert len(hanging) == lane.LEFT_MAX
    gate.opened.set()
    for thread in hanging:
        thread.join(WITHIN_S)
    # In whatever order they run now; those that come too late for that are refused, quietly.
    while not tier.told.empty():
        tier.answer(CheckpointCommitted)
    tier.commit(vault, 40, epoch=1)
    assert tier.steps()[0] == 40


def test_deletions_that_hang_keep_neither_commits_nor_searches_waiting(tier: Tier) -> None:
    gate = Gate("delete")
    vault = tier.open(gate, keep_last=1, commit_s=2)
    for step in (20, 40, 60):
        tier.order(vault, step, epoch=1)
        tier.answer(CheckpointCommitted)
    assert gate.reached.wait(WITHIN_S)

    assert tier.search(vault).step == 60
    tier.order(vault, 80, epoch=1)
    assert tier.answer(CheckpointCommitted).step == 80
    assert not vault.settle(0.1)


def test_a_folder_that_can_not_be_swept_keeps_nobody_waiting(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = threading.Event()

    def hang(_store: LocalStore, _idle_s: float) -> list[Path]:
        assert swept.wait(WITHIN_S)
        return []

    monkeypatch.setattr(LocalStore, "sweep_old", hang)
    vault = tier.open(commit_s=2)
    tier.order(vault, 20, epoch=1)
    tier.answer(CheckpointCommitted)
    assert tier.search(vault).step == 20
    swept.set()


def test_a_run_whose_last_commit_hangs_ends_in_time_and_says_why(tier: Tier) -> None:
    cluster = Cluster()
    last = cluster.run.spec.trainer.steps
    vault = tier.open(Gate("put", "commits/"), commit_s=0.1, name=cluster.run.metadata.name)
    cluster.start()
    cluster.train(last)
    receipts = tier.write(last, epoch=1, name=cluster.run.metadata.name)
    written = ShardsWritten(generation=Generation(1), step=Step(last), receipts=receipts, model="m")
    orders = cluster.say("node-0", written)
    for node in ("node-0", "node-1"):
        ranks = cluster.state.ranks_of(NodeId(node))
        orders += cluster.say(
            node,
            RanksFinished(
                generation=Generation(1), step=Step(last), ranks=ranks, lanes=((1, 2),) * len(ranks)
            ),
        )
    assert cluster.state.phase is RunPhase.FINISHING
    begun = cluster.now

    while cluster.state.phase is RunPhase.FINISHING:
        for order in [order for order in orders if isinstance(order, CommitCheckpoint)]:
            vault.commit(order, tier.told.put)
            orders = cluster.tell(tier.answer(CommitFailed))
        orders = cluster.after(1.0).beat(step=last)

    (end,) = [order for order in orders if isinstance(order, EndRun)]
    assert end.state == "Failed"
    assert "not durable after 60 s: the durable tier did not answer within 0.1 s" in end.reason
    assert cluster.now - begun < cluster.state.timeouts.save_s + 2


HANGING = """
import sys, threading
import msgspec
from orchestrator.core.decisions import CommitCheckpoint
from orchestrator.protocol.messages import Receipt
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.protocol.timeouts import derive
from orchestrator.worlds.vault import Vault
from storage.memory import MemoryStore
from storage.faulty import FaultyStore
from tests.runs import steps_job

def hang(operation, key):
    threading.Event().wait()

run = msgspec.convert(steps_job(), TrainingRun)
store = FaultyStore(MemoryStore(), before=hang)
vault = Vault(run, "nowhere", lambda: 1.0, limits=derive(2.0, 60.0), store=store)
receipts = (Receipt(0, 32, "0" * 64),)
vault.commit(CommitCheckpoint(generation=1, reason="", step=1, receipts=receipts, model="m"), print)
vault.search(print)
print(vault.settle(0.5))
"""


def test_a_controller_ends_although_its_store_hangs() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", HANGING],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "False\n", "")
