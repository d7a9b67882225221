"""What the device ledger is to a run: who is kept out, tested and watched, and for what."""

from collections.abc import Callable

import pytest

from orchestrator.cli.devices import of_node
from orchestrator.core.decisions import Decision, JudgeDevice
from orchestrator.core.devices import PROBATION_STEPS
from orchestrator.core.events import Compared, ControllerStarted, DevicesKnown, DrainCancelled
from orchestrator.core.heritage import left_by
from orchestrator.core.standing import Act, DeviceVerdict, Proof, Standing
from orchestrator.policy.quarantine import standing
from orchestrator.protocol.devices import Device
from orchestrator.protocol.ids import NodeId, Rank, Seconds, Serial, Step
from orchestrator.protocol.messages import NodeUnusable, StateDiverged
from tests import runfiles
from tests.conftest import Cluster
from tests.fleet import NODES, Fleet, answer, begun, preflights, starts


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


@pytest.fixture
def fleet_of() -> Callable[[str], Fleet]:
    return Fleet


def trained(fleet: Fleet) -> Fleet:
    begun(fleet)
    fleet.train(12)
    fleet.hold(10)
    return fleet


def diverge(
    fleet: Fleet, *nodes: str, proven: bool = True, ranks: tuple[int, ...] = ()
) -> list[Decision]:
    fact = StateDiverged(
        generation=fleet.state.generation,
        step=fleet.state.reached_step,
        since=Step(10),
        nodes=tuple(map(NodeId, nodes)),
        ranks=tuple(map(Rank, ranks)),
        evidence="digests differ",
        proven=proven,
    )
    return fleet.after(0.1).tell(Compared(at=fleet.at(), fact=fact))


# Who is kept out ------------------------------------------------------------------------------


@pytest.mark.parametrize("acts", [[Act.CONVICTED], [Act.CONVICTED, Act.RELEASED], [Act.RETIRED]])
def test_a_run_begins_without_the_node_of_a_device_that_is_barred(
    fleet: Fleet, acts: list[Act]
) -> None:
    fleet.record("m1", *acts)

    begun(fleet)

    assert starts(fleet)[-1].seats == ("node-0", "node-0", "node-2", "node-2")
    assert "quarantined, for its machine m1, which is" in standing(fleet.state, NodeId("node-1"))


def test_a_run_that_lacks_the_node_says_where_it_stands_what_is_held_against_it(
    fleet_of: Callable[[str], Fleet],
) -> None:
    nodes = {"count": 2, "ranksPerNode": 2}
    fleet = fleet_of(runfiles.text(nodes=nodes, trainer={"steps": 50}))
    fleet.record("m1", Act.CONVICTED)
    begun(fleet)
    fleet.after(0.1).lose("node-2")

    while not fleet.state.phase.final:
        assert fleet.now < 200
        fleet.after(1).beat(step=0, heard=("node-0", "node-1"))

    assert "quarantined: node-1 (`holdfast get devices`)" in fleet.state.end_reason


def test_a_node_whose_device_is_barred_is_not_waited_for_as_a_spare(fleet: Fleet) -> None:
    fleet.record("m2", Act.CONVICTED)

    begun(fleet)

    assert fleet.now < fleet.state.timeouts.form_s
    assert starts(fleet)[-1].seats == ("node-0", "node-0", "node-1", "node-1")


def test_the_device_is_barred_under_whatever_name_its_node_comes(fleet: Fleet) -> None:
    fleet.record("m1", Act.CONVICTED)
    fleet.machines |= {"node-0": Serial("m1"), "node-1": Serial("m0")}

    begun(fleet)

    assert starts(fleet)[-1].seats == ("node-1", "node-1", "node-2", "node-2")


def test_another_machine_under_the_name_of_one_that_is_barred_is_let_in(fleet: Fleet) -> None:
    fleet.record("m1", Act.CONVICTED)
    begun(fleet)
    assert fleet.state.spares() == ()

    fleet.machines["node-1"] = Serial("m7")
    fleet.after(1).join("node-1", incarnation=2)

    assert fleet.state.spares() == ("node-1",)


def test_an_agent_that_can_not_tell_any_more_who_it_is_does_not_get_in_by_that(
    fleet: Fleet,
) -> None:
    fleet.record("m1", Act.CONVICTED)
    begun(fleet)

    Cluster.join(fleet.after(1), "node-1", incarnation=2)

    assert fleet.state.spares() == ()


