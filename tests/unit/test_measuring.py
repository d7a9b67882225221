"""What is measured is what there was: times of a simulated cluster are found in its journal."""

import msgspec
import pytest

from orchestrator.core.decisions import StartGeneration
from orchestrator.core.events import Compared, Telemetry
from orchestrator.core.journal import Entry
from orchestrator.measuring import restarts, saves, silent
from orchestrator.measuring.filling import filled, rows
from orchestrator.measuring.orders import order_all_s
from orchestrator.measuring.samples import Samples, Taken
from orchestrator.protocol.ids import Generation, NodeId, Rank, Seconds, Step
from orchestrator.protocol.messages import StateDiverged, StepReport
from orchestrator.worlds.simulated import profiles
from orchestrator.worlds.simulated.profile import CONSTANTS, GPUS, Profile
from tests.runs import steps_job
from tests.simulated import LOCAL, SimulatedJob

KILL = {"when": {"step": 15}, "fault": "kill-rank", "rank": 1}
LOSE = {"when": {"step": 31}, "fault": "lose-node", "node": "node-1"}
DIE = [
    {"when": {"step": 47}, "fault": "kill-agent", "node": "node-0"},
    {"when": {"step": 47}, "fault": "kill-agent", "node": "node-2"},
]
HERE = Taken(median=0.05, least=0.04, most=0.07, samples=9)
SOURCE = "holdfast measure of a test"


def taken(*faults: dict[str, object]) -> dict[str, Taken]:
    job = SimulatedJob(steps_job(trainer__options={"step_s": 0.05}), list(faults))
    code, _ = job.conduct()
    assert code == 0
    samples = saves.take(job.entries(), job.run["spec"]["checkpoint"]["memoryEverySteps"])
    samples.extend(restarts.take(job.entries()))
    return samples.taken()


def test_the_times_of_a_simulated_cluster_are_found_in_its_journal_again() -> None:
    found = taken(KILL, LOSE, *DIE)

    order_s = LOCAL.order.value
    for name in ("seat", "warm", "load", "first_step", "commit", "search", "stall"):
        assert found[name].median == pytest.approx(LOCAL.constants()[name].value, abs=1e-6), name
    for name in ("rendezvous", "stop", "exit", "gone", "fetch", "read"):
        # An order may be on its way first.
        value_s = LOCAL.constants()[name].value
        assert value_s - 1e-6 <= found[name].median <= value_s + order_s + 1e-6, name
    assert found["order"].least == pytest.approx(order_s, abs=1e-6)
    # A step has its part of what saving stalls.
    stall_s = LOCAL.stall.value / 5
    assert 0.05 <= found["step"].median <= 0.05 + stall_s + 1e-6
    reboot_s = LOCAL.reboot.value + LOCAL.warm.value + order_s
    assert found["reboot"].median == pytest.approx(reboot_s, abs=1e-6)


def test_of_a_run_without_faults_only_saves_and_steps_are_measured() -> None:
    assert set(taken()) == {"step", "stall", "copy", "write", "commit", "search"}


def test_a_restart_that_another_one_overtakes_is_not_measured() -> None:
    # Node 0 dies while the generation after the death of rank 1 is on its way.
    found = taken(KILL, {"when": {"step": 15}, "fault": "kill-agent", "node": "node-0"})

    assert found["load"].samples == 1


def test_samples_of_several_runs_are_taken_together() -> None:
    one, other = Samples(), Samples()
    one.add("stop", 1.0)
    other.add_all([("stop", 3.0), ("stop", 2.0), ("seat", -0.1)])
    one.extend(other)

    assert one.taken()["stop"] == Taken(median=2.0, least=1.0, most=3.0, samples=3)
    assert one.taken()["seat"].median == 0.0


# Filling a profile --------------------------------------------------------------------------------


def full(here: Taken = HERE, **others: Taken) -> Profile:
    base = profiles.packaged("measured")
    known = dict.fromkeys(["stop", "exit", "write", "order", "found-freeze-rank"], here) | others
    return filled(base, known, {512: 0.1, GPUS: 2.0}, gpus=4, source=SOURCE)


def test_what_is_measured_takes_the_place_of_what_was_measured_before() -> None:
    profile = full()

    assert (profile.exit.value, profile.exit.samples, profile.exit.source) == (0.05, 9, SOURCE)
    stop = profile.scaled(gpus=4).stop
    assert (stop.value, stop.origin, stop.samples) == (0.05, "measured", 9)


def test_what_is_published_or_assumed_stays_what_it_was() -> None:
    base, profile = profiles.packaged("measured"), full()

    assert profile.write == base.write
    assert profile.stop.value == base.stop.value
    assert profile.rendezvous == base.rendezvous
    assert profile.habits == base.habits


def test_what_no_constant_takes_up_is_told_beside_them() -> None:
    observed = full().observed

    assert set(observed) == {"write", "found-freeze-rank"}
    assert observed["write"].value == 0.05


