import contextlib
import doctest
import io
import os
import pty
import threading
from pathlib import Path

import pytest

from orchestrator.cli import progress, units
from orchestrator.cli.progress import Lines, Live, Quiet, progress_on
from tests.conftest import Cluster
from tests.journals import Terminal, inject, killed_rank, succeeded


def test_a_terminal_gets_a_display_a_pipe_gets_lines_and_quiet_gets_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(progress_on(Terminal()), Live)
    assert isinstance(progress_on(io.StringIO()), Lines)
    assert isinstance(progress_on(Terminal(), quiet=True), Quiet)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(progress_on(Terminal()), Lines)


def test_there_is_a_line_for_each_change_of_state_and_each_stage_of_an_incident() -> None:
    out = io.StringIO()
    lines = Lines(out)
    cluster = Cluster()

    lines.update(None)
    lines.update(cluster.state)
    cluster.start()
    lines.update(cluster.state)
    cluster.train(5)
    lines.update(cluster.state)
    cluster.hold(5)
    cluster.train(2)
    cluster.exit(1, step=7)
    lines.update(cluster.state)
    lines.update(cluster.state)
    cluster.resume()
    lines.update(cluster.state)

    told = out.getvalue().splitlines()
    assert [line.split()[1] for line in told] == [
        "Gathering",
        "Training",
        "inc-1",
        "Stopping",
        "inc-1",
        "Training",
    ]
    assert "inc-1  crash  rank 1, node-0: rank 1 on node-0 was ended by signal 9" in told[2]
    assert "training again after 250 ms, 2 steps again" in told[4]
    assert "step 5/1000" in told[5]
    assert "loss 2.0000  1k tokens/s  ETTR" in told[5]


def test_a_state_that_lasts_is_told_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    lines = Lines(out)
    state = killed_rank().state
    lines.update(state)
    before = out.getvalue()

    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    lines.update(state)

    assert len(out.getvalue()) > len(before)


def test_the_end_is_told_with_its_reason() -> None:
    out = io.StringIO()

    Lines(out).close(succeeded().state)

    ending = out.getvalue().splitlines()[-2:]
    assert ending[0].startswith("Succeeded after ")
    assert ending[0].endswith("all 20 steps are done and step 20 is committed")
    assert ending[1].startswith("step 20/20  ETTR ")


def test_progress_goes_on_when_its_reader_is_gone() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        lines = Lines(stream)
        lines.update(killed_rank().state)
        lines.close(killed_rank().state)


def test_the_display_goes_on_when_its_terminal_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    cluster = killed_rank()
    for shown_before in (True, False):
        master, slave = pty.openpty()
        with os.fdopen(slave, "w") as stream:
            live = progress_on(stream)
            if shown_before:
                live.update(cluster.state)
            os.close(master)

            live.say("said to nobody")
            monkeypatch.setattr(progress, "DRAW_EVERY_S", 0.0)
            live.update(cluster.state)
            live.close(cluster.state)

            assert Path(f"/proc/self/fd/{stream.fileno()}").readlink() == Path(os.devnull)


def on_terminal(cluster: Cluster) -> str:
    """What the live display writes to a terminal."""
    master, slave = pty.openpty()
    pieces: list[bytes] = []

    def read() -> None:
        # A terminal hands over what there is, and ends with an error when nobody writes any more.
        with contextlib.suppress(OSError):
            while piece := os.read(master, 1 << 16):
                pieces.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w") as stream:
        live = progress_on(stream)
        live.update(cluster.state)
        live.close(cluster.state)
    reader.join(10)
    os.close(master)
    return b"".join(pieces).decode()


def test_the_live_display_shows_what_a_person_wants_to_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    cluster = killed_rank()
    inject(cluster, 1, "lose-node node-1 at step 30", "node-1", "node-1")
    cluster.lose("node-1")

    shown = on_terminal(cluster)

    for part in ("demo", "Stopping", "generation 3", "step 10/1000", "loss 2.0", "ETTR", "inc-2"):
        assert part in shown
    assert "\x1b[33m" in shown


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")

    shown = on_terminal(killed_rank())

    assert "Training" in shown
    assert not [code for code in ("31m", "32m", "33m", "34m", "91m") if code in shown]


def test_the_examples_of_the_units_are_true() -> None:
    assert doctest.testmod(units).failed == 0
    assert Path(units.__file__).name == "units.py"
