"""What the durable tier tells a controller, and what it deletes and keeps by itself."""

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.core.decisions import CommitCheckpoint, StartGeneration
from orchestrator.core.events import (
    CheckpointCommitted,
    CheckpointFound,
    CommitFailed,
    SearchFailed,
)
from orchestrator.core.trust import Onset
from orchestrator.protocol.cutting import Cut
from orchestrator.protocol.ids import Generation, Step
from orchestrator.protocol.messages import Receipt
from orchestrator.worlds.agents import AgentWorld
from orchestrator.worlds.faults import Schedule
from storage import verdicts
from storage.commit import commit
from storage.digest import Buffer
from storage.errors import StorageRefusedError
from storage.local import LocalStore
from storage.manifest import COMMITS, VERDICTS, ShardReceipt, commit_key, make_manifest
from storage.verdicts import Trust
from tests.conftest import Cluster
from tests.vaults import LAYOUT, WITHIN_S, Gate, Tier


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[Tier]:
    tier = Tier(tmp_path / "tier")
    yield tier
    tier.close()


# What a search finds ----------------------------------------------------------------------------


def test_a_search_tells_the_newest_epoch_also_if_its_checkpoint_is_rejected(tier: Tier) -> None:
    vault = tier.open()
    tier.commit(vault, 60, epoch=1)
    tier.commit(vault, 80, epoch=2)
    tier.damage(80, 2)

    found = tier.search(vault)

    assert (found.step, found.epoch, found.epoch_seen) == (60, 1, 2)
    assert found.shards == 2
    tier.write(100, epoch=7)
    assert tier.search(vault).epoch_seen == 7


@pytest.mark.parametrize(
    ("changes", "shards", "cut"),
    [
        ({}, 4, Cut(dp_shard=4)),
        ({"parallelism": {"dpReplicate": 2, "dpShard": 2}}, 2, Cut(dp_shard=2)),
        ({"parallelism": {"cp": 2, "tp": 2}}, 4, Cut(cp=2, tp=2)),
        ({"parallelism": {"pp": 4}}, 4, Cut(pp=4)),
        (
            {"parallelism": {"pp": 4}, "trainer__pipelineSchedule": "interleaved"},
            4,
            Cut(pp=4, stages_per_rank=2),
        ),
    ],
    ids=str,
)
def test_a_search_tells_how_the_run_was_cut_that_wrote_the_checkpoint(
    tier: Tier, changes: dict[str, Any], shards: int, cut: Cut
) -> None:
    tier.commit(tier.open(**changes), 60, epoch=1, shards=shards)

    assert tier.search(tier.open()).cut == cut


def test_of_a_checkpoint_that_says_of_no_cut_or_of_another_one_than_it_has_none_is_told(
    tier: Tier,
) -> None:
    vault = tier.open()
    tier.commit(vault, 60, epoch=1, shards=3)
    assert tier.search(vault).cut is None
    # As of a folder of another program that was imported.
    receipts = [
        ShardReceipt(shard=r.shard, size=r.size, index_digest=r.index_digest)
        for r in tier.write(80, epoch=1)
    ]
    manifest = make_manifest(receipts, run_id="steps", model="m", step=80, epoch=1)
    commit(tier.store, manifest, newest_epoch_known=1)

    found = tier.search(vault)

    assert (found.step, found.shards, found.cut) == (80, 2, None)


def test_what_came_after_a_silent_corruption_is_barred_for_good_and_not_deleted(
    tier: Tier,
) -> None:
    vault = tier.open()
    for step in (60, 80):
        tier.commit(vault, step, epoch=1)
    tier.commit(vault, 70, epoch=2)
    onsets = (Onset(Step(65), Generation(1)),)

    found = tier.search(vault, onsets)
    assert (found.step, found.epoch) == (70, 2)
    (why,) = found.rejected
    assert why == (
        "step 80, epoch 1: quarantined: made after a silent corruption: "
        "nothing after step 65 is trusted"
    )
    verdicts = tier.store.keys(VERDICTS)

    # A search that does not know of it, and one more that does, which has nothing to add.
    assert tier.search(tier.open()).step == 70
    assert tier.search(vault, onsets).step == 70
    assert tier.store.keys(VERDICTS) == verdicts
    assert commit_key(80, 1) in tier.store.keys(COMMITS)


