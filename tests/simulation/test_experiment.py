"""Whole runs in virtual time: what befalls them, what the controller makes of it, what it cost."""

from math import isclose
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest

from orchestrator import compose
from orchestrator.core import journal
from orchestrator.core.journal import Entry
from orchestrator.faults.model import Detect, Effect, Notice
from orchestrator.policy.arithmetic import renewal_ettr
from orchestrator.simulation.checkers import Invariants
from orchestrator.simulation.experiment import Inputs, Outcome, conduct, inputs
from orchestrator.simulation.settings import Settings, SettingsError
from orchestrator.simulation.signs import OF_EFFECT, SIGNS, sign_of
from orchestrator.worlds.simulated import profiles
from tests.experiments import BRISK, constant, given
from tests.hashing import printed

ROOT = Path(__file__).parents[2]
MODEL = compose.packaged_model()
SOON = Detect(good="20s", legacy="40s")
FOUND_SOON = msgspec.structs.replace(
    MODEL,
    classes=tuple(
        msgspec.structs.replace(each, detect=SOON, notice=each.notice and Notice(span="60s"))
        for each in MODEL.classes
    ),
)
PROGRAM = """
import xxhash
from orchestrator.core.journal import line
from orchestrator.simulation.experiment import conduct
from tests.experiments import given
digest = xxhash.xxh3_128()
every = {"gpu-fault": 2, "rack-switch": 1, "software-bug": 2, "nccl-watchdog": 1, "link": 1}
conduct(given(every), 7, record=lambda entry: digest.update(line(entry)))
conduct(given(rates=300.0, minutes=20), 7, record=lambda entry: digest.update(line(entry)))
print(digest.hexdigest())
"""
SHOWS: dict[str, set[str]] = {
    "slow-node": {"straggler", "planned"},
    "gpu-fault": {"crash", "node-lost"},
    "hbm-fatal": {"crash", "node-lost"},
    "gpu-sram": {"crash", "node-lost"},
    "gpu-thermal": {"crash", "node-lost"},
    "ssd": {"crash", "node-lost"},
    "gpu-system-processor": {"node-lost", "hang"},
    "nic": {"node-lost", "hang", "broken-collective"},
    "link": {"node-lost", "hang", "broken-collective"},
    "power-supply": {"node-lost"},
    "chassis": {"node-lost"},
    "io-board": {"node-lost"},
    "cpu": {"node-lost"},
    "system-memory": {"node-lost"},
    "host-maintenance": {"planned"},
    "preemption": {"planned"},
    "power-domain": {"node-lost"},
    "rack-switch": {"node-silent", "broken-collective"},
    "fabric": {"broken-collective"},
    "software-bug": {"exception", "unrestorable"},
    "dependency": {"exception", "unrestorable"},
    "nccl-watchdog": {"hang"},
    "sdc-onset": {"exception", "silent-corruption"},
    "sdc-latent": {"exception", "silent-corruption"},
    "planned-operation": {"planned"},
}
RIDES_OVER = {
    "hbm-remap", "sdc-false-alarm", "link-flap", "slow-node-transient",
    "power-smoothing", "congestion", "storage-stall",
}  # fmt: skip


def run(counts: dict[str, int], seed: int = 0, **settings: object) -> Outcome:
    return conduct(given(counts, **settings), seed)


def test_every_class_of_the_model_has_its_sign_and_no_other_has() -> None:
    assert set(SIGNS) == {each.name for each in MODEL.classes}
    assert set(SHOWS) | RIDES_OVER == set(SIGNS)


def test_every_effect_that_a_model_can_name_has_a_sign() -> None:
    assert set(OF_EFFECT) == set(get_args(Effect))


def test_a_class_of_a_users_own_shows_by_its_effect_and_whose_it_is() -> None:
    fan = msgspec.structs.replace(MODEL.class_named("ssd"), name="fan")
    bug = msgspec.structs.replace(MODEL.class_named("software-bug"), name="typo")

    assert (sign_of(fan), sign_of(bug)) == ("vanish", "raise")


@pytest.mark.parametrize("name", sorted(SHOWS))
def test_a_fault_is_seen_in_the_way_of_its_class_and_training_goes_on(name: str) -> None:
    many_spares = 9 if name == "power-domain" else 3

    found = run({name: 1}, 1, spares=many_spares, minutes=12, model=FOUND_SOON, durable_every="1m")

    assert found.by_class == {name: 1}
    assert found.incidents
    assert set(found.incidents) <= SHOWS[name], found.incidents
    assert found.state == "Training"
    assert found.ettr > 0.4
    assert {charge.fault for charge in found.charges if charge.count} == {name}


