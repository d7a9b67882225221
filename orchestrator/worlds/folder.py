"""The folder of a run: where everything that outlives its processes lies."""

from __future__ import annotations

import os
import re
from pathlib import Path

from orchestrator.protocol.steps import EVALUATIONS_FILE, STEPS_FILE

HOME_VARIABLE = "HOLDFAST_HOME"
JOURNAL = "journal"
_LIFE = re.compile(rf"(?P<run>.+)/(?P<life>{JOURNAL}\.\d+)")


class RunFolder:
    """Names of the files of one run. Touches nothing by itself.

    Args:
        root: the folder.
        life: name of the journal of a former life, to look at that one; the present one if empty.
    """

    def __init__(self, root: Path, *, life: str = "") -> None:
        self.root = root.absolute()
        self.journal = self.root / (life or JOURNAL)
        """Every event and decision of this life (core.journal); `former_journals` has others."""
        self.snapshot = self.root / "snapshot"
        """What the controller knew at a line of the journal (server.snapshots)."""
        self.run_file = self.root / "run.json"
        """The run as it was read, `TrainingRun` as JSON."""
        self.plan_file = self.root / "plan.json"
        """The fault plan, if there is one, `FaultPlan` as JSON."""
        self.clock = self.root / "clock.json"
        """When the run's clock began (worlds.clock)."""
        self.token = self.root / "token"
        """Secret of every channel of this run; readable by its owner only."""
        self.metrics_token = self.root / "metrics-token"
        """Secret that lets its holder read the run's metrics, and nothing else (server.metrics)."""
        self.address = self.root / "controller.json"
        """`ControllerAddress` of the controller that lives, or was the last to."""
        self.controller_lock = self.root / "controller.lock"
        """Held (flock) by the one controller of this run for as long as it lives."""
        self.supervisor_lock = self.root / "supervisor.lock"
        """Held (flock) by `holdfast run`."""
        self.stop_request = self.root / "stop-requested"
        """Appears when somebody asks for the run to be stopped; says who."""
        self.requests = self.root / "requests"
        """What operators ask for while the run goes on (worlds.requests)."""
        self.report = self.root / "report.json"
        self.logs = self.root / "logs"
        self.steps = self.logs / STEPS_FILE
        """`StepLine` for each step that was taken, by the embedded trainer."""
        self.evaluations = self.logs / EVALUATIONS_FILE
        """`EvaluationLine` for each evaluation, by the same."""
        self.nodes = self.root / "nodes"
        self.checkpoints = self.root / "checkpoints"
        self.signals = self.root / "signals.yaml"
        """What is different in the table of signals of this run (spec.detection.signals)."""
        self.devices = self.root / "devices"
        """Verdicts about devices, of a run with a fault plan (worlds.devices)."""

    def rank_log(self, rank: int) -> Path:
        """Return the file with what the holders of a rank printed, oldest first."""
        return self.logs / f"rank-{rank:05d}.log"


def former_journals(folder: RunFolder) -> list[Path]:
    """Return the journals of the former lives of a run, the newest first."""
    numbered = [
        (int(path.suffix[1:]), path)
        for path in folder.root.glob(f"{JOURNAL}.*")
        if path.suffix[1:].isdecimal()
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def next_former_journal(folder: RunFolder) -> Path:
    """Return where the journal of a life that has ended goes."""
    newest = next(iter(former_journals(folder)), None)
    number = 0 if newest is None else int(newest.suffix[1:])
    return folder.root / f"{JOURNAL}.{number + 1}"


def home() -> Path:
    """Return the folder that holds the runs of this user: $HOLDFAST_HOME, or ~/.holdfast."""
    return Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".holdfast").absolute()


def elsewhere(name: str) -> Path:
    """Return the link to a run that lies elsewhere while a folder in `home()` has its name.

    No run is named like the link: names have no @.
    """
    return home() / f"{name}@elsewhere"


def find(name: str) -> RunFolder:
    """Return the folder of a run, given its name or the path of its folder.

    With `/journal.N` behind that it is the folder of the run in its N-th life.

    Runs that were started elsewhere (`--out`) have a link in `home()`: by their name, or beside
    a folder of that name; then the link is newer.

    Raises:
        FileNotFoundError: if there is no such run.
    """
    run, life = name, ""
    if former := _LIFE.fullmatch(name):
        run, life = former["run"], former["life"]
    for root in (elsewhere(run), home() / run, Path(run)):
        folder = RunFolder(root.resolve(), life=life)
        if folder.journal.exists():
            return folder
    raise FileNotFoundError(f"no run {name!r} in {home()}, and no folder of a run at {name}")