def test_a_serial_that_two_nodes_have_bars_neither_and_nothing_is_held_against_it(
    fleet: Fleet,
) -> None:
    fleet.record("m1", Act.CONVICTED)
    fleet.machines["node-2"] = Serial("m1")
    begun(fleet)
    assert not fleet.state.quarantined
    fleet.train(12)
    fleet.hold(10)

    decisions = diverge(fleet, "node-1")

    assert NodeId("node-1") in fleet.state.quarantined, "by its name, for this run"
    assert not [d for d in decisions if isinstance(d, JudgeDevice)]
    told = of_node(fleet.state, fleet.state.nodes[NodeId("node-2")])
    assert told[0].startswith("machine m1: not known, other nodes say that they have it, too")


def test_a_machine_that_comes_back_under_another_name_is_no_other_one(fleet: Fleet) -> None:
    fleet.record("m1", Act.CONVICTED)
    begun(fleet)

    fleet.after(1).lose("node-1")
    fleet.machines["node-3"] = Serial("m1")
    fleet.after(1).join("node-3")

    assert NodeId("node-3") in fleet.state.quarantined
    assert fleet.state.ambiguous == set()


def test_what_a_machine_did_is_not_held_against_the_next_of_its_name(fleet: Fleet) -> None:
    trained(fleet)
    before = fleet.state.generation
    fleet.machines["node-1"] = Serial("m7")
    fleet.after(1).join("node-1", incarnation=2)
    fact = StateDiverged(
        generation=before,
        step=Step(12),
        since=Step(10),
        nodes=(NodeId("node-1"),),
        evidence="digests differ",
        proven=True,
    )

    decisions = fleet.after(0.1).tell(Compared(at=fleet.at(), fact=fact))

    assert not [d for d in decisions if isinstance(d, JudgeDevice)]
    assert not fleet.state.quarantined


def test_suspicion_alone_keeps_nobody_out_and_is_the_last_choice_among_equals(
    fleet: Fleet,
) -> None:
    fleet.verdicts = [
        DeviceVerdict(
            serial=Serial("m0"),
            act=Act.SUSPECTED,
            actor="controller",
            by="x",
            reason="two differ",
            at=0.0,
            id="x",
        )
    ]

    begun(fleet)

    assert starts(fleet)[-1].seats == ("node-1", "node-1", "node-2", "node-2")
    assert fleet.state.spares() == ("node-0",)


def test_a_ledger_that_can_not_be_read_keeps_nobody_out_and_is_reported(fleet: Fleet) -> None:
    fleet.tell(ControllerStarted(at=fleet.at(), incarnation=1))
    fleet.tell(DevicesKnown(at=fleet.at(), problem="the device ledger does not answer"))
    for node in NODES:
        fleet.join(node)

    assert fleet.state.spares() == NODES
    assert fleet.state.devices_problem == "the device ledger does not answer"


def test_what_was_known_stays_known_while_the_ledger_does_not_answer(fleet: Fleet) -> None:
    fleet.record("m1", Act.CONVICTED)
    begun(fleet)

    fleet.tell(DevicesKnown(at=fleet.at(), problem="the device ledger does not answer"))

    assert NodeId("node-1") in fleet.state.quarantined


def test_who_is_known_to_be_barred_stays_out_when_only_part_of_the_ledger_can_be_read(
    fleet: Fleet,
) -> None:
    fleet.record("m1", Act.CONVICTED)
    begun(fleet)
    fleet.verdicts.clear()
    fleet.record("m2", Act.CONVICTED)

    fleet.know("a verdict can not be read")

    assert NodeId("node-1") in fleet.state.quarantined
    assert fleet.state.devices.keys() == {"m1", "m2"}
    fleet.know()
    assert NodeId("node-1") not in fleet.state.quarantined


# What is put on record ------------------------------------------------------------------------