@pytest.mark.parametrize("name", sorted(RIDES_OVER))
def test_what_the_job_rides_over_leads_to_no_incident(name: str) -> None:
    kind = msgspec.structs.replace(MODEL.class_named(name), fatal=0.0)
    classes = tuple(kind if each.name == name else each for each in MODEL.classes)
    background = {each.name: 0.0 for each in MODEL.classes if each.name != name}
    rates = {"slow-node-transient": 3e4, "hbm-remap": 1e5, "power-smoothing": 3e4}
    model = msgspec.structs.replace(MODEL, classes=classes)

    found = conduct(
        given(model=model, class_rates={**background, name: rates.get(name, 3e3)}, minutes=12), 3
    )

    assert found.by_class.get(name, 0) + found.unseen.get(name, 0) > 0
    # A node that is slow for a while is measured, and may be swapped: that interrupts nothing.
    measured = {"straggler", "planned"} if name == "slow-node-transient" else set()
    assert set(found.incidents) <= measured, found.incidents


def test_slow_steps_cost_throughput_and_leave_effective_time_as_it_was() -> None:
    rates = {each.name: 0.0 for each in MODEL.classes} | {"congestion": 300.0}
    quiet = conduct(given(class_rates={each.name: 0.0 for each in MODEL.classes}), 1)

    found = conduct(given(class_rates=rates), 1)

    assert found.by_class["congestion"] > 0
    assert found.ettr == pytest.approx(quiet.ettr, abs=0.002)
    assert found.throughput < quiet.throughput - 0.02


def test_all_time_is_in_the_ledger_and_all_that_was_lost_is_laid_at_a_door() -> None:
    found = run({"gpu-fault": 3, "software-bug": 3, "fabric": 1}, repair=0.01)

    assert isclose(sum(found.ledger.values()), 30 * 60, rel_tol=1e-9)
    lost = sum(sum(charge.seconds.values()) for charge in found.charges)
    assert isclose(found.ledger["effective"] + lost, 30 * 60, rel_tol=1e-9)
    assert sum(charge.count for charge in found.charges) == sum(found.incidents.values())
    assert found.daily == [pytest.approx(found.ettr)]


def test_faults_that_take_neighbours_along_take_them_at_once() -> None:
    found = run({"rack-switch": 1})

    assert found.spares["away_most"] == 2
    assert found.spares["swaps"] == 2


def test_wrong_numbers_are_undone_once_somebody_knows() -> None:
    silent = tuple(msgspec.structs.replace(each, fatal=0.0) for each in FOUND_SOON.classes)
    model = msgspec.structs.replace(FOUND_SOON, classes=silent)

    found = run({"sdc-onset": 1}, 1, minutes=12, model=model, durable_every="1m")

    assert found.silent_s == pytest.approx(40.0)
    assert found.ledger["lost_work"] >= 40.0
    assert found.incidents == {"silent-corruption": 1}
    assert found.rungs["roll back before the onset"] == 1
    assert found.spares["removals"] == 1


def test_without_the_policy_who_is_suspected_of_wrong_numbers_goes_on_until_it_is_again() -> None:
    silent = tuple(msgspec.structs.replace(each, fatal=0.0) for each in FOUND_SOON.classes)
    model = msgspec.structs.replace(FOUND_SOON, classes=silent)
    first = run({"sdc-onset": 1}, 1, minutes=12, model=model)
    later = run({"sdc-onset": 1}, 1, minutes=12, model=model, off=("quarantine-first",))

    assert (first.incidents, later.incidents) == (
        {"silent-corruption": 1},
        {"silent-corruption": 2},
    )
    assert later.spares["removals"] == 1
    # The second time it is found 40 s after it has its seats again, and starts anew.
    assert later.ledger["lost_work"] > first.ledger["lost_work"] + 20.0
    assert first.ettr > later.ettr


def test_a_node_that_nobody_can_replace_is_waited_for_until_it_is_repaired() -> None:
    found = run({"power-supply": 1}, spares=0, repair=0.02, minutes=60, off=("shrink",))

    assert found.spares["waited_s"] > 10
    assert found.ledger["wait_for_nodes"] == found.spares["waited_s"]


