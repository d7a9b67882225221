"""A real agent whose controller goes away, comes back elsewhere, and has missed something."""

import os
import signal
import time
from collections.abc import Callable

import pytest

from orchestrator.protocol.ids import Generation, Step
from orchestrator.protocol.messages import (
    Beat,
    Joined,
    RankExited,
    RanksFinished,
    Retain,
    ShardsHeld,
)
from tests.programs.played import Agent, Controller, alive, holder, newest, wait_for

pytestmark = pytest.mark.process
Start = Callable[..., Agent]


def train(controller: Controller, **job: object) -> None:
    controller.job.update(job)
    controller.hear(Joined)
    controller.begin(1, ["node-0", "node-0"])
    controller.reached("stepped", 1)


def come_back(controller: Controller) -> float:
    """Have another controller take over; return when."""
    at = time.monotonic()
    controller.start()
    controller.hear(Joined, since=at)
    return at


def test_ranks_train_on_without_a_controller_and_the_next_one_is_told_every_step(
    controller: Controller, start: Start
) -> None:
    agent = start()
    train(controller)
    controller.hear(Beat, where=lambda beat: any(r.step >= 5 for r in beat.reports))
    pids = [agent.rank_pid(rank, 1) for rank in (0, 1)]

    controller.stop()
    last = controller.reports()[-1].step
    controller.steps_known = last - 2
    time.sleep(0.5)
    back = come_back(controller)

    _, joined = controller.hear(Joined, since=back)
    assert (joined.generation, joined.mark, joined.ranks) == (1, 5, (0, 1))
    assert joined.offered == "127.0.0.1:20001"
    controller.hear(Beat, since=back, where=lambda b: any(r.step > last + 60 for r in b.reports))
    steps = [report.step for report in controller.reports(since=back)]
    assert steps == list(range(last - 1, last - 1 + len(steps)))
    assert all(map(alive, pids))


def test_a_death_that_nobody_heard_of_is_told_to_the_next_controller(
    controller: Controller, start: Start
) -> None:
    agent = start()
    train(controller)
    controller.stop()
    os.kill(agent.rank_pid(1, 1), signal.SIGKILL)
    time.sleep(0.1)

    back = come_back(controller)

    _, fact = controller.hear(RankExited, since=back)
    assert (fact.generation, fact.rank, fact.code) == (1, 1, -9)


def test_an_end_that_nobody_heard_of_is_told_to_the_next_controller(
    controller: Controller, start: Start
) -> None:
    start()
    train(controller, steps=50)
    controller.stop()
    time.sleep(0.6)

    back = come_back(controller)

    _, joined = controller.hear(Joined, since=back)
    _, finished = controller.hear(RanksFinished, since=back)
    assert joined.mark == 6
    assert joined.lanes == finished.lanes == ((50, 0), (50, 1))
    at, _ = controller.hear(Beat, since=back, where=lambda b: b.reports[-1:] != ())
    assert at < controller.hear(RanksFinished, since=back)[0]


def test_what_is_held_is_told_again_but_never_ahead_of_the_steps_that_led_to_it(
    controller: Controller, start: Start
) -> None:
    start()
    train(controller, save_every=10)
    for rank in (0, 1):
        controller.hear(ShardsHeld, where=lambda fact, rank=rank: holder(fact, rank, 20))
    controller.send("node-0", Retain(order="r", generation=Generation(1), step=Step(20)))
    controller.hear(ShardsHeld, where=lambda fact: newest(fact) > 30)
    controller.stop()
    controller.steps_known = 20

    back = come_back(controller)

    _, joined = controller.hear(Joined, since=back)
    assert {holding.step for holding in joined.holdings} == {20}
    told, held = controller.hear(ShardsHeld, since=back)
    assert {holding.step for holding in held.holdings} > {20}
    last = newest(held)
    stepped, _ = controller.hear(
        Beat, since=back, where=lambda b: any(r.step >= last for r in b.reports)
    )
    assert stepped < told


def test_an_agent_that_is_back_says_all_that_it_holds_even_if_that_is_nothing(
    controller: Controller, start: Start
) -> None:
    # `Joined` adds to what is known of a node; that something is gone is said by this alone.
    start()
    controller.hear(Joined)
    controller.stop()

    back = come_back(controller)

    controller.hear(Joined, since=back)
    _, held = controller.hear(ShardsHeld, since=back)
    assert held.holdings == ()


def test_every_shard_is_told_after_the_step_that_it_is_of(
    controller: Controller, start: Start
) -> None:
    start()
    train(controller, save_every=4, steps=30)
    controller.hear(RanksFinished)

    known = 0
    for _, _, message in controller.heard:
        if isinstance(message, Beat):
            known = max([known, *(report.step for report in message.reports)])
        if isinstance(message, ShardsHeld):
            # Rank 1 takes no part in collectives here, so it may be ahead of who reports steps.
            assert newest(message, rank=0) <= known


def test_an_agent_waits_for_its_first_controller(controller: Controller, start: Start) -> None:
    controller.stop()
    controller.file.unlink()
    controller.heard.clear()
    agent = start()
    wait_for(lambda: agent.parked() == 2)
    assert "no controller" in agent.log.read_text()

    controller.start()

    controller.hear(Joined)


def test_a_port_that_another_run_has_taken_costs_nothing_once_the_token_was_right(
    controller: Controller, start: Start
) -> None:
    agent = start()
    train(controller)
    controller.stop()
    controller.token = "of another run"  # noqa: S105 - the secret of a test
    controller.start()
    wait_for(lambda: controller.refused)
    controller.stop()
    controller.token = "sesame"  # noqa: S105 - the secret of a test

    come_back(controller)

    assert agent.process.poll() is None
    assert "the token is not the one of its run" in agent.log.read_text()
