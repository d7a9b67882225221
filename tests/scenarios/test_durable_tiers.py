"""What a controller makes of a durable tier that holds more, less or other than it should."""

from typing import Any

import pytest

from orchestrator.core import snapshot
from orchestrator.core.decisions import EndRun, SearchCheckpoints, StartGeneration
from orchestrator.core.events import CheckpointCommitted, CheckpointFound, ControllerStarted
from orchestrator.core.incident import Cause
from orchestrator.protocol.cutting import Cut
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.messages import PreparationFailed, RankExited
from orchestrator.protocol.phases import RankPhase
from tests import runfiles
from tests.conftest import Cluster


def found(cluster: Cluster, step: int | None, **more: Any) -> list[Any]:
    epoch = None if step is None else Generation(more.pop("epoch", 1))
    key = "" if step is None else f"commits/{step}-{epoch}"
    event = CheckpointFound(
        at=cluster.at(), step=None if step is None else Step(step), epoch=epoch, key=key, **more
    )
    return list(cluster.tell(event))


def joined(cluster: Cluster) -> Cluster:
    """A new life: nothing is known, and every node is there."""
    cluster.tell(ControllerStarted(at=cluster.at(), incarnation=1))
    for node in ("node-0", "node-1", "node-2"):
        cluster.join(node)
    return cluster


def without_memory(cluster: Cluster, *, seed: bool = True) -> Cluster:
    """A life that committed step 50, trained on to 60, and has nothing but the seed in memory."""
    found(joined(cluster), None)
    cluster.resume()
    if seed:
        cluster.hold(0)
    cluster.train(60)
    cluster.tell(
        CheckpointCommitted(at=cluster.at(), step=Step(50), epoch=Generation(1), key="commits/50-1")
    )
    cluster.after(0.1).exit(1, step=60)
    return cluster


def only(kind: type, decisions: list[Any]) -> Any:
    (decision,) = [d for d in decisions if isinstance(d, EndRun | StartGeneration)]
    assert isinstance(decision, kind)
    return decision


@pytest.mark.parametrize("epoch_seen", [2, 7])
def test_a_new_life_starts_above_the_epoch_of_a_checkpoint_that_was_rejected(
    cluster: Cluster, epoch_seen: int
) -> None:
    rejected = ("step 80, epoch 2: shard 0 is corrupt",)

    order = only(
        StartGeneration,
        found(joined(cluster), 60, rejected=rejected, epoch_seen=Generation(epoch_seen)),
    )

    assert order.generation == epoch_seen + 1
    assert order.restore.step == 60


def test_shards_that_nobody_committed_keep_their_epoch_from_a_run_that_begins_at_the_seed(
    cluster: Cluster,
) -> None:
    order = only(StartGeneration, found(joined(cluster), None, epoch_seen=Generation(1)))

    assert (order.generation, order.restore) == (2, None)


def test_an_epoch_that_appeared_while_the_run_went_on_is_not_used_again(cluster: Cluster) -> None:
    order = only(
        StartGeneration, found(without_memory(cluster), 50, epoch_seen=Generation(4), shards=2)
    )

    assert order.generation == 5


@pytest.mark.parametrize("seed_in_memory", [True, False])
def test_an_empty_tier_is_no_reason_to_begin_at_the_seed_if_a_commit_is_known(
    cluster: Cluster, *, seed_in_memory: bool
) -> None:
    end = only(EndRun, found(without_memory(cluster, seed=seed_in_memory), None))

    assert end.state == "Failed"
    assert "has no checkpoint, and this run committed some, the newest of step 50" in end.reason
    assert "hint: " in end.reason


def test_a_tier_that_lost_all_is_no_reason_to_give_up_what_memory_holds(cluster: Cluster) -> None:
    cluster.start()
    cluster.train(40)
    cluster.hold(40)
    cluster.train(20)
    cluster.tell(
        CheckpointCommitted(at=cluster.at(), step=Step(50), epoch=Generation(1), key="commits/50-1")
    )
    cluster.after(0.1).exit(1, step=60)

    assert only(StartGeneration, found(cluster, None)).restore.step == 40


