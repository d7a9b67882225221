"""Shows how a run gets on: a live display on a terminal, plain lines when piped, or nothing.

Everything shown comes from the state that a follower keeps; the only clock used here limits how
often something is drawn.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, TextIO

from orchestrator.cli import units
from orchestrator.core.incident import Incident
from orchestrator.core.phases import RunPhase
from orchestrator.core.state import RunState

if TYPE_CHECKING:
    from rich.console import Console, Group

DRAW_EVERY_S = 0.2
LINE_EVERY_S = 5.0
INCIDENTS_SHOWN = 5


class Progress(Protocol):
    """Where a run's progress goes."""

    def update(self, state: RunState | None) -> None:
        """Show the state, if it is time to; None while there is no journal."""
        ...

    def say(self, line: str) -> None:
        """Show something that is not in the state."""
        ...

    def close(self, state: RunState | None) -> None:
        """Show the state for the last time, and how the run ended if it did."""
        ...


def progress_on(stream: TextIO, *, quiet: bool = False) -> Progress:
    """Return the progress that suits a stream."""
    if quiet:
        return Quiet()
    if stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return Live(stream)
    return Lines(stream)


class Quiet:
    """Shows nothing."""

    def update(self, state: RunState | None) -> None:
        """Show nothing."""

    def say(self, line: str) -> None:
        """Show nothing."""

    def close(self, state: RunState | None) -> None:
        """Show nothing."""


class Lines:
    """One line per change of state, per incident, and every few seconds."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._phase: RunPhase | None = None
        self._told: dict[str, int] = {}
        self._printed_at = 0.0

    def update(self, state: RunState | None) -> None:
        """Print what is new."""
        if state is None:
            return
        for incident in state.incidents:
            self._tell(state, incident)
        due = time.monotonic() - self._printed_at >= LINE_EVERY_S
        if state.phase is not self._phase or due:
            self._phase = state.phase
            self._print(f"{units.clock(state.now)}  {summary(state)}")

    def say(self, line: str) -> None:
        """Print it."""
        self._print(line)

    def close(self, state: RunState | None) -> None:
        """Print the end."""
        if state is not None:
            self.update(state)
            self._print(ending(state))

    def _tell(self, state: RunState, incident: Incident) -> None:
        """Say each stage of an incident once: detected, decided, over."""
        stage = 1 + (incident.decided_at is not None) + (incident.resumed_at is not None)
        if self._told.get(incident.id, 0) != stage:
            self._told[incident.id] = stage
            self._print(f"{units.clock(state.now)}  {incident_line(incident)}")

    def _print(self, line: str) -> None:
        self._printed_at = time.monotonic()
        with _unheard(self._stream):
            print(units.printable(line), file=self._stream, flush=True)


@contextlib.contextmanager
def _unheard(stream: TextIO) -> Iterator[None]:
    """Go on, silently from then on, when a stream takes nothing any more.

    A reader such as `head` may be gone, a terminal hung up, or the disk with the log full; the run
    is worth more than its narration.
    """
    try:
        yield
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class Live:
    """A display that stays in place on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        # Imported here: half the start-up time of every other command would go into it.
        from rich.console import Console
        from rich.live import Live as Display

        self._stream = stream
        self._console: Console = Console(file=stream)
        self._display = Display(console=self._console, auto_refresh=False, transient=True)
        self._drawn_at = 0.0
        self._open = False

    def update(self, state: RunState | None) -> None:
        """Draw, at most a few times per second."""
        if state is None or time.monotonic() - self._drawn_at < DRAW_EVERY_S:
            return
        self._drawn_at = time.monotonic()
        with _unheard(self._stream):
            if not self._open:
                self._open = True
                self._display.start()
            self._display.update(drawn(state), refresh=True)

    def say(self, line: str) -> None:
        """Print it above the display."""
        with _unheard(self._stream):
            self._console.print(line, markup=False, highlight=False)

    def close(self, state: RunState | None) -> None:
        """Take the display away; leave the last picture and the ending."""
        if self._open:
            self._open = False
            with _unheard(self._stream):
                self._display.stop()
        if state is None:
            return
        with _unheard(self._stream):
            self._console.print(drawn(state))
            self._console.print(ending(state), markup=False, highlight=False)


