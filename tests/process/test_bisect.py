"""`holdfast bisect` finds the step in which all replicas came to hold the same wrong state."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from orchestrator import compose
from orchestrator.cli.commands import app
from orchestrator.core import journal
from orchestrator.detect.votes import parts_of_world
from orchestrator.protocol.digests import KINDS
from orchestrator.protocol.ids import Step
from orchestrator.protocol.runfile import TrainingRun
from storage import shard, verdicts
from storage.commit import commit, write_shard
from storage.contents import name_of, read_contents
from storage.local import LocalStore
from storage.manifest import Manifest, ShardReceipt, commit_key, make_manifest, read_manifest
from storage.recut import Box, fill
from storage.shard import Chunk
from storage.verdicts import Trust
from tests import runfiles
from tests.journals import unheard
from tests.programs.struck import SAVED, STEPS, STRUCK, WRONG
from trainer.checkpoint import any_index

pytestmark = [pytest.mark.process, pytest.mark.timeout(240)]


def described(text: Path) -> TrainingRun:
    model = {"dim": 16, "layers": 1, "heads": 2, "kvHeads": 2, "ffnDim": 16, "vocab": 1280}
    trainer = {"model": model, "steps": STEPS, "seqLen": 16, "globalBatch": 4}
    told = runfiles.text(
        "struck",
        trainer=trainer | {"data": str(text)},
        detection={"digestShare": 1.0, "replayShare": 0.0, "updateShare": 0.0},
    )
    return compose.parse(told, TrainingRun, "run.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was struck in all replicas alike, but for its journal."""
    folder = tmp_path_factory.mktemp("struck")
    (folder / "text.txt").write_text("".join(f"{n} is not {n + 1}. " for n in range(400)))
    run = described(folder / "text.txt")
    (folder / "run.json").write_bytes(msgspec.json.encode(run))
    done = subprocess.run(
        [sys.executable, "-m", "tests.programs.struck", str(folder)],
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def parts(folder: Path) -> dict[int, str]:
    """What a journal would have of each step; there is a checkpoint, too."""
    run = msgspec.json.decode((folder / "run.json").read_bytes(), type=TrainingRun)
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(run.world_size)]
    receipts = [msgspec.convert(r["receipt"], ShardReceipt) for r in ranks if r["receipt"]]
    model = read_model(folder)
    manifest = make_manifest(receipts, run_id="struck", model=model, step=SAVED, epoch=1)
    commit(LocalStore(folder / "checkpoints"), manifest, newest_epoch_known=1)
    found = {}
    for step in range(1, STEPS + 1):
        rows = [rank["digests"][str(step)] for rank in ranks]
        votes = {
            kind: np.array([row[place] for row in rows], np.uint64)
            for place, kind in enumerate(KINDS)
            if any(row[place] for row in rows)
        }
        found[step] = parts_of_world(votes, run.layout)
    return found


def read_model(folder: Path) -> str:
    (index,) = [p for p in folder.glob("checkpoints/gen/*/*/s*.idx") if p.name.startswith("s0")][:1]
    return str(json.loads(index.read_text())["model"])


def write_journal(folder: Path, parts: dict[int, str]) -> None:
    run = msgspec.json.decode((folder / "run.json").read_bytes(), type=TrainingRun)
    told = tuple((Step(step), text) for step, text in parts.items())
    event = unheard(parts=told)
    lines = [journal.Header(run_id="struck", run=run), journal.Entry(seq=1, event=event)]
    (folder / "journal").write_bytes(b"".join(map(journal.line, lines)))


def bisect(folder: Path, *options: str, code: int) -> Result:
    done = CliRunner().invoke(app, ["bisect", str(folder), *options])
    assert done.exit_code == code, done.output
    return done


def test_the_step_in_which_all_replicas_were_struck_alike_is_found_with_shard_and_ranks(
    folder: Path, parts: dict[int, str]
) -> None:
    write_journal(folder, parts)
    refused = bisect(folder, code=2)
    assert "no checkpoint is compute verified, so none is known to be good" in refused.stderr
    store = LocalStore(folder / "checkpoints")
    verdicts.add(store, SAVED, 1, Trust.COMPUTE_VERIFIED.kind, "replayed")

    told = json.loads(bisect(folder, "-o", "json", code=6).stdout)

    assert (told["step"], told["kinds"]) == (STRUCK, ["exp_avg"])
    assert (told["shards"], told["ranks"]) == ([WRONG], [WRONG, WRONG + 2])
    assert told["start"] == "the checkpoint 4@1, compute verified"
    assert (told["first"], told["last"], told["compared"]) == (5, STRUCK, STRUCK - SAVED)
    assert "exp_avg came out of it otherwise on rank 1, rank 3 alike" in told["means"]


def test_from_the_seed_nothing_differs_up_to_there(folder: Path, parts: dict[int, str]) -> None:
    write_journal(folder, {step: text for step, text in parts.items() if step < STRUCK})

    told = bisect(folder, "--from", "seed", code=0).stdout

    assert "From:                the seed" in told
    assert "Compared:            7 steps" in told
    assert "First that differs:  none" in told


def test_what_can_not_be_compared_is_refused_before_anything_is_computed(
    folder: Path, parts: dict[int, str]
) -> None:
    write_journal(folder, {})
    assert "no digests of whole steps" in bisect(folder, "--from", "seed", code=1).stderr
    write_journal(folder, {step: text for step, text in parts.items() if step <= SAVED})
    assert "digests up to step 4" in bisect(folder, "--from", str(SAVED), code=2).stderr


def test_a_run_is_bisected_from_a_checkpoint_of_before_it_was_given_other_sizes(
    folder: Path, parts: dict[int, str]
) -> None:
    write_journal(folder, {step: text for step, text in parts.items() if step < STRUCK})
    store = LocalStore(folder / "checkpoints")
    written_as_one(store, read_manifest(store, commit_key(SAVED, 1)), epoch=2)

    told = json.loads(bisect(folder, "--from", f"{SAVED}@2", "-o", "json", code=0).stdout)

    assert told["start"] == f"the checkpoint {SAVED}@2"
    assert (told["step"], told["compared"]) == (None, STRUCK - 1 - SAVED)


def written_as_one(store: LocalStore, manifest: Manifest, epoch: int) -> None:
    """Write a checkpoint once more, as a world with one shard has it."""
    held = read_contents(store, manifest)
    pieces = [next(iter(tensor.pieces.values()))[0].chunk for tensor in held.tensors.values()]
    chunks = [
        Chunk(
            fqn=piece.fqn,
            state=piece.state,
            dtype=piece.dtype,
            shape=piece.global_shape,
            global_shape=piece.global_shape,
            offset=(0,) * len(piece.global_shape),
        )
        for piece in pieces
    ]
    plan = shard.plan(chunks)
    body = bytearray(plan.size)
    boxes = [
        Box(
            name=name_of(chunk),
            dtype=chunk.dtype,
            global_shape=chunk.shape,
            offset=chunk.offset,
            shape=chunk.shape,
            memory=plan.views(body)[chunk.name],
        )
        for chunk in chunks
    ]
    fill(store, held, boxes)
    meta = shard.ShardMeta(
        run_id="struck",
        model=manifest.model,
        step=SAVED,
        epoch=epoch,
        shard=0,
        shards=1,
        extra=any_index(held).extra,
    )
    receipt = write_shard(store, shard.seal(plan, body, meta), body)
    one = make_manifest([receipt], run_id="struck", model=manifest.model, step=SAVED, epoch=epoch)
    commit(store, one, newest_epoch_known=epoch)
