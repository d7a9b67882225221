"""Single messages that are late, said twice, or lost with their connection."""

from functools import partial

import numpy as np

from orchestrator.protocol.ids import Seconds
from orchestrator.worlds.simulated.agenda import Agenda
from orchestrator.worlds.simulated.wire import Wire

MESSAGES = 300


def carried(*, rate: float, until: float = 1e9, lasts: bool = True) -> list[int | str]:
    """What arrives of messages that are said a second apart, in the order in which it does."""
    agenda = Agenda()
    wire = Wire(agenda, np.random.Generator(np.random.Philox(1)), rate, 5.0, Seconds(until))
    arrived: list[int | str] = []
    sever = partial(arrived.append, "severed")
    for number in range(MESSAGES):
        say = partial(wire.carry, partial(arrived.append, number), lambda: lasts, sever)
        agenda.at(Seconds(float(number)), say)
    while agenda.next_at < 1e9:
        agenda.perform()
    return arrived


def test_without_a_rate_everything_arrives_once_and_in_order() -> None:
    assert carried(rate=0.0) == list(range(MESSAGES))


def test_some_are_overtaken_some_come_twice_and_some_take_their_connection_with_them() -> None:
    arrived = carried(rate=0.5)
    told = [each for each in arrived if isinstance(each, int)]

    assert told != sorted(told)
    assert any(told.count(number) == 2 for number in range(MESSAGES))
    lost = MESSAGES - len(set(told))
    assert 0 < lost == arrived.count("severed")


def test_what_is_on_its_way_when_the_connection_ends_does_not_arrive() -> None:
    arrived = carried(rate=1.0, lasts=False)

    # Only the first of what is said twice: that was there at once.
    assert "severed" not in arrived
    assert 0 < len(arrived) == len(set(arrived)) < MESSAGES


def test_after_its_time_nothing_is_wrong_any_more() -> None:
    arrived = [each for each in carried(rate=1.0, until=100.0) if each in range(150, MESSAGES)]

    assert arrived == list(range(150, MESSAGES))
