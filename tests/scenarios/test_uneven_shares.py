"""Who hangs in a world in which some replicas compute more, and enter more collectives for good."""

from typing import Any

from orchestrator.core.events import Telemetry
from orchestrator.detect import awaited
from orchestrator.protocol.phases import RankPhase
from tests.replicas import Wide


def wait(cluster: Any, *entered: int) -> None:
    """Have every rank wait in the collective that it entered last."""
    cluster.after(0.1)
    cluster.tell(
        Telemetry(
            at=cluster.at(), generation=cluster.state.generation,
            heard=tuple(sorted(cluster.state.nodes)), phases=(int(RankPhase.FORWARD),), steps=(5,),
            progress=(cluster.progress,), states="S", cpu_s=(0.0,), stall_s=0.0, entered=entered,
            left=tuple(count - 1 for count in entered),
        )
    )  # fmt: skip


def test_who_takes_less_of_a_batch_is_not_who_never_entered_what_the_others_wait_in(
    wide: Wide,
) -> None:
    cluster = wide(9, 1)  # of 240 samples some take 27, and three 26

    wait(cluster, 26, 27, 27, 26, 27, 27, 26, 27, 27)

    assert awaited.culprits(cluster.state) == ()


def test_who_never_entered_what_its_own_replica_waits_in_is_named_in_an_uneven_world(
    wide: Wide,
) -> None:
    cluster = wide(9, 2)  # of 120 rounds some take 14, and six 13

    wait(cluster, *(14,) * 7, 13, *(14,) * 2, *(13,) * 8)

    assert awaited.culprits(cluster.state) == (7,)


def test_where_all_take_the_same_who_entered_fewer_than_any_is_named(wide: Wide) -> None:
    cluster = wide(8, 1)

    wait(cluster, *(30,) * 5, 29, 30, 30)

    assert awaited.culprits(cluster.state) == (5,)
