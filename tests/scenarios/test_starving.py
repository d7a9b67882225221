"""A rank whose samples do not come shows signs of life, and lets all the others wait for it."""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import pytest

from orchestrator.core.events import Telemetry
from orchestrator.core.incident import Incident
from orchestrator.protocol.phases import RankPhase
from tests import runfiles
from tests.conftest import Cluster

DATA, FORWARD, CHECKPOINT = RankPhase.DATA, RankPhase.FORWARD, RankPhase.CHECKPOINT
LIMITS_S = {"3s": 8.1, "10s": 6.0}
"""For how long others wait at a `detectWithin`: of 10 s, three beats and one second are used up."""
STEP_S = 0.4
READ_S = 0.5
"""For which a step waits for samples that are read beside it (`trainer.readings.WITHIN_S`)."""
READER = 2


def starve(
    cluster: Cluster,
    seconds: float,
    ranks: Collection[int] = (READER,),
    *,
    others: RankPhase = FORWARD,
    waiting: bool = True,
    alive: bool = True,
) -> list[Incident]:
    """Have ranks say, again and again, that they wait for samples, and all others stand still."""
    before = len(cluster.state.incidents)
    for look in range(round(seconds / 0.1)):
        cluster.after(0.1)
        tell(cluster, ranks, others=others, waiting=waiting, alive=alive or not look)
    return cluster.state.incidents[before:]


def tell(
    cluster: Cluster,
    ranks: Collection[int],
    *,
    others: RankPhase = FORWARD,
    waiting: bool = True,
    alive: bool = True,
) -> None:
    cluster.progress += alive
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


def trained(cluster: Cluster, *, seconds: float = 0.1) -> Cluster:
    cluster.start()
    for step in range(1, 9):
        cluster.after(seconds).beat(step=step, report=True, seconds=seconds)
    cluster.hold(8)
    return cluster


def within(detect_within: str) -> Cluster:
    return Cluster(runfiles.text(detection={"detectWithin": detect_within}))


@pytest.mark.parametrize(("detect_within", "limit_s"), LIMITS_S.items())
def test_one_rank_whose_samples_do_not_come_is_named(detect_within: str, limit_s: float) -> None:
    (found,) = starve(trained(within(detect_within)), limit_s + 1)

    assert found.kind == "hang"
    assert found.ranks == (READER,)
    assert limit_s < found.detected_at - found.since < limit_s + 0.2
    assert "samples do not come" in found.findings[0].evidence
    assert "data after step 8" in found.findings[0].evidence


@pytest.mark.parametrize(("detect_within", "limit_s"), LIMITS_S.items())
def test_a_source_that_takes_less_than_that_again_and_again_is_no_hang(
    detect_within: str, limit_s: float
) -> None:
    cluster = trained(within(detect_within))
    for _ in range(5):
        assert starve(cluster, limit_s - 0.2) == []
        cluster.train(1)


def test_samples_are_waited_for_as_long_however_long_steps_take(cluster: Cluster) -> None:
    assert len(starve(trained(cluster, seconds=20.0), LIMITS_S["10s"] + 1)) == 1


def test_a_rank_that_shows_no_sign_of_life_may_compute_for_as_long_as_a_step(
    cluster: Cluster,
) -> None:
    """It said that it takes samples, and has not said anything since."""
    trained(cluster, seconds=20.0)

    assert starve(cluster, 45, alive=False) == []
    assert len(starve(cluster, 5, alive=False)) == 1


def test_before_the_first_steps_samples_may_take_as_long_as_anything(cluster: Cluster) -> None:
    cluster.start()
    cluster.train(2)

    assert starve(cluster, 60) == []


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
    assert starve(cluster, 5) == []
    cluster.train(1)

    assert starve(cluster, 14) == []
    cluster.train(1)
    (found,) = starve(cluster, 12, ranks=(0,))
    assert found.ranks == (0,)