def test_a_node_that_nobody_can_replace_costs_no_more_than_its_replica() -> None:
    waits = run({"power-supply": 1}, spares=0, repair=0.001, minutes=60, off=("shrink",))
    found = run({"power-supply": 1}, spares=0, repair=0.001, minutes=60)

    assert (found.rungs["shrink"], found.rungs["grow back"]) == (1, 1)
    assert found.spares["waited_s"] < 1
    assert 0 < found.ledger["lost_capacity"] < waits.spares["waited_s"]
    assert found.ettr > waits.ettr
    assert found.steps > waits.steps
    # The batch is 16 rounds for each of 8 replicas: 19 for seven.
    (charge,) = [c for c in found.charges if "lost_capacity" in c.seconds]
    assert charge.fault == "power-supply"
    assert np.mean(found.daily) == pytest.approx(found.ettr, abs=1e-6)


def test_hours_of_every_fault_with_one_spare_break_no_invariant_and_replay() -> None:
    experiment = given(rates=150.0, minutes=240, spares=1)
    entries: list[Entry] = []

    found = conduct(experiment, 4, record=entries.append, checkers=[Invariants()])

    assert sum(found.incidents.values()) > 50
    assert found.rungs["shrink"] >= 1
    assert journal.replay(compose.controller(experiment.run_file()), entries) == []


def test_the_same_seed_gives_the_same_journal_whatever_hashes_are() -> None:
    digests = printed(PROGRAM)

    assert len(digests) == 1


def test_another_seed_gives_another_run() -> None:
    same = run({"gpu-fault": 2}, 1), run({"gpu-fault": 2}, 1)
    other = run({"gpu-fault": 2}, 2)

    assert same[0].moments == same[1].moments
    assert other.moments != same[0].moments


def test_a_journal_is_kept_by_whoever_asks_and_replays() -> None:
    experiment = given({"gpu-fault": 1, "nccl-watchdog": 1}, minutes=15)
    entries: list[Entry] = []

    found = conduct(experiment, 4, record=entries.append)

    assert found.events == len(entries)
    controller = compose.controller(experiment.run_file())
    assert journal.replay(controller, entries) == []


def test_without_the_policy_a_node_that_is_to_be_free_is_kept_until_it_is_taken() -> None:
    swapped = run({"planned-operation": 1}, 1, minutes=90)
    kept = run({"planned-operation": 1}, 1, minutes=90, off=("planned-swap",))

    assert swapped.incidents == {"planned": 1}
    assert kept.incidents == {"node-lost": 1}
    assert swapped.ettr > kept.ettr


def test_a_switched_off_detector_finds_nothing() -> None:
    found = run({"nccl-watchdog": 1}, off=("hang",))

    assert found.incidents == {}
    assert found.throughput < 0.95


@pytest.mark.parametrize("name", ["byterobust-like", "llama-like", "torchrun-like"])
def test_a_profile_of_another_system_has_faults_known_when_that_would_know_them(name: str) -> None:
    profile = profiles.packaged(name)
    habits = profile.habits
    assert habits is not None
    gpu_fault = MODEL.class_named("gpu-fault")
    known_s = (habits.detect_s(gpu_fault) or 0.0) + habits.localise_s(gpu_fault)

    found = run({"gpu-fault": 1}, profile=profile, minutes=40)

    assert known_s > 30
    assert found.ledger["detect"] == pytest.approx(known_s, abs=1.5)
    assert found.incidents["node-lost"] == 1


def test_ettr_is_that_of_the_closed_form_where_its_assumptions_hold() -> None:
    # One class, always the same outage, the state at hand, and nobody waits for better times.
    bug = msgspec.structs.replace(
        MODEL.class_named("software-bug"), rollback=0.0, rate="12 per job-hour"
    )
    model = msgspec.structs.replace(MODEL, classes=(bug,))
    p = msgspec.structs.replace(BRISK, step=constant(0.5))
    outage_s = sum(
        each.value for each in (p.exit, p.order, p.stop, p.warm, p.rendezvous, p.load, p.first_step)
    )
    settings = {"gpus": 16, "save_every": "2s", "durable_every": "60m", "off": ("back-off",)}

    found = conduct(given(model=model, profile=p, minutes=150, **settings), 1)

    faults = found.by_class["software-bug"]
    expected = renewal_ettr(
        interval_s=2.0, stall_s=p.stall.value, outage_s=outage_s, mtti_s=150 * 60 / faults
    )
    assert found.rungs == {"start": 1, "restart in place": faults}
    assert faults > 20
    # The closed form knows of no beginning.
    wall_s = sum(found.ledger.values())
    ettr = found.ledger["effective"] / (wall_s - found.ledger["startup"])
    assert ettr == pytest.approx(expected, abs=0.001)