def test_a_large_job_is_not_taken_to_be_quicker_than_a_small_one_was() -> None:
    profile = full(stop=Taken(median=7.0, least=7.0, most=7.0, samples=1))

    assert profile.stop.value == 7.0
    assert profile.stop.origin == "assumed"
    assert "no less than measured" in profile.stop.source


def test_an_order_takes_its_way_and_the_time_to_word_it_for_every_node() -> None:
    profile = full()

    assert [point.value for point in profile.order.points] == [0.05, 0.15, 2.05]
    assert profile.order.origin == "measured"


def test_a_filled_profile_is_one_that_is_read_again() -> None:
    profile = full(load=Taken(median=0.0, least=0.0, most=0.0, samples=2))

    for json in (True, False):
        assert profiles.parse(profiles.text(profile, json=json), "mine") == profile


def test_filling_twice_is_the_same_as_filling_once() -> None:
    once = full()
    known = dict.fromkeys(["stop", "exit", "write", "order", "found-freeze-rank"], HERE)

    assert filled(once, known, {512: 0.1, GPUS: 2.0}, gpus=4, source=SOURCE) == once


def test_the_table_has_every_constant_and_whatever_else_was_measured() -> None:
    profile = full()
    table = {str(row["name"]): row for row in rows(profile, {"stop": HERE, "found-x": HERE})}

    assert set(table) == {*CONSTANTS.values(), "found-x"}
    assert (table["stop"]["here"], table["stop"]["value"]) == (0.05, 5.0)
    assert table["firstStep"]["samples"] == 0
    assert table["found-x"]["value"] is None


def test_wording_an_order_for_more_nodes_takes_longer() -> None:
    assert 0.0 < order_all_s(64) < order_all_s(4_096)


# Silent corruption --------------------------------------------------------------------------------


def corrupted(**told: object) -> list[Entry]:
    """A journal in which rank 1 of node-1 is wrong from step 18 on, and is found."""
    fact = {
        "generation": 1, "step": 17, "since": 16, "nodes": ("node-1",), "ranks": (1,),
        "evidence": "two digests", "proven": True, **told,
    }  # fmt: skip
    reports = tuple(StepReport(step=Step(n), loss=1.0, grad_norm=1.0, tokens=1, seconds=0.2)
                    for n in (17, 18))  # fmt: skip
    job = SimulatedJob(steps_job(), [])
    job.conduct()
    tick = next(e.event for e in job.entries() if isinstance(e.event, Telemetry))
    tick = msgspec.structs.replace(
        tick, at=Seconds(10.0), generation=Generation(1), reports=reports, since_step_s=0.3
    )
    order = StartGeneration(
        generation=Generation(2), reason="", seats=(NodeId("node-0"), NodeId("node-2")),
        dismiss=(), restore=None, buddies={},
    )  # fmt: skip
    compared = Compared(at=Seconds(10.1), fact=msgspec.convert(fact, StateDiverged))
    return [
        Entry(seq=1, event=tick, decisions=()),
        Entry(seq=2, event=compared, decisions=(order,)),
    ]


def took(entries: list[Entry]) -> dict[str, Taken]:
    node, rank = NodeId("node-1"), Rank(1)
    return silent.take(entries, kind="state", rank=rank, node=node, onset=Step(18)).taken()


def test_a_corruption_counts_looks_up_to_the_one_that_showed_it_and_time_from_there() -> None:
    found = took(corrupted())

    assert found["looks-state"] == Taken(median=1.0, least=1.0, most=1.0, samples=1)
    assert found["tell"].median == pytest.approx(0.4)  # step 18 was done at 9.7


@pytest.mark.parametrize(
    "told", [{"proven": False}, {"nodes": ("node-2",)}, {"nodes": (), "ranks": (0,)}]
)
def test_a_corruption_that_is_laid_at_anothers_door_is_no_measurement(
    told: dict[str, object],
) -> None:
    with pytest.raises(silent.UnnoticedError, match="named alone, as proven"):
        took(corrupted(**told))


def test_a_corruption_that_nobody_notices_is_no_measurement() -> None:
    with pytest.raises(silent.UnnoticedError, match="was not noticed"):
        took(corrupted()[:1])


def test_what_detectors_took_becomes_part_of_a_profile_and_what_was_not_measured_stays() -> None:
    looks = Taken(median=2.0, least=1.0, most=3.0, samples=4)
    habits = full(**{"tell": HERE, "looks-persistent": looks}).habits
    assert habits is not None
    assert habits.silent is not None
    before = profiles.packaged("measured").habits
    assert before is not None
    assert before.silent is not None

    watch = habits.silent
    assert (watch.tell.seconds, watch.tell.origin, watch.tell.samples) == (0.05, "measured", 9)
    assert watch.notices["persistent"].looks.value == 2.0
    assert watch.notices["persistent"].looks.samples == 4
    assert watch.notices["rare"] == before.silent.notices["rare"]
    assert watch.watching == before.silent.watching
