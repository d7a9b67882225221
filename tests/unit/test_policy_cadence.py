"""How often a run that chooses for itself saves, and why."""

from collections.abc import Iterator
from math import isclose

import pytest

from orchestrator import compose
from orchestrator.core.decisions import SetCadence, StartGeneration
from orchestrator.core.state import RunState
from orchestrator.document import BadFileError
from orchestrator.faults.cluster import Cluster as Nodes
from orchestrator.faults.expected import expected
from orchestrator.policy import cadence
from orchestrator.policy.arithmetic import DAY_S, daly_interval_s
from orchestrator.protocol.cadence import Cadence
from orchestrator.protocol.ids import Seconds, Step
from orchestrator.protocol.runfile import TrainingRun
from tests import runfiles
from tests.conftest import Cluster

AUTO = {
    "every": "auto",
    "everyMin": "1s",
    "everyMax": "2h",
    "memoryEveryMin": "1s",
    "memoryEveryMax": "1h",
}


def seen(stall_s: float = 0.05, *, step_s: float = 1.0, **checkpoint: str) -> RunState:
    """Return a run that has seen 40 saves in an hour, and no interruption."""
    text = runfiles.text(checkpoint={**AUTO, **checkpoint})
    state = compose.controller(compose.parse(text, TrainingRun, "run.yaml")).state
    state.now = Seconds(3600.0)
    state.experience.since = Seconds(0.0)
    state.experience.saved(40, 40 * stall_s)
    for _ in range(50):
        state.step_times.learn(step_s)
    return state


def chosen(state: RunState) -> Cadence:
    pace = cadence.cadence(state)
    assert pace is not None
    return pace.cadence


@pytest.mark.parametrize("gpus", [8, 2048, 16_384])
def test_interruptions_are_expected_as_the_fault_model_expects_them(gpus: int) -> None:
    model = expected(compose.packaged_model(), Nodes(gpus=gpus, gpus_per_node=8))

    by_policy = cadence.PER_JOB_DAY + gpus / 8 * cadence.PER_NODE_DAY

    assert isclose(by_policy, model.unexpected_per_day, rel_tol=0.01)


def test_memory_is_saved_to_at_dalys_interval() -> None:
    state = seen()
    rate, _ = cadence.rates(state)

    interval_s = daly_interval_s(0.05, 1 / rate)

    assert chosen(state).memory == round(interval_s)
    assert DAY_S > 1 / rate > DAY_S / 2


def test_every_interruption_that_is_seen_has_the_run_save_more_often() -> None:
    def intervals() -> Iterator[int]:
        for interruptions in range(6):
            state = seen()
            state.experience.interruptions = interruptions
            yield chosen(state).memory

    found = list(intervals())

    assert found == sorted(found, reverse=True)
    assert found[5] < found[0] / 5


def test_a_run_without_interruptions_saves_less_and_less_often() -> None:
    young, old = seen(), seen()
    old.now = Seconds(100 * DAY_S)

    assert chosen(old).memory > 5 * chosen(young).memory


def test_the_durable_tier_counts_interruptions_that_memory_does_not_survive() -> None:
    often, never = seen(), seen()
    often.experience.interruptions = never.experience.interruptions = 4
    often.experience.deep = 4

    assert chosen(often).memory == chosen(never).memory
    assert chosen(often).durable < chosen(never).durable / 3


def test_the_durable_interval_is_a_multiple_of_the_other_and_leaves_time_to_write() -> None:
    state = seen()
    state.experience.write_s.extend([3000.0] * 3)

    found = chosen(state)

    assert found.durable % found.memory == 0
    assert found.durable * 1.0 >= 6000.0 - found.memory


def test_a_copy_that_takes_long_holds_saves_to_memory_up() -> None:
    state = seen()
    state.experience.copy_s.append(500.0)

    assert chosen(state).memory == 500


