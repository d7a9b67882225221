"""A node is to be free of a run whose controller is just not there."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.core.events import ControllerStarted, DrainRequested
from tests.runs import Job, steps_job

pytestmark = pytest.mark.process


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Job]:
    options = {"steps": 400, "step_s": 0.02, "save_every": 5, "durable_every": 200}
    lockstep = tmp_path / "lockstep"
    lockstep.mkdir()
    job = steps_job(trainer__steps=400, trainer__options=options | {"lockstep": str(lockstep)})
    made = Job(tmp_path, job)
    yield made
    made.close()


def test_what_is_asked_while_no_controller_lives_is_heeded_by_the_next(one: Job) -> None:
    one.train()
    (controller,) = (pid for pid, what in one.processes() if "-m orchestrator.server " in what)
    os.kill(controller, signal.SIGKILL)

    asked = one.holdfast("drain", "node", "node-1", "--reason", "a test", "--wait", "20s")

    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith("node-1 is free")
    assert one.finish() == 0
    report = one.report()
    assert (report.controllers, report.rungs) == (2, {"start": 1, "planned swap": 1})
    assert [i.kind for i in report.incidents] == ["controller-restart", "planned"]
    events = [entry.event for entry in one.entries()]
    started = [e.at for e in events if isinstance(e, ControllerStarted)]
    (told,) = (e.at for e in events if isinstance(e, DrainRequested))
    assert told > started[1]
    assert list(one.folder.requests.iterdir()) == []
    assert one.leftovers() == []
