"""Whatever is put on record about devices, and whenever: nobody who is barred gets a seat."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core import devices, journal
from orchestrator.core.decisions import JudgeDevice, StartGeneration
from orchestrator.core.events import ControllerStarted, DevicesKnown, DrainCancelled
from orchestrator.core.phases import RunPhase
from orchestrator.core.standing import Act, Standing, fold
from orchestrator.protocol.ids import Generation, NodeId, Serial, Step
from orchestrator.protocol.messages import NodeUnusable, Preflighted, StateDiverged
from tests.fleet import NODES, Fleet, begun

NODE = st.sampled_from(NODES)
SERIAL = st.sampled_from(["m0", "m1", "m2", "m7"])
ACTIONS = st.one_of(
    st.tuples(st.just("train"), st.integers(1, 3)),
    st.tuples(st.just("others"), SERIAL, st.sampled_from(list(Act))),
    st.tuples(st.just("hear")),
    st.tuples(st.just("deaf")),
    st.tuples(st.just("keep")),
    st.tuples(st.just("diverge"), NODE, st.booleans()),
    st.tuples(st.just("break"), NODE),
    st.tuples(st.just("preflight"), NODE, st.sampled_from(["", "wrong", "problem"])),
    st.tuples(st.just("join"), NODE, st.integers(1, 3), st.booleans()),
    st.tuples(st.just("lose"), NODE),
    st.tuples(st.just("uncordon"), NODE),
    st.tuples(st.just("successor")),
)


def act(fleet: Fleet, action: tuple[Any, ...]) -> None:  # noqa: C901, PLR0912 - a table
    state = fleet.state
    match action:
        case ("train", steps) if state.phase is RunPhase.TRAINING:
            fleet.train(steps)
            fleet.hold(state.reached_step)
        case ("others", serial, act_):
            fleet.record(serial, act_)
        case ("hear",):
            fleet.know()
        case ("deaf",):
            fleet.tell(DevicesKnown(at=fleet.at(), problem="it does not answer"))
        case ("keep",):
            fleet.keep(list(state.judging_devices.values()))
        case ("diverge", node, proven):
            fact = StateDiverged(
                generation=state.generation,
                step=state.reached_step,
                since=Step(max(state.reached_step - 1, 0)),
                nodes=(NodeId(node),),
                evidence="digests differ",
                proven=proven,
            )
            fleet.after(0.1).say("node-0", fact)
        case ("break", node):
            fact = NodeUnusable(reason="a memory error", serial=fleet.machines[node])
            fleet.after(0.1).say(node, fact)
        case ("preflight", node, came):
            serials = tuple(sorted(fleet.machines.values()))
            said = {"wrong": "", "problem": ""} | ({came: "x"} if came else {})
            fleet.after(0.1).say(node, Preflighted(serials=serials, compared=1, **said))
        case ("join", node, incarnation, swapped):
            fleet.machines[node] = Serial("m7") if swapped else Serial(f"m{node[-1]}")
            generation = Generation(0 if incarnation > 1 else state.generation)
            fleet.after(0.1).join(node, incarnation=incarnation, generation=generation)
        case ("lose", node):
            fleet.after(0.1).lose(node)
        case ("uncordon", node):
            told = DrainCancelled(at=fleet.after(0.1).at(), nodes=(NodeId(node),), by="ann")
            fleet.tell(told)
        case ("successor",):
            fleet.tell(ControllerStarted(at=fleet.at(), incarnation=state.incarnation + 1))
        case _:
            pass


def settle(fleet: Fleet) -> None:
    """Whatever a run waits for that is no node comes."""
    if fleet.state.phase is RunPhase.SEARCHING:
        fleet.found()
    if fleet.state.phase is RunPhase.BACKING_OFF:
        fleet.rest()
    if not fleet.state.wanting and not fleet.state.phase.final:
        fleet.resume()


@given(st.lists(ACTIONS, max_size=25))
def test_nobody_barred_gets_a_seat_and_every_verdict_is_on_record_once(
    actions: list[tuple[Any, ...]],
) -> None:
    fleet = begun(Fleet())
    for action in actions:
        if fleet.state.phase.final:
            break
        seen, before = len(fleet.decisions), set(fleet.state.seated)
        act(fleet, action)
        settle(fleet)
        for order in fleet.decisions[seen:]:
            if isinstance(order, StartGeneration):
                barred = devices.nodes_in(
                    fleet.state, Standing.QUARANTINED, Standing.RETEST, Standing.RETIRED
                )
                assert not ({*order.seats} - before) & barred

    ids = [verdict.id for verdict in fleet.verdicts]
    assert len(ids) == len(set(ids))
    ordered = {order.id for order in fleet.decisions if isinstance(order, JudgeDevice)}
    kept = {name for name in ids if not name.startswith("x/")}
    assert ordered == kept | fleet.state.judging_devices.keys()
    assert {*fleet.state.devices} <= {*fold(fleet.verdicts)}
    fresh = Fleet()
    data = journal.line(journal.Header(run_id="r", run=fleet.run))
    data += b"".join(journal.line(entry) for entry in fleet.entries)
    assert journal.replay(fresh.controller, journal.read(data).entries) == []
    assert fresh.state.devices == fleet.state.devices
    assert fresh.state.judging_devices == fleet.state.judging_devices
