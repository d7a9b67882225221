"""How far simulated runs are: a bar on a terminal, and nothing where nobody looks."""

import doctest
import io
from pathlib import Path

import pytest

from orchestrator.cli import elapsing, experimenting
from orchestrator.simulation import experiment
from orchestrator.simulation.settings import Settings
from tests.journals import Terminal, holdfast

SMALL = Settings(gpus=16, days=0.005, rates=2000, spares=1)
LATER = Settings(gpus=16, days=0.01, rates=2000, spares=1)


@pytest.fixture(autouse=True)
def xterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


def test_a_run_writes_down_which_moment_it_has_reached_and_those_of_others_stay() -> None:
    board = elapsing.board(3)

    experiment.conduct(experiment.inputs(SMALL), 0, checkers=[elapsing.Writing(board, 1)])

    assert list(board) == pytest.approx([0, SMALL.horizon_s, 0], abs=0.05 * SMALL.horizon_s)
    assert board[1] > 0


def test_a_terminal_sees_the_days_of_one_run() -> None:
    terminal = Terminal()

    experimenting.run(SMALL, [0], jobs=1, progress=terminal)

    assert "0.0 of 0.005 days" in terminal.getvalue()


def test_runs_in_several_processes_share_a_bar_and_lines_stand_above_it() -> None:
    terminal = Terminal()

    experimenting.run(LATER, [0, 1], jobs=2, progress=terminal)

    told = terminal.getvalue()
    assert "0.0 of 0.02 days, 2 of 2 runs" in told
    assert "2 of 2 runs: seed" in told


@pytest.mark.parametrize("kind", ["pipe", "dumb"])
def test_what_is_no_terminal_sees_no_bar(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO() if kind == "pipe" else Terminal()
    if kind == "dumb":
        monkeypatch.setenv("TERM", "dumb")

    experimenting.run(SMALL, [0], jobs=1, progress=stream)

    assert not stream.getvalue()


def test_the_command_on_a_pipe_prints_its_answer_and_nothing_else() -> None:
    result = holdfast("simulate", "--gpus", "16", "--days", "0.005", "-o", "json")

    assert result.exit_code == 0
    assert not result.stderr


def test_a_journal_does_not_depend_on_whether_anybody_looks(tmp_path: Path) -> None:
    given = experiment.inputs(SMALL)

    for name, stream in (("seen", Terminal()), ("unseen", io.StringIO())):
        experimenting.journaled(given, 3, tmp_path / name, progress=stream)

    assert (tmp_path / "seen").read_bytes() == (tmp_path / "unseen").read_bytes()


def test_a_bar_goes_when_what_it_is_about_is_interrupted() -> None:
    terminal = Terminal()

    with pytest.raises(KeyboardInterrupt), elapsing.shown(terminal, [1.0]):
        raise KeyboardInterrupt

    assert terminal.getvalue().endswith("\x1b[2K")


def test_the_examples_of_the_words_are_true() -> None:
    assert doctest.testmod(elapsing).failed == 0