def test_a_proof_puts_the_machine_on_record_and_the_node_is_out_at_once(fleet: Fleet) -> None:
    trained(fleet)

    decisions = diverge(fleet, "node-1")

    (order,) = [d for d in decisions if isinstance(d, JudgeDevice)]
    assert (order.device.serial, order.act, order.proof) == ("m1", Act.CONVICTED, Proof.VOTE)
    assert (order.node, order.incident, order.reason) == ("node-1", "inc-1", "digests differ")
    assert starts(fleet)[-1].seats == ("node-0", "node-0", "node-2", "node-2")
    fleet.keep(decisions)
    assert fleet.where("m1") is Standing.QUARANTINED
    assert fleet.state.judging_devices == {}
    assert NodeId("node-1") in fleet.state.quarantined


def test_what_a_replay_proved_says_so(fleet: Fleet) -> None:
    trained(fleet)
    fact = StateDiverged(
        generation=fleet.state.generation,
        step=Step(12),
        since=Step(10),
        nodes=(NodeId("node-1"),),
        evidence="it came out otherwise",
        proven=True,
    )

    decisions = fleet.say("node-0", fact)

    (order,) = [d for d in decisions if isinstance(d, JudgeDevice)]
    assert order.proof is Proof.REPLAY


def test_the_gpu_of_the_rank_is_convicted_and_the_rest_of_its_node_is_not(fleet: Fleet) -> None:
    fleet.gpus["node-1"] = tuple(
        Device(Serial(f"GPU-{n}"), "gpu", "driver", "H100", n) for n in (0, 1)
    )
    trained(fleet)

    decisions = diverge(fleet, "node-1", ranks=(3,))

    (order,) = [d for d in decisions if isinstance(d, JudgeDevice)]
    assert order.device.serial == "GPU-1"


def test_if_nobody_knows_which_gpu_a_rank_has_it_is_the_machine(fleet: Fleet) -> None:
    fleet.gpus["node-1"] = tuple(
        Device(Serial(f"GPU-{n}"), "gpu", "driver", "H100") for n in (0, 1)
    )
    trained(fleet)

    decisions = diverge(fleet, "node-1", ranks=(3,))

    (order,) = [d for d in decisions if isinstance(d, JudgeDevice)]
    assert order.device.serial == "m1"


def test_two_proofs_of_one_corruption_are_one_conviction(fleet: Fleet) -> None:
    trained(fleet)
    first = diverge(fleet, "node-1")

    fact = StateDiverged(
        generation=fleet.state.generation,
        step=Step(12),
        since=Step(10),
        nodes=(NodeId("node-1"),),
        evidence="a replay says so, too",
        proven=True,
    )
    second = fleet.say("node-0", fact)

    assert len([d for d in [*first, *second] if isinstance(d, JudgeDevice)]) == 1


def test_suspicion_is_put_on_record_as_that_unless_it_points_at_everybody(fleet: Fleet) -> None:
    trained(fleet)

    decisions = diverge(fleet, "node-0", "node-1", proven=False)
    orders = [d for d in decisions if isinstance(d, JudgeDevice)]
    assert [(o.device.serial, o.act) for o in orders] == [
        ("m0", Act.SUSPECTED),
        ("m1", Act.SUSPECTED),
    ]

    fleet = trained(Fleet())
    crowd = diverge(fleet, *NODES, proven=False)
    assert not [d for d in crowd if isinstance(d, JudgeDevice)]


def test_a_hardware_error_convicts_the_device_it_is_of_once_however_often_it_is_said(
    fleet: Fleet,
) -> None:
    trained(fleet)
    fact = NodeUnusable(reason="memory: an error that could not be corrected", serial=Serial("m1"))

    orders = fleet.keep(fleet.after(0.1).say("node-1", fact))
    again = fleet.say("node-1", fact)

    assert [(o.proof, o.reason) for o in orders] == [(Proof.HARDWARE, fact.reason)]
    assert not [d for d in again if isinstance(d, JudgeDevice)]
    fleet.resume()
    fleet.after(5).join("node-1", incarnation=2)
    assert NodeId("node-1") in fleet.state.quarantined, "to be started anew does not clear it"


def test_a_node_that_can_not_be_used_for_another_reason_convicts_nothing(fleet: Fleet) -> None:
    trained(fleet)

    decisions = fleet.say("node-1", NodeUnusable(reason="process 7 survived SIGKILL"))

    assert not [d for d in decisions if isinstance(d, JudgeDevice)]


