"""A real controller and a crowd of agents on real connections, as tests/bench/controller has it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cli.controller import ControllerProcess
from orchestrator.cli.errors import CliError
from orchestrator.cli.prepare import prepare
from orchestrator.worlds.folder import HOME_VARIABLE
from tests.bench.controller import run_file
from tests.crowds import side
from tests.runs import REPOSITORY

pytestmark = pytest.mark.process
AGENTS, PROCESSES, STEP_S = 64, 2, 0.2
WITHIN_S = 30.0


def test_a_controller_that_is_killed_loses_no_decision_and_no_agent(tmp_path: Path) -> None:
    """Once while all train, and once when an order has reached some of them and not all."""
    with side(tmp_path, run_file(AGENTS), PROCESSES, STEP_S) as there:
        there.until_training(1, WITHIN_S)

        _, first = there.kill_controller()
        there.until_training(1, WITHIN_S)
        there.until_known(first, WITHIN_S)
        there.crowd.lose_first_rank()
        there.until("some begin anew", lambda now: now.generation == 2, WITHIN_S)
        _, second = there.kill_controller()
        status = there.until_training(2, WITHIN_S)
        there.until_known(second, WITHIN_S)

        assert (status.connected, status.begun) == (AGENTS, AGENTS)
        assert there.problems([first, second]) == []
        assert len(second) > len(first)


def test_what_a_killed_controller_had_on_record_is_missed_if_it_is_not_there(
    tmp_path: Path,
) -> None:
    with side(tmp_path, run_file(4), 1, STEP_S) as there:
        there.until_training(1, WITHIN_S)
        _, before = there.kill_controller()

        assert there.problems([before]) == []
        lost = there.folder.journal.read_bytes()[: -len(before.splitlines(keepends=True)[-1])]
        there.folder.journal.write_bytes(lost)

        assert there.problems([before]) == [
            "journal of controller 1 is not the beginning of what there is now"
        ]


def test_a_limit_of_open_files_below_what_the_agents_need_is_named_with_what_would_be_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = tmp_path / "python"
    shell.write_text(f'#!/bin/sh\nulimit -n 512\nexec {sys.executable} "$@"\n')
    shell.chmod(0o700)

    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.setattr(sys, "executable", str(shell))
    folder, held = prepare(run_file(200), None, tmp_path / "run")
    controller = ControllerProcess(folder, 0, room_within_s=1.0)
    try:
        controller.keep()
        controller.await_end(WITHIN_S)

        with pytest.raises(CliError, match="may not open as many files") as refused:
            controller.keep()
    finally:
        controller.close()
        os.close(held)

    assert "200 nodes needs 656 open files, and the limit is 512; Raise" in refused.value.hint


def test_a_soft_limit_of_open_files_is_raised_to_what_the_agents_need() -> None:
    program = (
        "import resource; from orchestrator.server.__main__ import _make_room_for_agents as make;"
        "from tests.bench.controller import run_file; make(run_file(200));"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    shell = f"ulimit -Hn 1000; ulimit -Sn 256; exec {sys.executable} -c '{program}'"

    found = subprocess.run(
        ["/bin/sh", "-c", shell], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )

    assert int(found.stdout) >= 656