def test_what_is_compute_verified_comes_before_what_is_newer_if_that_is_asked_for(
    tier: Tier,
) -> None:
    vault = tier.open()
    for step in (40, 60, 80):
        tier.commit(vault, step, epoch=1)
    assert tier.search(vault, graded=True).grade is None
    for step in (40, 60):
        verdicts.add(tier.store, step, 1, Trust.COMPUTE_VERIFIED.kind, "replayed")

    found = tier.search(vault, graded=True)
    assert (found.step, found.grade, found.rejected) == (60, "compute-verified", ())
    assert found.ungraded == ("step 80, epoch 1: written, expected compute verified",)

    verdicts.add(tier.store, 60, 1, verdicts.QUARANTINED, "by hand")
    found = tier.search(vault, graded=True)
    assert (found.step, found.grade) == (40, "compute-verified")
    assert found.rejected == ("step 60, epoch 1: quarantined: by hand",)
    found = tier.search(vault)
    assert (found.step, found.grade) == (80, None)


def test_a_search_tells_how_many_shards_a_checkpoint_has_and_who_asked(tier: Tier) -> None:
    vault = tier.open()
    assert tier.search(vault).shards == 0
    tier.commit(vault, 20, epoch=5, shards=3)

    found = tier.search(vault)

    assert (found.shards, found.generation) == (3, 5)


def test_a_search_tells_of_checkpoints_of_another_run_and_does_not_take_them(tier: Tier) -> None:
    tier.commit(tier.open(name="another"), 20, epoch=1)

    found = tier.search(tier.open())

    assert found.step is None
    assert found.foreign == "checkpoints of run another"


class Refusal(Gate):
    """Whoever reads a blob is refused, until it is opened."""

    def keep(self, operation: str, key: str) -> None:
        if (operation, key) == (self.operation, self.key) and not self.opened.is_set():
            raise StorageRefusedError(f"Permission denied: {key}")


def test_a_record_that_may_not_be_read_is_said_and_nothing_older_is_taken(tier: Tier) -> None:
    refusal = Refusal("get", commit_key(80, 1))
    vault = tier.open(refusal)
    tier.commit(vault, 60, epoch=1)
    tier.commit(vault, 80, epoch=1)

    vault.search(tier.told.put)
    failed = tier.answer(SearchFailed)
    refusal.opened.set()

    assert f"Permission denied: {commit_key(80, 1)}" in failed.reason
    assert "permissions" in failed.reason
    assert tier.search(vault).step == 80


def test_a_record_that_may_not_be_read_keeps_nobody_from_a_newer_checkpoint(tier: Tier) -> None:
    vault = tier.open(Refusal("get", commit_key(60, 1)))
    tier.commit(vault, 60, epoch=1)
    tier.commit(vault, 80, epoch=1)

    assert tier.search(vault, (Onset(Step(95), Generation(1)),)).step == 80


def test_a_run_deletes_nothing_from_a_store_that_it_shares_and_says_so(
    tier: Tier, caplog: pytest.LogCaptureFixture
) -> None:
    vault = tier.open(keep_last=1)
    tier.commit(tier.open(name="another"), 20, epoch=1)

    tier.commit(vault, 40, epoch=1)
    tier.commit(vault, 60, epoch=1)

    assert tier.steps() == [60, 40, 20]
    assert tier.search(vault).step == 60
    assert "checkpoints of runs another, steps, expected one run" in caplog.text


# A search, and what is deleted meanwhile ----------------------------------------------------------


@pytest.mark.parametrize("keep_last", [1, 2])
@pytest.mark.parametrize("reading", ["commits/", ".idx", ".st", "gen/"])
def test_what_a_search_is_reading_is_not_deleted_however_much_is_committed_meanwhile(
    tier: Tier, keep_last: int, reading: str
) -> None:
    gate = Gate("keys" if reading == "gen/" else "get", reading, by="holdfast-search")
    vault = tier.open(gate, keep_last=keep_last)
    tier.commit(vault, 20, epoch=1)
    vault.search(tier.told.put)
    assert gate.reached.wait(WITHIN_S)
    for step in (40, 60, 80):
        tier.commit(vault, step, epoch=1)

    gate.opened.set()
    found = tier.answer(CheckpointFound)

    assert (found.step, found.rejected) == (20, ())
    tier.read(found)