def test_a_verdict_that_may_be_lost_is_ordered_again_under_its_name(fleet: Fleet) -> None:
    trained(fleet)
    (order,) = [d for d in diverge(fleet, "node-1") if isinstance(d, JudgeDevice)]

    again = fleet.tell(ControllerStarted(at=fleet.at(), incarnation=2))

    assert [d for d in again if isinstance(d, JudgeDevice)] == [order]
    fleet.keep([order])
    third = fleet.tell(ControllerStarted(at=fleet.at(), incarnation=3))
    assert not [d for d in third if isinstance(d, JudgeDevice)]


def test_a_later_life_goes_by_what_was_known_until_it_hears_of_the_ledger_itself(
    fleet: Fleet,
) -> None:
    trained(fleet)
    (order,) = [d for d in diverge(fleet, "node-1") if isinstance(d, JudgeDevice)]
    later = Fleet()
    for event in left_by(fleet.state, Seconds(0.0)):
        later.tell(event)

    decisions = later.tell(ControllerStarted(at=later.at(), incarnation=1))
    later.tell(DevicesKnown(at=later.at(), problem="the device ledger does not answer"))
    for node in NODES:
        later.join(node)

    assert [d for d in decisions if isinstance(d, JudgeDevice)] == [order]
    assert later.state.spares() == ("node-0", "node-2")
    later.record("m1", Act.CONVICTED, Act.RELEASED, Act.PASSED)
    later.keep([order])
    assert later.where("m1") is Standing.RETIRED, "the second conviction within 90 days"


# How a device comes back ----------------------------------------------------------------------


def test_a_released_device_is_tested_where_it_is_and_then_on_probation(fleet: Fleet) -> None:
    fleet.record("m2", Act.CONVICTED, Act.RELEASED)
    begun(fleet)
    (order,) = preflights(fleet)
    assert (order.node, order.serials) == ("node-2", ("m2",))

    fleet.keep(answer(fleet, "node-2"))

    assert fleet.where("m2") is Standing.PROBATION
    assert fleet.state.spares() == ("node-2",)


def test_a_device_that_computes_wrong_when_it_is_tested_is_retired_as_convicted_twice(
    fleet: Fleet,
) -> None:
    fleet.record("m2", Act.CONVICTED, Act.RELEASED)
    begun(fleet)

    (order,) = fleet.keep(answer(fleet, "node-2", wrong="a product came out wrong"))

    assert (order.act, order.proof) == (Act.CONVICTED, Proof.PREFLIGHT)
    assert fleet.where("m2") is Standing.RETIRED
    assert fleet.state.spares() == ()


def test_what_can_not_be_tested_stays_out_and_says_why(fleet: Fleet) -> None:
    fleet.record("m2", Act.CONVICTED, Act.RELEASED)
    begun(fleet)

    answer(fleet, "node-2", compared=0, problem="there is no test for GPUs here")
    fleet.after(10).tick()

    assert fleet.state.spares() == ()
    assert len(preflights(fleet)) == 1
    assert fleet.state.preflights[NodeId("node-2")] == "there is no test for GPUs here"


def test_an_order_to_test_that_may_be_lost_is_given_again_when_the_node_connects(
    fleet: Fleet,
) -> None:
    fleet.record("m2", Act.CONVICTED, Act.RELEASED)
    begun(fleet)

    fleet.after(1).join("node-2")

    assert [order.node for order in preflights(fleet)] == ["node-2", "node-2"]


def test_an_answer_that_is_said_again_changes_nothing(fleet: Fleet) -> None:
    fleet.record("m2", Act.CONVICTED, Act.RELEASED)
    begun(fleet)
    fleet.keep(answer(fleet, "node-2"))

    assert answer(fleet, "node-2") == []


def test_to_uncordon_a_node_releases_its_device_which_is_tested_first(fleet: Fleet) -> None:
    trained(fleet)
    fleet.keep(diverge(fleet, "node-1"))
    fleet.resume()
    fleet.train(1)

    cancelled = DrainCancelled(at=fleet.after(1).at(), nodes=(NodeId("node-1"),), by="ann")
    decisions = fleet.tell(cancelled)
    orders = fleet.keep(decisions)

    assert [(o.act, o.actor, o.by) for o in orders] == [(Act.RELEASED, "operator", "ann")]
    assert fleet.state.spares() == ()
    assert [order.node for order in preflights(fleet)] == ["node-1"]
    fleet.keep(answer(fleet, "node-1"))
    assert fleet.state.spares() == ("node-1",)