@pytest.mark.parametrize("name", profiles.names())
def test_every_packaged_profile_can_be_run_as_it_is_named(name: str) -> None:
    named = inputs(Settings(gpus=64, days=0.02, profile=name))

    found = conduct(named, 1)

    assert found.state == "Training"
    assert sum(found.ledger.values()) == pytest.approx(0.02 * 86_400)
    assert found.steps > 100


def test_a_false_alarm_costs_a_swap_and_the_way_back_behind_it() -> None:
    asked = Settings(
        gpus=64, days=0.1, spares=8, rates=0, watch="both", false_alarms=0.003, replicas=4
    )

    alarmed = conduct(inputs(asked), 0)
    quiet = conduct(inputs(msgspec.structs.replace(asked, false_alarms=0.0)), 0)

    alarms = alarmed.by_class["false-alarm"]
    assert alarms > 2
    assert alarmed.interruptions["mistaken"] == alarms
    assert alarmed.incidents["silent-corruption"] == alarmed.spares["swaps"] == alarms
    assert alarmed.rungs["roll back before the onset"] == alarms
    assert alarmed.lost_steps >= alarms
    assert "false-alarm" not in quiet.by_class
    assert quiet.interruptions["mistaken"] == 0


@pytest.mark.parametrize(
    "changed", [{"watch": "none"}, {"profile": "byterobust-like"}], ids=["nothing", "unknown"]
)
def test_no_false_alarms_are_asked_of_what_does_not_watch(changed: dict[str, Any]) -> None:
    asked = Settings(**{"gpus": 64, "false_alarms": 1e-4, **changed})

    with pytest.raises(SettingsError, match="nothing watches for corruption"):
        inputs(asked)


@pytest.mark.parametrize("off", [(), ("stop-poison",)])
def test_a_step_that_fails_wherever_it_runs_ends_the_run_or_burns_the_rest(
    off: tuple[str, ...],
) -> None:
    found = conduct(given({}, minutes=20, poison_after="10m", off=off), 0)

    assert 290 < found.steps < 300
    if off:
        assert found.state != "Failed"
        assert found.ledger["over"] == 0
        assert found.ledger["backoff"] + found.ledger["lost_work"] > 300
    else:
        assert found.state == "Failed"
        assert "the fault moves with the job, not with a node" in found.reason
        assert found.ledger["over"] > 500


def test_a_node_that_nobody_can_name_hangs_the_run_until_its_group_has_left() -> None:
    """Of eight nodes one has the loose cable, and what it does comes again at the same place."""
    cable = compose.read_model(ROOT / "deploy" / "examples" / "loose-cable.yaml")
    assert cable.lemons is not None
    model = msgspec.structs.replace(
        cable, lemons=msgspec.structs.replace(cable.lemons, share=1 / 8)
    )
    incidents = {}
    for off in ((), ("over-eviction",)):
        asked = Settings(gpus=64, days=0.1, rates=20, spares=2, off=off)
        found = conduct(Inputs(settings=asked, model=model, record=None, profile=BRISK), 0)
        incidents[off] = found.incidents["broken-collective"]

    assert incidents[()] <= 4
    assert incidents["over-eviction",] > 3 * incidents[()]


@pytest.mark.parametrize(
    ("changed", "spares"),
    [
        ({}, 58),
        ({"days": 1.0}, 40),
        ({"repair": 0.1}, 22),
        ({"class_rates": {"gpu-fault": 0.0}}, 37),
        ({"gpus": 512}, 8),
        ({"gpus": 64, "rates": 1e6}, 8),
        ({"spares": 3}, 3),
    ],
)
def test_by_default_there_are_spares_for_what_takes_several_nodes_at_once(
    changed: dict[str, Any], spares: int
) -> None:
    assert inputs(Settings(**changed)).spares == spares