def test_what_a_search_found_stays_until_a_later_generation_commits(tier: Tier) -> None:
    vault = tier.open(keep_last=1)
    tier.commit(vault, 20, epoch=1)
    found = tier.search(vault)
    # Shards that were on their way when the search was asked for.
    tier.commit(vault, 40, epoch=1)
    tier.commit(vault, 60, epoch=1)
    tier.read(found)

    # The generation that restores from it; once it commits, all its ranks have their state.
    tier.commit(vault, 30, epoch=2)
    tier.commit(vault, 50, epoch=2)
    assert tier.steps() == [60, 50]


def test_a_controller_that_takes_over_keeps_what_its_predecessor_may_have_found(
    tier: Tier,
) -> None:
    before = tier.open(keep_last=1)
    tier.commit(before, 20, epoch=1)
    cluster = Cluster()
    cluster.start()
    cluster.state.holdings.drop(cluster.state.holdings)
    cluster.lose("node-0")
    cluster.lose("node-1")
    found = tier.search(before)
    assert not [d for d in cluster.tell(found) if isinstance(d, StartGeneration)]

    vault = tier.open(keep_last=1)
    world = AgentWorld(
        cluster.run,
        cluster.state.timeouts,
        clock=cluster.at,
        vault=vault,
        schedule=Schedule(()),
    )
    world.resume(cluster.state, cluster.entries)
    tier.commit(vault, 40, epoch=1)
    tier.read(found)

    tier.commit(vault, 60, epoch=2)
    assert tier.steps() == [60]


def test_a_deletion_that_was_about_to_begin_gives_way_to_a_search(tier: Tier) -> None:
    # It has looked at what there is, and not yet at who reads it.
    gate = Gate("get", "commits/", by="holdfast-tidy")
    vault = tier.open(gate, keep_last=1)
    gate.opened.set()
    tier.commit(vault, 20, epoch=1)
    gate.opened.clear()
    gate.reached.clear()
    vault.begin(Generation(1))
    tier.order(vault, 40, epoch=1)
    tier.answer(CheckpointCommitted)
    assert gate.reached.wait(WITHIN_S)
    tier.damage(40, 1)

    found = tier.search(vault)
    gate.opened.set()
    assert vault.settle(WITHIN_S)

    assert found.step == 20
    tier.read(found)


@pytest.mark.parametrize("sound", [True, False], ids=["the newer is sound", "the newer is not"])
def test_what_is_being_deleted_already_is_not_handed_out(tier: Tier, *, sound: bool) -> None:
    gate = Gate("put", "verdicts/20-1")
    vault = tier.open(gate, keep_last=1)
    tier.commit(vault, 20, epoch=1)
    tier.order(vault, 40, epoch=1)
    tier.answer(CheckpointCommitted)
    assert gate.reached.wait(WITHIN_S)
    if sound:
        assert tier.search(vault).step == 40
        return
    tier.damage(40, 1)

    vault.search(tier.told.put)
    failed = tier.answer(SearchFailed)
    gate.opened.set()
    assert vault.settle(WITHIN_S)

    assert failed.again
    assert "step 20, epoch 1 is just being deleted" in failed.reason
    found = tier.search(vault)
    assert found.step is None
    assert "step 40, epoch 1: " in found.rejected[0]


def test_whatever_is_found_can_be_read_while_commits_and_deletions_go_on(tier: Tier) -> None:
    vault = tier.open(keep_last=1)
    step = 0
    for epoch in range(1, 6):
        vault.begin(Generation(epoch))
        for number in range(5):
            step += 1
            tier.order(vault, step, epoch)
            if number == epoch - 1:
                before = step
                vault.search(tier.told.put)
        answers = [tier.told.get(timeout=WITHIN_S) for _ in range(6)]
        assert vault.settle(WITHIN_S)

        (found,) = [event for event in answers if not isinstance(event, CheckpointCommitted)]
        assert isinstance(found, CheckpointFound), found
        assert found.rejected == ()
        assert found.step is not None
        assert found.step >= before
        tier.read(found)
    tier.commit(vault, step + 1, epoch=6)
    assert tier.steps() == [step + 1]