def summary(state: RunState) -> str:
    """Return state, step, loss, speed and ETTR in one line."""
    text = f"{state.phase!s:<11} {position(state)}"
    if state.reached_step in state.losses:
        text += f"  loss {units.loss(state.losses[state.reached_step])}"
    if state.tokens_per_s:
        text += f"  {units.rate(state.tokens_per_s)} tokens/s"
    return f"{text}  ETTR {units.percent(state.ledger.effective_ratio)}  {generation(state)}"


def position(state: RunState) -> str:
    """Return how far the run has come, in words."""
    return f"step {state.reached_step}/{state.run.spec.trainer.steps}"


def generation(state: RunState) -> str:
    """Return the generation in words."""
    return f"generation {state.generation}" if state.generation else "no generation yet"


def incident_line(incident: Incident) -> str:
    """Return an incident in one line: what, who, and what became of it."""
    text = f"{incident.id}  {incident.kind}"
    if incident.resumed_at is not None:
        text += f"  {incident.suspects()}"
        if incident.rung == "none":
            return f"{text}  {units.first_line(incident.reason)}"
        cost_s = incident.resumed_at - incident.since
        again = f", {units.count(incident.lost_steps, 'step')} again" if incident.lost_steps else ""
        return f"{text}  {incident.rung}: training again after {units.seconds(cost_s)}{again}"
    if incident.decided_at is not None:
        return f"{text}  {units.first_line(incident.reason)}"  # names suspects, evidence and rung
    detected_s = incident.detected_at - incident.since
    evidence = units.first_line(incident.findings[0].evidence)
    return f"{text}  {evidence} (detected after {units.seconds(detected_s)})"


def ending(state: RunState) -> str:
    """Return how the run ended, or where it stands if it has not."""
    wall = units.seconds(state.now)
    if not state.end_state:
        return f"not over: {state.phase} at {position(state)} after {wall}"
    return (
        f"{state.end_state} after {wall}: {units.first_line(state.end_reason)}\n"
        f"{position(state)}  ETTR {units.percent(state.ledger.effective_ratio)}  "
        f"{units.count(sum(state.rungs.values()), 'generation')}  "
        f"{units.count(len(state.incidents), 'incident')}"
    )


def drawn(state: RunState) -> Group:
    """Return the picture of a run for a terminal."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    head = Table.grid(padding=(0, 2), expand=False)
    head.add_row(
        Text(state.run.metadata.name, style="bold"),
        Text(str(state.phase), style=style(state)),
        Text(generation(state), style="dim"),
        Text(units.clock(state.now), style="dim"),
    )
    body = Table.grid(padding=(0, 2), expand=False)
    loss = state.losses.get(state.reached_step) if state.reached_step else None
    body.add_row(
        Text(position(state)),
        ProgressBar(total=state.run.spec.trainer.steps, completed=state.reached_step, width=30),
        Text(f"loss {units.loss(loss)}" if state.reached_step in state.losses else ""),
        Text(f"{units.rate(state.tokens_per_s)} tokens/s" if state.tokens_per_s else ""),
        Text(f"ETTR {units.percent(state.ledger.effective_ratio)}"),
    )
    lines = [
        Text(
            f"  {incident_line(incident)}",
            style="dim" if not incident.open else "yellow",
            overflow="ellipsis",
            no_wrap=True,
        )
        for incident in state.incidents[-INCIDENTS_SHOWN:]
    ]
    return Group(head, body, *lines)


def style(state: RunState) -> str:
    """Return the colour of a phase; the word itself says it all without colour."""
    if state.phase in (RunPhase.TRAINING, RunPhase.FINISHING, RunPhase.SUCCEEDED):
        return "green"
    if state.phase in (RunPhase.FAILED, RunPhase.STOPPED):
        return "red"
    return "yellow"
