"""Shows how many days of how many have been simulated: a bar on a terminal, nothing elsewhere.

Whoever simulates writes down which moment it has reached, a number in memory that all processes
share; a thread of the process that waits for them looks there twice a second. So the rate is
bounded whatever is simulated, and nothing that is simulated can tell whether anybody looks.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator, MutableSequence, Sequence
from typing import TYPE_CHECKING, TextIO

from orchestrator.cli import units
from orchestrator.core.controller import Controller
from orchestrator.core.decisions import Decision
from orchestrator.core.events import Event
from orchestrator.policy.arithmetic import DAY_S

if TYPE_CHECKING:
    from rich.console import RenderableType

DRAWS_PER_S = 2.0
BAR_WIDTH = 30

Board = MutableSequence[float]
"""Which moment each run has reached, virtual seconds: [runs]."""


def board(runs: int) -> Board:
    """Return one that processes can be started with, and write to: at its beginning, all zero."""
    found: Board = multiprocessing.get_context("spawn").RawArray("d", runs)
    return found


class Writing:
    """Writes down which moment a run has reached, at each of its events."""

    def __init__(self, board: Board, run: int) -> None:
        self._board, self._run = board, run

    def __call__(self, controller: Controller, event: Event, decisions: Sequence[Decision]) -> None:
        """Take in an event that was handled."""
        del controller, decisions
        self._board[self._run] = event.at


class Silent:
    """Shows no bar: only what is said, in lines."""

    board: Board | None = None

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def say(self, line: str) -> None:
        """Print a line."""
        self._stream.write(f"{line}\n")
        self._stream.flush()


class Bar:
    """A bar that stays in place below what is said.

    Args:
        stream: the terminal.
        lengths_s: of the runs, virtual seconds.
    """

    def __init__(self, stream: TextIO, lengths_s: Sequence[float]) -> None:
        # Imported here: half the start-up time of every other command would go into it.
        from rich.console import Console
        from rich.live import Live

        self.board: Board = board(len(lengths_s))
        self._lengths_s, self._began_s = lengths_s, time.monotonic()
        self._console = Console(file=stream)
        self._live = Live(
            console=self._console,
            get_renderable=self._picture,
            refresh_per_second=DRAWS_PER_S,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, markup=False, highlight=False)

    @contextlib.contextmanager
    def there(self) -> Iterator[None]:
        """Show the bar until the block ends, however it does."""
        with self._live:
            yield

    def _picture(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        grid = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=sum(self._lengths_s), completed=sum(self.board), width=BAR_WIDTH)
        grid.add_row(bar, words(self.board, self._lengths_s, time.monotonic() - self._began_s))
        return grid


@contextlib.contextmanager
def shown(stream: TextIO, lengths_s: Sequence[float]) -> Iterator[Bar | Silent]:
    """Show how far some runs are, if there is a terminal to show it on, until the block ends.

    Args:
        stream: where.
        lengths_s: of the runs, virtual seconds. None of them: nothing is shown.
    """
    terminal = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    if not (terminal and lengths_s):
        yield Silent(stream)
        return
    bar = Bar(stream, lengths_s)
    with bar.there():
        yield bar


def words(reached_s: Sequence[float], lengths_s: Sequence[float], took_s: float) -> str:
    """Return how many days have been simulated, and how long the others may take.

    Args:
        reached_s: which moment each run has reached, virtual seconds.
        lengths_s: how long each of them is.
        took_s: wall clock, seconds.

    >>> words([0.5 * 86400], [54 * 86400], 1.0)
    '0.5 of 54 days, some 1 min 47 s more'
    >>> words([86400, 43200, 0], [86400] * 3, 60.0)
    '1.5 of 3 days, 1 of 3 runs, some 1 min 00 s more'
    """
    done_s, whole_s = sum(map(min, reached_s, lengths_s)), sum(lengths_s)
    text = f"{done_s / DAY_S:.1f} of {whole_s / DAY_S:g} days"
    if len(lengths_s) > 1:
        runs = sum(a >= b for a, b in zip(reached_s, lengths_s, strict=True))
        text += f", {runs} of {units.count(len(lengths_s), 'run')}"
    if 0 < done_s < whole_s:
        text += f", some {units.seconds(took_s * (whole_s - done_s) / done_s)} more"
    return text
