"""`holdfast bisect`: computes steps of a run once more, and says which one went wrong first."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from orchestrator.campaign import bisecting
from orchestrator.campaign.bisecting import Found, Recorded, Start
from orchestrator.cli import runs, units
from orchestrator.cli.blocks import facts, section
from orchestrator.cli.choices import Form
from orchestrator.cli.errors import CliError, Exit
from orchestrator.cli.stored import Store, name_of, opened, picked, readable
from orchestrator.cli.tables import in_json
from orchestrator.core import journal
from orchestrator.core.incident import rank_words
from orchestrator.protocol.fitting import EMBEDDED
from orchestrator.protocol.ids import Step
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.worlds.folder import RunFolder
from storage.manifest import commit_key
from storage.verdicts import Trust

SEED, OF_SEED = "seed", "the seed"
SAID_EVERY = 100
"""Steps between two words of how far it has come."""


def bisect(run: str | None, since: str | None, *, quiet: bool) -> Found:
    """Compute steps of a run once more from a state that is good; return what came of it.

    Args:
        run: its name or folder; the newest if None.
        since: a checkpoint, or `seed`; the newest that is compute verified if None.
        quiet: say nothing meanwhile.

    Raises:
        CliError: if there is no such run or checkpoint, or nothing to compare with.
        JournalError: if the journal is damaged.
        WorldBrokenError: if the steps can not be computed here.
    """
    folder = runs.folder_of(run)
    read = journal.read(folder.journal.read_bytes())
    described = read.header.run
    told = bisecting.recorded(described, read.entries)
    _require_digests(described, told, folder)
    start = _start(described, folder, since)
    newest = max(told.parts)
    if newest <= start.step:
        raise CliError(
            f"the journal has digests up to step {newest}, and {start.name} is no earlier: "
            f"{folder.journal}",
            "begin with an earlier checkpoint: --from STEP",
            Exit.USAGE,
        )

    def say(step: Step) -> None:
        if not quiet and step % SAID_EVERY == 0:
            sys.stderr.write(f"step {step} of {newest} is computed\n")

    room = Path(tempfile.mkdtemp(prefix="holdfast-bisect-"))
    try:
        return bisecting.bisect(described, told, start, room, say)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def told(found: Found, output: Form) -> str:
    """Return what came of it in the asked form."""
    if output is Form.JSON:
        return in_json(found)
    differs = found.step is not None
    lines = facts(
        [
            ("From", found.start),
            ("Computed", f"steps {found.first} to {found.last}"),
            ("Compared", units.count(found.compared, "step")),
            ("First that differs", f"step {found.step}" if differs else "none"),
            ("Differs in", ", ".join(found.kinds)),
            ("Shards", ", ".join(map(str, found.shards))),
            ("Held by", ", ".join(rank_words(found.ranks))),
        ]
    )
    lines += section("What that says", [found.means] if found.means else [])
    if not differs:
        lines += section("What that says", _of_no_difference(found))
    return units.printable("\n".join(lines))


def _of_no_difference(found: Found) -> list[str]:
    same = "the run came to the same bits"
    if found.start == OF_SEED:
        # Nothing is before that; what was computed again later is on record as it came out last.
        return [f"{same} from its first step on, as far as its journal has digests of them"]
    before = f"{same}; what went wrong before that is in both"
    return [before, f"begin earlier: --from STEP, or --from {SEED}"]


def _require_digests(run: TrainingRun, recorded: Recorded, folder: RunFolder) -> None:
    if run.spec.trainer.entrypoint != EMBEDDED:
        raise CliError(
            f"spec.trainer.entrypoint is {run.spec.trainer.entrypoint}, expected {EMBEDDED}",
            "only steps of the embedded trainer can be computed once more",
            Exit.USAGE,
        )
    if not recorded.parts:
        raise CliError(
            f"there are no digests of whole steps in the journal: {folder.journal}",
            "they come with two replicas and as much of spec.detection.digestShare as it takes to "
            "digest all of the state in each step; 1 surely is",
        )


def _start(run: TrainingRun, folder: RunFolder, since: str | None) -> Start:
    if since == SEED:
        trainer = run.spec.trainer
        if begun := trainer.init_from or trainer.continue_from:
            raise CliError(
                f"the run did not begin from its seed, but from {begun}",
                "begin with its first checkpoint: --from STEP",
                Exit.USAGE,
            )
        return Start(Step(0), OF_SEED)
    store = opened(run.spec.checkpoint.uri or str(folder.checkpoints))
    if since is not None:
        record = picked(store, since)
        readable(store, record)
        name = f"the checkpoint {name_of(record)}"
        return Start(Step(record.step), name, store.uri, commit_key(record.step, record.epoch))
    return _verified(run, store)


def _verified(run: TrainingRun, store: Store) -> Start:
    found, _ = store.catalog.newest_trusted(
        at_least=Trust.COMPUTE_VERIFIED, run_id=run.metadata.name
    )
    if found is None:
        raise CliError(
            f"no checkpoint is compute verified, so none is known to be good: {store.uri}",
            f"say with which to begin: --from STEP, or --from {SEED}",
            Exit.USAGE,
        )
    name = f"the checkpoint {found.step}@{found.epoch}, compute verified"
    return Start(Step(found.step), name, store.uri, commit_key(found.step, found.epoch))