# Commits ------------------------------------------------------------------------------------------


def test_commits_are_done_in_the_order_in_which_they_are_ordered(tier: Tier) -> None:
    vault = tier.open(keep_last=99)
    for step in range(1, 21):
        tier.order(vault, step, epoch=1)

    assert [tier.answer(CheckpointCommitted).step for _ in range(20)] == list(range(1, 21))
    assert tier.steps() == list(range(20, 0, -1))


def test_a_search_comes_after_the_commits_that_were_ordered_before_it(tier: Tier) -> None:
    gate = Gate("put", "commits/", by="holdfast-commit")
    vault = tier.open(gate)
    tier.order(vault, 20, epoch=1)
    tier.order(vault, 40, epoch=1)
    assert gate.reached.wait(WITHIN_S)

    vault.search(tier.told.put)
    with pytest.raises(queue.Empty):
        tier.told.get(timeout=0.2)
    gate.opened.set()

    assert [tier.answer(CheckpointCommitted).step for _ in range(2)] == [20, 40]
    assert tier.answer(CheckpointFound).step == 40


def test_a_commit_that_was_not_begun_when_a_generation_began_is_refused(tier: Tier) -> None:
    gate = Gate("put", "commits/8999999999999980")
    vault = tier.open(gate)
    tier.order(vault, 20, epoch=1)
    tier.order(vault, 40, epoch=1)
    assert gate.reached.wait(WITHIN_S)
    vault.begin(Generation(2))
    gate.opened.set()

    assert tier.answer(CheckpointCommitted).step == 20
    failed = tier.answer(CommitFailed)

    assert (failed.step, failed.epoch, failed.again) == (40, 1, False)
    assert "newest epoch known is 2" in failed.reason
    assert tier.steps() == [20]


@pytest.mark.parametrize(("step", "again"), [(40, False), (60, True)])
def test_the_last_commit_of_a_run_waits_for_who_refuses_it_and_no_other_does(
    tier: Tier, monkeypatch: pytest.MonkeyPatch, step: int, *, again: bool
) -> None:
    put = LocalStore.put

    def refuse(self: LocalStore, key: str, data: Buffer) -> None:
        if key.startswith(COMMITS):
            raise StorageRefusedError(f"ExpiredToken: {key}")
        put(self, key, data)

    vault = tier.open()
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put", refuse)
        tier.order(vault, step, epoch=1)
        failed = tier.answer(CommitFailed)

    assert (failed.step, failed.again) == (step, again)
    assert "StorageRefusedError: ExpiredToken" in failed.reason
    tier.order(vault, step, epoch=1)
    assert tier.answer(CheckpointCommitted).step == step


def test_a_commit_that_lacks_a_shard_is_answered_as_such_and_leaves_no_record(tier: Tier) -> None:
    vault = tier.open()
    (tier.root / "gen").mkdir(parents=True)
    receipts = tuple(Receipt(shard, LAYOUT.size, "0" * 64) for shard in range(2))
    order = CommitCheckpoint(
        generation=Generation(1), reason="a test", step=Step(20), receipts=receipts, model="m"
    )

    vault.commit(order, tier.told.put)

    failed = tier.answer(CommitFailed)
    assert "shard 0 is not in the store" in failed.reason
    assert not failed.again
    assert tier.steps() == []


# What is left behind ------------------------------------------------------------------------------


def test_what_dead_writers_left_behind_goes_when_a_vault_is_opened_and_after_each_commit(
    tier: Tier,
) -> None:
    before, fresh = tier.leave("0"), tier.leave("1")
    fresh.touch()
    vault = tier.open()
    tier.commit(vault, 20, epoch=1)
    assert not before.exists()

    later = tier.leave("2")
    tier.commit(vault, 40, epoch=1)

    assert not later.exists()
    assert fresh.exists()
