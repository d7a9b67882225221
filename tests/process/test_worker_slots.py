"""The memory of a real process that uses the SDK: what it stages, and what it holds mapped."""

import pytest

from orchestrator.protocol.ids import Generation, Step
from orchestrator.protocol.rank import Abandoned, Abort, Died, Finished, Parked, Reached, Staged
from tests.programs.played import slots_of, wait_for
from tests.programs.supervised import Agent

pytestmark = pytest.mark.process


def test_a_staged_shard_outlives_the_rank_that_wrote_it(agent: Agent) -> None:
    agent.seat()
    staged = agent.hear(Staged)
    assert isinstance(staged, Staged)

    agent.rank.kill()
    agent.rank.wait(10)

    slot = agent.folder / f"rank-00000.slot-{staged.slot}"
    assert slot.read_bytes()[:4] == staged.step.to_bytes(4, "little")


def test_saving_is_skipped_and_training_goes_on_while_no_slot_is_free(agent: Agent) -> None:
    agent.seat(steps=100)

    agent.hear(Finished)

    assert sorted(path.name for path in agent.folder.glob("*slot*")) == [
        "rank-00000.slot-0",
        "rank-00000.slot-1",
    ]


def test_saving_is_skipped_and_training_goes_on_where_there_is_no_room(agent: Agent) -> None:
    agent.seat(steps=30, slot_bytes=1 << 60)

    agent.hear(Finished)

    assert agent.rank.poll() is None


def test_a_copy_beside_the_next_step_is_of_the_state_before_its_update(agent: Agent) -> None:
    agent.seat(beside="waits", steps=2)

    for step in (1, 2):
        staged = agent.hear(Staged)
        assert isinstance(staged, Staged)
        assert staged.step == step
        slot = agent.folder / f"rank-00000.slot-{staged.slot}"
        assert slot.read_bytes()[:4] == step.to_bytes(4, "little")
    agent.hear(Finished)
    assert agent.beacon.read().stall_s > 0


def test_a_copy_that_no_update_has_waited_for_is_refused_and_never_handed_over(
    agent: Agent,
) -> None:
    agent.seat(beside="forgets", steps=2)

    died = agent.hear(Died)

    assert isinstance(died, Died)
    assert died.misconfigured
    assert "step 2 is over, and has moved the state of step 1" in died.message
    assert "Worker.await_copied right before each update" in died.message
    assert not [message for message in agent.heard if isinstance(message, Staged)]


def test_a_copy_that_is_late_is_given_up_and_told_and_training_goes_on(agent: Agent) -> None:
    agent.seat(beside="is late", steps=2, save_within_s=0.2)

    said: list[object] = []
    while not said or not isinstance(said[-1], Finished):
        said.append(agent.hear(object))

    abandoned = [message for message in said if isinstance(message, Abandoned)]
    assert abandoned[0].step == 1
    assert "not copied in time" in abandoned[0].reason
    assert 1 not in [message.step for message in said if isinstance(message, Staged)]
    assert said[-1] == Finished(generation=Generation(1), step=Step(2), lanes=(1, 2))


def stage_all(agent: Agent, generation: int = 1, **seat: object) -> None:
    """Have it fill both slots that its seat names."""
    agent.seat(generation, **seat)
    staged = [agent.hear(Staged), agent.hear(Staged)]
    assert {message.generation for message in staged} == {generation}


def test_a_process_that_is_seated_at_another_rank_maps_nothing_of_the_rank_it_was(
    agent: Agent,
) -> None:
    stage_all(agent)
    assert slots_of(agent.rank.pid) == ["rank-00000.slot-0", "rank-00000.slot-1"]

    stage_all(agent, 2, rank=1)

    assert slots_of(agent.rank.pid) == ["rank-00001.slot-0", "rank-00001.slot-1"]


def test_a_process_that_is_seated_at_its_rank_again_maps_what_is_still_there(agent: Agent) -> None:
    stage_all(agent)
    (agent.folder / "rank-00000.slot-0").unlink()

    agent.seat(2, save_every=1_000_000)
    reached = agent.hear(Reached)
    while (reached.mark, reached.generation) != ("formed", 2):
        reached = agent.hear(Reached)

    assert slots_of(agent.rank.pid) == ["rank-00000.slot-1"]


@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_a_parked_process_maps_no_slot_whatever_its_trainer_left_behind(
    agent: Agent, *, in_a_cycle: bool
) -> None:
    stage_all(agent, in_a_cycle=in_a_cycle)

    agent.send(Abort(before=Generation(2)))
    agent.send(Parked())

    wait_for(lambda: slots_of(agent.rank.pid) == [])
    agent.seat(3, steps=3)
    assert agent.hear(Finished).generation == 3