def test_a_node_on_probation_begins_only_if_no_other_is_free(fleet: Fleet) -> None:
    fleet.record("m0", Act.CONVICTED, Act.RELEASED, Act.PASSED)

    begun(fleet)
    assert starts(fleet)[-1].seats == ("node-1", "node-1", "node-2", "node-2")
    assert starts(fleet)[-1].watched == ()
    fleet.train(12)
    fleet.hold(10)
    fleet.after(0.1).lose("node-1")

    assert starts(fleet)[-1].seats == ("node-0", "node-0", "node-2", "node-2")
    assert starts(fleet)[-1].watched == ("node-0",), "every step is computed twice from now on"
    assert "node-0 (machine m0 is on probation: passed elsewhere) in place of node-1" in (
        starts(fleet)[-1].reason
    )


def test_a_node_on_probation_gives_its_seats_up_at_the_next_restart_at_which_one_is_free(
    fleet: Fleet,
) -> None:
    fleet.record("m0", Act.CONVICTED, Act.RELEASED, Act.PASSED)
    begun(fleet)
    fleet.train(12)
    fleet.hold(10)
    fleet.after(0.1).lose("node-1")
    fleet.go_on()
    fleet.after(1).join("node-1", incarnation=2)

    fleet.after(0.1).exit(3, step=fleet.state.reached_step)

    assert set(starts(fleet)[-1].seats) == {"node-1", "node-2"}


def test_watched_steps_with_nothing_against_it_clear_a_device(fleet: Fleet) -> None:
    fleet.record("m0", Act.CONVICTED, Act.RELEASED, Act.PASSED)
    fleet.record("m1", Act.CONVICTED)
    begun(fleet)
    fleet.train(PROBATION_STEPS - 1)
    assert not [d for d in fleet.decisions if isinstance(d, JudgeDevice)]

    fleet.train(1)

    (order,) = fleet.keep(fleet.decisions)
    assert (order.device.serial, order.act) == ("m0", Act.CLEARED)
    assert fleet.where("m0") is Standing.HEALTHY
    assert fleet.state.watched == {}


def test_where_nothing_looks_for_wrong_state_no_device_is_cleared(
    fleet_of: Callable[[str], Fleet],
) -> None:
    fleet = fleet_of(
        runfiles.text(trainer={"steps": 5000}, detection={"digestShare": 0.0, "replayShare": 0.0})
    )
    fleet.record("m0", Act.CONVICTED, Act.RELEASED, Act.PASSED)
    fleet.record("m1", Act.CONVICTED)
    begun(fleet)

    fleet.train(PROBATION_STEPS + 1)

    assert not [d for d in fleet.decisions if isinstance(d, JudgeDevice)]


def test_a_device_that_is_retired_while_its_node_trains_gives_its_seats_up_when_that_is_cheap(
    fleet: Fleet,
) -> None:
    trained(fleet)
    fleet.record("m1", Act.RETIRED)

    fleet.know()
    assert len(starts(fleet)) == 1
    fleet.train(1)
    fleet.hold(fleet.state.reached_step)

    assert starts(fleet)[-1].seats == ("node-0", "node-0", "node-2", "node-2")
    (incident,) = fleet.state.incidents
    assert (incident.kind, incident.cause) == ("planned", "planned")
    fleet.go_on()
    fleet.record("m1", Act.RELEASED, Act.PASSED)
    fleet.know()
    assert fleet.state.spares() == ("node-1",), "what kept it out is over"


@pytest.mark.parametrize(("device", "cleared"), [("cpu", ["m0"]), ("auto", []), ("cuda", [])])
def test_steps_count_only_where_replays_are_known_to_look_at_them(
    fleet_of: Callable[[str], Fleet], device: str, cleared: list[str]
) -> None:
    fleet = fleet_of(
        runfiles.text(trainer={"steps": 5000, "device": device}, detection={"digestShare": 0.0})
    )
    fleet.record("m0", Act.CONVICTED, Act.RELEASED, Act.PASSED)
    fleet.record("m1", Act.CONVICTED)
    begun(fleet)

    fleet.train(PROBATION_STEPS)

    orders = [d for d in fleet.decisions if isinstance(d, JudgeDevice)]
    assert [order.device.serial for order in orders] == cleared
