"""Journals of scripted runs in run folders, and the command line called in this process."""

import io
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from orchestrator import compose
from orchestrator.cli.commands import app
from orchestrator.core import journal
from orchestrator.core.decisions import CommitCheckpoint, Decision
from orchestrator.core.events import CheckpointCommitted, FaultInjected, Telemetry
from orchestrator.protocol.ids import Generation, NodeId, Seconds, Step
from orchestrator.protocol.messages import RanksFinished, Receipt, ShardsWritten
from orchestrator.server.counts import Counts
from orchestrator.server.journal import JournalFile
from orchestrator.server.snapshots import Snapshots
from orchestrator.worlds.folder import RunFolder
from orchestrator.worlds.told import Told
from tests import runfiles
from tests.conftest import Cluster

SHORT = runfiles.text("short", trainer={"steps": 20})


class Terminal(io.StringIO):
    """Text that is taken for a terminal."""

    def isatty(self) -> bool:
        return True


def text(cluster: Cluster, run_id: str = "r") -> bytes:
    """The journal of what a cluster went through."""
    header = journal.Header(run_id=run_id, run=cluster.run)
    return journal.line(header) + b"".join(map(journal.line, cluster.entries))


def unheard(at: float = 1.0, generation: int = 1, **more: Any) -> Telemetry:
    """Telemetry of one rank, of which nothing was heard; and what is given."""
    return Telemetry(
        at=Seconds(at),
        generation=Generation(generation),
        heard=(),
        phases=(-1,),
        steps=(-1,),
        progress=(-1,),
        states="?",
        cpu_s=(0.0,),
        stall_s=0.0,
        **more,
    )


def write(cluster: Cluster, root: Path) -> RunFolder:
    """Put the journal of a cluster into the folder of a run."""
    folder = RunFolder(root)
    folder.logs.mkdir(parents=True)
    folder.journal.write_bytes(text(cluster))
    return folder


def write_decided(cluster: Cluster, root: Path, snapshot_at: int) -> RunFolder:
    """Put it there as a controller does, with a snapshot taken after the event of that number."""
    folder = RunFolder(root)
    folder.logs.mkdir(parents=True, exist_ok=True)
    controller, told, counts = compose.controller(cluster.run), Told(), Counts()
    file = JournalFile(folder.journal, cluster.run)
    for entry in cluster.entries:
        told.add(file.append(entry.event, controller.handle(entry.event)))
        counts.take(entry.event, entry.decisions)
        if entry.seq == snapshot_at:
            kept = Snapshots(folder.snapshot, cluster.run.metadata.name)
            kept.take(controller, file, told.entries(), counts)
    file.close()
    return folder


def inject(cluster: Cluster, index: int, description: str, target: str, node: str = "") -> None:
    cluster.tell(
        FaultInjected(
            at=cluster.at(),
            index=index,
            description=description,
            target=target,
            node=NodeId(node),
        )
    )


def commit(cluster: Cluster, step: int) -> None:
    cluster.tell(
        CheckpointCommitted(
            at=cluster.at(),
            step=Step(step),
            epoch=cluster.state.generation,
            key=f"commits/{step}",
        )
    )


def write_step(cluster: Cluster, step: int) -> list[Step]:
    """Both shards of a step are written; returns the steps whose commit is ordered then."""
    decisions: list[Decision] = []
    for node, shard in zip(cluster.state.world, (0, 1), strict=True):
        fact = ShardsWritten(
            generation=cluster.state.generation,
            step=Step(step),
            receipts=(Receipt(shard, 10, "d"),),
            model="m",
        )
        decisions += cluster.say(node, fact)
    return [d.step for d in decisions if isinstance(d, CommitCheckpoint)]


def answer(cluster: Cluster, step: int) -> list[Decision]:
    """The commit of a step, by the present generation, is there."""
    epoch = cluster.state.generation
    key = f"commits/{step}-{epoch}"
    return cluster.tell(CheckpointCommitted(at=cluster.at(), step=Step(step), epoch=epoch, key=key))


def be_done(cluster: Cluster) -> list[Decision]:
    """Every rank is done; returns what is decided then."""
    decisions: list[Decision] = []
    for node in cluster.state.world:
        ranks = cluster.state.ranks_of(node)
        fact = RanksFinished(
            generation=cluster.state.generation,
            step=cluster.state.reached_step,
            ranks=ranks,
            lanes=((1, 2),) * len(ranks),
        )
        decisions += cluster.say(node, fact)
    return decisions


def finish(cluster: Cluster, lanes: dict[int, tuple[int, int]]) -> None:
    """All ranks are done, and their last step is committed."""
    for node in cluster.state.world:
        ranks = cluster.state.ranks_of(node)
        cluster.say(
            node,
            RanksFinished(
                generation=cluster.state.generation,
                step=cluster.state.reached_step,
                ranks=ranks,
                lanes=tuple(lanes[rank] for rank in ranks),
            ),
        )
    commit(cluster, cluster.run.spec.trainer.steps)


def killed_rank() -> Cluster:
    """Rank 1 was killed at step 13, as planned, and training went on from step 10."""
    cluster = Cluster()
    cluster.start()
    cluster.train(10)
    cluster.hold(10)
    cluster.train(3)
    inject(cluster, 0, "kill-rank rank 1 at step 13", "rank 1", "node-0")
    cluster.after(0.02).exit(1, step=13)
    cluster.resume()
    cluster.train(20)
    return cluster


def raising() -> Cluster:
    """An exception at one and the same step on two nodes ended the run."""
    cluster = Cluster()
    cluster.start()
    cluster.train(5)
    cluster.exit(0, 1, step=5, kind="ValueError")
    cluster.resume()
    cluster.exit(2, 1, step=5, kind="ValueError")
    return cluster


def succeeded(lanes: dict[int, tuple[int, int]] | None = None, run: str = SHORT) -> Cluster:
    """A short run that lost a node on the way and reached its last step."""
    cluster = Cluster(run)
    cluster.start()
    cluster.train(8)
    cluster.hold(8)
    cluster.train(2)
    inject(cluster, 0, "lose-node node-1 at step 10", "node-1", "node-1")
    cluster.after(0.1).lose("node-1")
    cluster.resume()
    cluster.train(12)
    finish(cluster, lanes or {0: (1, 2), 1: (3, 4), 2: (1, 2), 3: (3, 4)})
    return cluster


def holdfast(*arguments: str) -> Any:
    """Call the command line; a traceback is a failure of the test."""
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def told(*arguments: str) -> str:
    """Return what a command prints that succeeds and says nothing else."""
    result = holdfast(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def refused(*arguments: str, code: int) -> tuple[str, str]:
    """Return the message and the hint."""
    result = holdfast(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    message, hint = result.stderr.strip().rsplit("\nhint: ")
    assert hint
    return message, hint


def assert_seated_last(cluster: Any, node: str) -> None:
    """Have a spare join, and lose nodes: `node`, which has no seat, gets one when no other is left.

    node-0 and node-2 train.
    """
    cluster.after(0.1).join("node-3")
    cluster.after(0.1).lose("node-0")
    assert cluster.seated() == ("node-3", "node-2")
    cluster.go_on()
    cluster.after(0.1).lose("node-2")
    assert cluster.seated() == ("node-3", node)