def test_a_rank_that_starved_the_world_once_has_more_time_after_the_restart(
    cluster: Cluster,
) -> None:
    assert len(starve(trained(cluster), 7)) == 1
    cluster.go_on()

    assert starve(cluster, 17) == []


def test_a_rank_whose_samples_never_come_is_found_within_what_anything_may_take() -> None:
    stays = {"disable": ["over-eviction"]}
    cluster = trained(Cluster(runfiles.text(detection={"warmupLimit": "30s"}, recovery=stays)))
    waited_s = []
    for _ in range(4):
        while not (incidents := starve(cluster, 0.1)):
            assert cluster.now < 1000.0
        (found,) = incidents
        assert found.ranks == (READER,)
        waited_s.append(found.detected_at - found.since)
        last = found.findings[0].evidence
        cluster.go_on()

    assert waited_s == pytest.approx([6.1, 18.4, 30.1, 30.1], abs=0.2)
    assert "before, and no more than warmup_s, 30 s" in last


class Stall(NamedTuple):
    """A source that stops just when a step begins, seconds on the clock of the cluster.

    The rank computes the first of two micro-batches then and has three more: two steps come to
    their end, of which the second waits for what is read beside it, and others go on to the end of
    a third.
    """

    at: float
    lasts_s: float = 60.0

    def wait(self, now: float) -> int:
        """Return in which wait for samples of the rank all others are, 0 if in none."""
        read_at = self.at + 2 * STEP_S
        missed_at = read_at + READ_S + STEP_S
        if read_at <= now < read_at + READ_S:
            return 1
        return 2 if missed_at <= now < self.at + self.lasts_s else 0


def look_at(cluster: Cluster, stall: Stall, rng: np.random.Generator) -> list[Incident]:
    """Let time pass until a source goes on, or is found not to.

    Args:
        cluster: its controller looks once in a beat, at what agents have told within the last one.
        stall: of the source.
        rng: draws how old that is.
    """
    before, wait, seen = len(cluster.state.incidents), 0, cluster.now
    while seen < stall.at + stall.lasts_s:
        cluster.after(cluster.state.timeouts.tick_s)
        seen = cluster.now - rng.uniform(0.0, cluster.state.timeouts.beat_s)
        last, wait = wait, stall.wait(seen)
        if wait != last or not wait:
            cluster.beat(step=cluster.state.reached_step)  # all have moved
        if wait:
            tell(cluster, (READER,))
        if found := cluster.state.incidents[before:]:
            return found
    return []


@pytest.mark.parametrize(("detect_within", "limit_s"), LIMITS_S.items())
def test_a_source_that_stops_is_found_within_three_steps_and_ten_seconds(
    detect_within: str, limit_s: float
) -> None:
    rng = np.random.default_rng(6)
    took_s = []
    for _ in range(50):
        cluster = trained(within(detect_within), seconds=STEP_S)
        beat_s = cluster.state.timeouts.beat_s
        stall = Stall(cluster.now + rng.uniform(0, beat_s))
        (found,) = look_at(cluster, stall, rng)
        assert found.ranks == (READER,)
        took_s.append(found.detected_at - stall.at)

    assert max(took_s) <= 3 * STEP_S + 10.0
    assert min(took_s) > limit_s


@pytest.mark.parametrize(("detect_within", "limit_s"), LIMITS_S.items())
def test_a_source_that_pauses_for_a_beat_less_than_the_limit_is_never_a_hang(
    detect_within: str, limit_s: float
) -> None:
    rng = np.random.default_rng(7)
    for _ in range(50):
        cluster = trained(within(detect_within), seconds=STEP_S)
        beat_s = cluster.state.timeouts.beat_s
        pause_s = 3 * STEP_S + READ_S + limit_s - beat_s
        stall = Stall(cluster.now + rng.uniform(0, beat_s), pause_s)

        assert look_at(cluster, stall, rng) == []