@pytest.mark.parametrize(
    ("bounds", "memory", "durable"),
    [
        ({"memoryEveryMax": "10s", "everyMax": "25s"}, 10, 20),
        ({"memoryEveryMin": "10m", "everyMin": "100m"}, 600, 6000),
        ({"memoryEveryMax": "100ms", "memoryEveryMin": "1ms", "everyMax": "7s"}, 1, 7),
    ],
)
def test_an_interval_stays_within_the_users_bounds_and_says_so(
    bounds: dict[str, str], memory: int, durable: int
) -> None:
    pace = cadence.cadence(seen(**bounds))

    assert pace is not None
    assert pace.cadence == Cadence(memory, durable)
    assert ", at most)" in pace.reason or ", at least)" in pace.reason


def test_an_interval_that_is_nearly_the_best_stays() -> None:
    state = seen()
    best = chosen(state)

    state.cadence = Cadence(round(best.memory * 1.2), round(best.durable / 1.2))
    assert cadence.cadence(state) is None
    state.cadence = Cadence(round(best.memory * 1.3), best.durable)
    assert chosen(state) == best


def test_nothing_is_said_before_enough_was_seen() -> None:
    state = seen()
    state.experience.saves = cadence.SAVES_MIN - 1

    assert cadence.cadence(state) is None


def test_bounds_the_wrong_way_round_are_refused() -> None:
    text = runfiles.text(checkpoint={"every": "auto", "everyMin": "2h", "everyMax": "1h"})

    with pytest.raises(BadFileError, match="everyMin is 2h, expected at most everyMax = 1h"):
        compose.check(compose.parse(text, TrainingRun, "run.yaml"), "run.yaml")


def test_saves_are_counted_that_are_due_in_some_steps() -> None:
    assert Cadence(5, 20).due(1, 20) == 4
    assert Cadence(5, 20).due(6, 9) == 0
    assert Cadence(3, 10).due(9, 12) == 3


# In the controller ------------------------------------------------------------------------------


def trained(**checkpoint: str) -> Cluster:
    """Return a run in which every fifth step of 100 ms was saved, at no cost that was seen."""
    cluster = Cluster(runfiles.text(trainer={"steps": 1000}, checkpoint=checkpoint))
    cluster.start()
    for _ in range(6):
        cluster.train(5)
        cluster.hold(cluster.state.reached_step)
    return cluster


def orders(cluster: Cluster) -> list[SetCadence]:
    return [d for d in cluster.decisions if isinstance(d, SetCadence)]


def test_the_node_of_rank_0_is_told_and_told_again_when_it_comes_back() -> None:
    cluster = trained(**AUTO)
    state = cluster.state
    (order,) = orders(cluster)
    assert (order.node, order.cadence) == (state.seats[0], state.cadence)
    assert state.cadence == Cadence(10, 10)  # at least 1 s, as nothing was seen to cost anything

    for node in dict.fromkeys(state.seats):
        cluster.join(node, generation=1, mark=5)

    assert [d.cadence for d in orders(cluster)] == [order.cadence] * 2
    assert orders(cluster)[1].node == state.seats[0]


def test_the_next_generation_begins_with_it_and_its_nodes_are_told_nothing_twice() -> None:
    cluster = trained(**AUTO)

    cluster.exit(1)
    cluster.go_on()
    cluster.join(cluster.state.seats[0], generation=2, mark=5)

    starts = [d for d in cluster.decisions if isinstance(d, StartGeneration)]
    assert [start.cadence for start in starts] == [None, Cadence(10, 10)]
    assert cluster.state.experience.interruptions == 1
    assert all(d.generation == 1 for d in orders(cluster))


def test_without_the_policy_or_by_default_a_run_saves_as_its_file_says() -> None:
    assert orders(trained()) == []
    off = Cluster(runfiles.text(checkpoint=AUTO, recovery={"disable": ["cadence"]}))
    off.start()
    off.train(30)
    off.hold(30)
    assert orders(off) == []


def test_an_interruption_that_memory_does_not_survive_is_counted_as_one() -> None:
    cluster = trained()
    cluster.lose("node-2")  # a spare: nothing is interrupted
    cluster.lose("node-0")
    cluster.lose("node-1")

    for node in ("node-0", "node-1"):
        cluster.join(node, incarnation=2)
    cluster.found()

    experience = cluster.state.experience
    assert cluster.state.start_step == Step(0)
    assert (experience.interruptions, experience.deep) == (1, 1)
