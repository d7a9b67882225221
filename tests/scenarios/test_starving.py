"""A rank whose samples do not come shows signs of life, and lets all the others wait for it."""

from collections.abc import Collection

from orchestrator.core.events import Telemetry
from orchestrator.core.incident import Incident
from orchestrator.protocol.phases import RankPhase
from tests.conftest import Cluster

DATA, FORWARD, CHECKPOINT = RankPhase.DATA, RankPhase.FORWARD, RankPhase.CHECKPOINT


def starve(
    cluster: Cluster,
    seconds: float,
    ranks: Collection[int] = (2,),
    *,
    others: RankPhase = FORWARD,
    waiting: bool = True,
) -> list[Incident]:
    """Have ranks say, again and again, that they wait for samples, and all others stand still."""
    before = len(cluster.state.incidents)
    for _ in range(round(seconds / 0.1)):
        cluster.after(0.1)
        cluster.progress += 1
        known = cluster.state.fleet.progress_R
        cluster.tell(
            Telemetry(
                at=cluster.at(),
                generation=cluster.state.generation,
                heard=tuple(sorted(cluster.state.nodes)),
                phases=tuple(int(DATA if r in ranks else others) for r in range(4)),
                steps=(int(cluster.state.reached_step),),
                progress=tuple(cluster.progress if r in ranks else int(known[r]) for r in range(4)),
                states="S",
                cpu_s=(0.0,),
                stall_s=0.0,
                entered=tuple(10 if r in ranks else 11 for r in range(4)),
                left=(10 if waiting else 11,) * 4,
            )
        )
    return cluster.state.incidents[before:]


def trained(cluster: Cluster) -> Cluster:
    cluster.start()
    cluster.train(8)
    cluster.hold(8)
    return cluster


def test_one_rank_whose_samples_do_not_come_is_named_after_ten_seconds(
    cluster: Cluster,
) -> None:
    (found,) = starve(trained(cluster), 12)

    assert found.kind == "hang"
    assert found.ranks == (2,)
    assert 10 < found.detected_at - found.since < 11
    assert "samples do not come" in found.findings[0].evidence
    assert "data after step 8" in found.findings[0].evidence


def test_a_store_that_lets_most_ranks_wait_is_no_hang(cluster: Cluster) -> None:
    assert starve(trained(cluster), 60, ranks=(0, 1, 2)) == []


def test_who_waits_for_samples_is_no_culprit_while_nobody_waits_for_it(cluster: Cluster) -> None:
    """The others stand in no collective: something else holds them up, and is announced."""
    trained(cluster)

    assert starve(cluster, 20, waiting=False) == []
    assert starve(cluster, 20, others=CHECKPOINT) == []


def test_a_disk_that_was_slow_before_may_be_as_slow_again_and_another_one_may_not(
    cluster: Cluster,
) -> None:
    trained(cluster)
    assert starve(cluster, 6) == []
    cluster.train(1)

    assert starve(cluster, 15) == []
    cluster.train(1)
    (found,) = starve(cluster, 12, ranks=(0,))
    assert found.ranks == (0,)


def test_a_rank_that_starved_the_world_once_has_more_time_after_the_restart(
    cluster: Cluster,
) -> None:
    assert len(starve(trained(cluster), 12)) == 1
    cluster.go_on()

    assert starve(cluster, 25) == []
