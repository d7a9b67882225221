"""What is known of a campaign, in a file that grows by one line for each result.

The first line says which campaign it is. To write everything again after each result would take
the longer the more there are. A line that is torn, as a full disk or a kill leaves it, never came:
a campaign that is interrupted goes on with the first trial that it lacks.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec

from orchestrator.campaign.baselines import BASELINES
from orchestrator.campaign.catalogue import SELECTABLE, Group
from orchestrator.campaign.judging import Count, Result
from orchestrator.campaign.summary import Clean, Resized
from orchestrator.cli import whole
from orchestrator.cli.errors import CliError, Exit
from orchestrator.protocol.runfile import TrainingRun

Kind = Literal["corruption", "hang", "straggler"]
CORRUPTION: Kind = "corruption"
KINDS: tuple[Kind, ...] = get_args(Kind)
NAME = "campaign.jsonl"
Time = Annotated[float, msgspec.Meta(gt=0)]


class Which(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of which campaign something is known: another one lets other things loose."""

    seed: int
    trials: int
    whole_runs: bool
    classes: tuple[Kind, ...] = (CORRUPTION,)
    groups: tuple[Group, ...] = SELECTABLE
    harm: bool = False
    run: TrainingRun


class Came(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """What came of a piece of work: a line."""

    result: Result | None = None
    alarms: tuple[str, ...] = ()
    """What detectors said of steps without a fault."""
    clean_steps: Count = 0
    """How many of those there were."""
    false_triggers: Count = 0
    calm: bool = False
    """Whether they are of runs without a fault, and not of a twin."""
    pair: tuple[Time, Time] | None = None
    """Seconds with and without detectors."""
    resized: Resized | None = None


class Kept:
    """What is known of a campaign so far.

    Attributes:
        which: campaign it is.
        results: of trials, as they came.
        calm_steps: that were taken of runs without a fault.
        pairs: seconds with and without detectors.
    """

    def __init__(self, which: Which, file: Path) -> None:
        self.which = which
        self._file = file
        self.results: list[Result] = []
        self.calm_steps = 0
        self.pairs: list[tuple[float, float]] = []
        self._alarms: list[str] = []
        self._steps = self._false_triggers = 0
        self._resized: list[Resized] = []

    @property
    def clean(self) -> Clean:
        """What became of steps without a fault."""
        return Clean(self._steps, self._alarms, self._false_triggers, self._resized)

    def add(self, came: Came) -> None:
        """Keep what came of a piece of work, whatever becomes of this process. Raises OSError."""
        with self._file.open("ab") as file:
            # As often as it takes: the system takes as much of a line as a disk has room for.
            file.write(msgspec.json.encode(came) + b"\n")
        self.take(came)

    def take(self, came: Came) -> None:
        """Know what a line says."""
        if came.result is not None:
            self.results.append(came.result)
        if came.pair is not None:
            self.pairs.append(came.pair)
        if came.resized is not None:
            self._resized.append(came.resized)
        self._alarms += came.alarms
        self._steps += came.clean_steps
        self.calm_steps += came.clean_steps if came.calm else 0
        self._false_triggers += came.false_triggers


def kept(folder: Path, which: Which, numbers: Callable[[Which], Collection[int]]) -> Kept:
    """Return what is known of a campaign, which is nothing if its folder has no file of it yet.

    Args:
        folder: of the campaign.
        which: it is.
        numbers: returns those of its trials.

    Raises:
        CliError: if the file is of another one, or damaged.
    """
    file = folder / NAME
    known = Kept(which, file)
    if not file.exists():
        whole.write(file, msgspec.json.encode(which) + b"\n")
        return known
    text, _, torn = file.read_bytes().rpartition(b"\n")
    first, *lines = text.split(b"\n")
    try:
        _require_same(msgspec.json.decode(first, type=Which), which, file)
        for line in lines:
            known.take(msgspec.json.decode(line, type=Came))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _no_results(f"{error}", file) from error
    if not all(map(_adds_up, known.results)):
        raise _no_results("it has a result that can not be", file)
    done = Counter(result.number for result in known.results)
    if done.total() > len(done) or not done.keys() <= set(numbers(which)):
        raise _no_results("it has trials twice, or some that it does not consist of", file)
    if torn:
        os.truncate(file, len(text) + 1)
    return known


def _adds_up(result: Result) -> bool:
    rules = set(result.baselines) in (set(), set(BASELINES))
    return rules and result.rightly <= result.accused


def _require_same(there: Which, asked: Which, file: Path) -> None:
    for name in Which.__struct_fields__:
        if getattr(there, name) != getattr(asked, name):
            raise CliError(
                f"{name} of the campaign that lies there is another one: {file}",
                "choose another --out",
                Exit.USAGE,
            )


def _no_results(why: str, file: Path) -> CliError:
    return CliError(
        f"not the results of a campaign: {why}: {file}",
        "remove it to begin anew, or choose another --out",
        Exit.USAGE,
    )
