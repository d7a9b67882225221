"""A real agent that can not make processes: its trainer is not there, or its node has no room."""

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

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
        ("untrainable:main", "ModuleNotFoundError", True),
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


@contextlib.contextmanager
def in_the_way(path: Path, *, folder: bool) -> Iterator[None]:
    """Have a folder at `path`, or a file, where the agent wants the other."""
    there = path.with_name(path.name + ".away")
    if path.exists():
        path.rename(there)
    path.mkdir() if folder else path.touch()
    yield
    path.rmdir() if folder else path.unlink()
    if there.exists():
        there.rename(path)


@contextlib.contextmanager
def no_descriptors(agent: Agent) -> Iterator[None]:
    limits = resource.prlimit(agent.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(agent.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    yield
    resource.prlimit(agent.pid, resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        (lambda agent: in_the_way(agent.memory / "beacons", folder=False), "NotADirectoryError"),
        (lambda agent: in_the_way(agent.work / "parked.log", folder=True), "IsADirectoryError"),
        (lambda agent: in_the_way(agent.work / "cache", folder=False), "FileExistsError"),
        (no_descriptors, "OSError"),
    ],
    ids=["beacons", "log", "cache", "descriptors"],
)
def test_a_node_that_can_make_no_process_for_a_seat_says_so_and_why(
    controller: Controller,
    start: Start,
    trouble: Callable[[Agent], contextlib.AbstractContextManager[None]],
    kind: str,
) -> None:
    agent = start(ranks=1)
    controller.hear(Joined)
    wait_for(lambda: agent.parked() == 1)
    with trouble(agent):
        controller.begin(1, ["node-0", "node-0"])

        _, fact = controller.hear(RankExited)

    assert (fact.code, fact.kind, fact.misconfigured) == (1, kind, False)
    assert "hint: " in fact.message
    assert kind in fact.traceback
    # What was in the way is not: the next generation begins as if nothing had been.
    controller.begin(2, ["node-0", "node-0"])
    controller.reached("stepped", 2)


def test_processes_that_end_while_they_stand_by_are_not_replaced_over_and_over(
    controller: Controller, start: Start
) -> None:
    agent = start(ranks=1, environment={"STEPS_DIE_PARKED": "1"})
    controller.hear(Joined)

    wait_for(lambda: "next in 4 s" in agent.log.read_text())

    assert agent.log.read_text().count("parked process") == 3
    # For 4 s nobody stands by. Whoever is forked for a seat does not rehearse: it can train.
    controller.begin(1, ["node-0"])
    controller.reached("stepped", 1)