@pytest.mark.parametrize("shards", [1, 4])
def test_a_checkpoint_that_was_cut_otherwise_ends_the_run_of_a_program_that_knows_one_shard(
    shards: int,
) -> None:
    cluster = Cluster(runfiles.text(trainer={"entrypoint": "mine.train:main"}))

    end = only(EndRun, found(joined(cluster), 60, shards=shards))

    assert end.state == "Failed"
    assert f"step 60 has {shards} shard" in end.reason
    assert "this run has 2" in end.reason
    assert "hint: " in end.reason


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"shards": 1}, "from 1 shard into 2 shards (dpShard 2)"),
        ({"shards": 4, "cut": Cut(tp=4)}, "from 4 shards (tp 4) into 2 shards (dpShard 2)"),
        ({"shards": 2, "cut": Cut(pp=2)}, "from 2 shards (pp 2) into 2 shards (dpShard 2)"),
    ],
    ids=str,
)
def test_the_embedded_trainer_goes_on_from_a_checkpoint_that_was_cut_otherwise(
    cluster: Cluster, said: dict[str, Any], words: str
) -> None:
    order = only(StartGeneration, found(joined(cluster), 60, **said))

    assert (order.restore.step, order.restore.commit) == (60, "commits/60-1")
    assert order.restore.cut_anew == words
    assert (set(order.restore.sources), order.restore.staged_as) == ({""}, ())
    assert order.reason.endswith(f"; cut anew {words}")


def test_what_was_cut_anew_is_in_nobody_s_memory_and_is_cut_anew_again_until_there_is_a_save(
    cluster: Cluster,
) -> None:
    found(joined(cluster), 60, shards=4)
    cluster.resume()
    cluster.train(3)
    cluster.after(0.1).exit(1, step=63)
    assert dict(cluster.state.holdings) == {}

    order = only(StartGeneration, found(cluster, 60, shards=4))

    assert (order.restore.step, order.restore.cut_anew != "") == (60, True)
    assert cluster.state.way == "resume from the durable tier, cut anew"
    (incident,) = cluster.state.incidents
    assert incident.restored_from == "durable tier, cut anew (4 ranks)"
    assert "resume from the durable tier from step 60, 3 steps to do again" in incident.reason
    cluster.resume()
    cluster.train(5)
    cluster.hold(65)
    again = only(StartGeneration, cluster.after(0.1).exit(1, step=65))
    restore = again.restore
    assert (restore.step, restore.commit, restore.cut_anew) == (65, "", "")


def test_a_state_that_came_after_a_corruption_is_passed_over_for_one_that_is_cut_anew(
    cluster: Cluster,
) -> None:
    rejected = ("step 80, epoch 2: quarantined: a bit",)

    order = only(StartGeneration, found(joined(cluster), 60, shards=4, rejected=rejected))

    assert order.restore.cut_anew
    assert "passed over step 80, epoch 2" in order.reason


def read_anew(cluster: Cluster, seconds: float, *, still: tuple[int, ...] = ()) -> list[Any]:
    """Ranks read their state; all but some get on."""
    decisions: list[Any] = []
    phases = dict.fromkeys(range(4), RankPhase.RESTORING)
    until = cluster.now + seconds
    while cluster.now < until and not decisions:
        decisions = cluster.after(1.0).beat(step=60, moving=lambda r: r not in still, phases=phases)
    return decisions


def test_a_state_is_cut_anew_for_as_long_as_every_rank_gets_on_and_who_does_not_is_named(
    cluster: Cluster,
) -> None:
    found(joined(cluster), 60, shards=4)
    for mark in ("cleared", "seated", "formed"):
        cluster.after(0.05).reach(mark)
    limit_s = cluster.state.timeouts.warmup_s

    assert read_anew(cluster, 5 * limit_s) == []
    stopped_at = cluster.now
    assert read_anew(cluster, 2 * limit_s, still=(2,)) != []

    assert limit_s < cluster.now - stopped_at < limit_s + 3
    (incident,) = cluster.state.incidents
    assert (incident.kind, incident.ranks) == ("hang", (2,))
    words = f"1 of 4 ranks that read have read nothing for {cluster.now - stopped_at:.1f} s, limit"
    assert words in incident.findings[0].evidence


