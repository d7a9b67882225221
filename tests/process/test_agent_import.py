"""A real agent whose trainer can not be imported, or ends before it has a seat."""

from collections.abc import Callable

import pytest

from orchestrator.protocol.messages import Beat, Joined, RankExited
from tests.programs.played import Agent, Controller, wait_for

pytestmark = pytest.mark.process
Start = Callable[..., Agent]


@pytest.mark.parametrize(
    ("entrypoint", "kind", "misconfigured"),
    [
        ("no_such_module:main", "ModuleNotFoundError", True),
        ("steps:no_such_function", "AttributeError", True),
        ("steps:main", "ImportError", False),
    ],
)
def test_a_trainer_that_can_not_be_imported_is_told_as_an_exit_when_ranks_are_wanted(
    controller: Controller, start: Start, entrypoint: str, kind: str, *, misconfigured: bool
) -> None:
    agent = start(
        entrypoint=entrypoint, environment={"STEPS_CAN_NOT_IMPORT": "libgone.so is missing"}
    )
    controller.hear(Joined)
    wait_for(lambda: "nobody stands by" in agent.log.read_text())
    assert not controller.messages(RankExited)

    controller.begin(1, ["node-0", "node-0"])

    _, fact = controller.hear(RankExited)
    assert (fact.rank, fact.code, fact.kind) == (0, 1, kind)
    assert fact.misconfigured is misconfigured
    assert "Traceback" in fact.traceback
    # Tried again for the next generation: what was missing may be there by then.
    controller.begin(2, ["node-0", "node-0"])
    controller.hear(RankExited, where=lambda fact: fact.generation == 2)
    controller.hear(Beat)


def test_processes_that_end_while_they_stand_by_are_not_replaced_over_and_over(
    controller: Controller, start: Start
) -> None:
    agent = start(ranks=1, environment={"STEPS_DIE_PARKED": "1"})
    controller.hear(Joined)

    wait_for(lambda: "next in 2 s" in agent.log.read_text())

    assert agent.log.read_text().count("parked process") == 2
    # Nobody stands by now. Whoever is forked for a seat does not rehearse: training is possible.
    controller.begin(1, ["node-0"])
    controller.reached("stepped", 1)