def test_a_state_that_no_rank_can_read_is_given_up_once_its_time_is_over(cluster: Cluster) -> None:
    found(joined(cluster), 60, shards=4)
    for mark in ("cleared", "seated", "formed"):
        cluster.after(0.05).reach(mark)
    limit_s, began = cluster.state.timeouts.warmup_s, cluster.now

    assert read_anew(cluster, 2 * limit_s, still=(0, 1, 2, 3)) != []

    assert limit_s < cluster.now - began < limit_s + 3
    (incident,) = cluster.state.incidents
    assert (incident.kind, incident.ranks) == ("hang", ())
    assert "all ranks that read have read nothing for" in incident.findings[0].evidence


REFUSED = "StorageRefusedError: AccessDenied: b/run/gen/00/60-1/s0.st"


def refused(cluster: Cluster, rank: int) -> list[Any]:
    """A rank that cuts its state anew is not let in by the store."""
    fact = RankExited(
        generation=cluster.state.generation,
        rank=Rank(rank),
        pid=1,
        code=1,
        phase=int(RankPhase.RESTORING),
        step=Step(60),
        kind="UnrestorableError",
        message=f"{REFUSED}\nhint: x",
        traceback='  File "storage/remote.py", line 1, in get\n',
        unrestorable=True,
    )
    return list(cluster.after(0.1).say(cluster.state.seats[rank], fact))


def test_a_store_that_refuses_only_ranks_is_a_fault_of_storage_and_not_of_the_job() -> None:
    cluster = Cluster(runfiles.text(recovery={"softwareBudget": 0, "hardwareBudget": 2}))
    found(joined(cluster), 60, shards=4)

    # Two nodes and twice the same at the same step: of a program, that would be its own fault.
    for rank in (0, 2):
        decisions = refused(cluster, rank)
        if rank:
            decisions = cluster.rest()
        assert [type(decision) for decision in decisions] == [SearchCheckpoints]
        assert only(StartGeneration, found(cluster, 60, shards=4)).restore.step == 60

    for rank, incident in zip((0, 2), cluster.state.incidents, strict=True):
        assert (incident.kind, incident.cause) == ("unrestorable", Cause.STORAGE)
        assert incident.findings[0].evidence == (
            f"rank {rank} on {cluster.state.seats[rank]} can not read its state: {REFUSED}, "
            "in restoring after step 60"
        )
    budgets = cluster.state.budgets
    assert {name: budget.spent for name, budget in budgets.items()} == {
        "hardware": 2,
        "software": 0,
        "preemption": 0,
    }


def test_a_checkpoint_that_fits_or_of_which_the_journal_does_not_say_it_is_restored() -> None:
    for said in ({"shards": 2}, {"shards": 2, "cut": Cut(dp_shard=2)}, {}):
        restore = only(StartGeneration, found(joined(Cluster()), 60, **said)).restore
        assert (restore.step, restore.cut_anew) == (60, "")


def test_a_checkpoint_that_can_not_be_brought_to_a_node_is_looked_for_again(
    cluster: Cluster,
) -> None:
    found(joined(cluster), 60, shards=2)
    fact = PreparationFailed(
        generation=cluster.state.generation,
        step=Step(60),
        tier="durable",
        reason="ValueError: shard is 2, must be in 0..1",
    )

    cluster.after(0.1).say(NodeId("node-0"), fact)

    (incident,) = cluster.state.incidents
    assert "shard is 2" in incident.findings[0].evidence


def test_a_state_that_is_cut_anew_is_known_to_a_controller_that_takes_over(
    cluster: Cluster,
) -> None:
    found(joined(cluster), 60, shards=4, cut=Cut(tp=4))
    taken = snapshot.take(cluster.controller)

    later = snapshot.restore(taken, Cluster().controller)

    assert snapshot.take(later) == taken
    assert later.state.way == "start, cut anew, on a new node"
