"""What a checkpoint costs, beside the machine's own copies and torch.distributed.checkpoint.

    python -m tests.bench.checkpoint [--mib 1024] [--also 64 4096] [--rounds 7] [--json]

One rank and its agent, each a process, on a local disk. Ours takes the way that a trainer's shard
takes: staged into shared memory and digested there in a thread, handed to the agent, verified and
written by it, committed; and back: read into another agent's shared memory and verified on the way
there, read by the rank into the weights and verified in them. Others: the same bytes copied
(`memcpy`), written to one file and synced (`raw`), read; and DCP with its FileSystemWriter, `save`,
and `async_save` in a thread and in a process. All take turns in each round; a ratio is one of
medians. Before something is read, its files are taken out of the page cache: who restores is rarely
who has just saved.

What training waits for is measured beside a stand-in for a step (`saving/computation.py` has how
long it computes, and why): until it may go on, and once more right before the update that follows.
DCP is
measured as it comes, which copies before it goes on, and `overlapped`, with its own stager told to
copy in a thread. `compute_beside_copy` is how much longer the same computation takes beside our
save than alone, everything counted that goes on meanwhile, and `compute_beside_copy_dcp_...` the
same beside DCP's: what is not waited for is not for nothing. `--threads` has it compute with more
threads than the one that a rank on CPUs has. `stall_synchronous_over_memcpy` is what training
waits for where the copy is not made beside a step, which is what others than our trainer get unless
they ask.

The ratios without a size in their name are of the first size; `@64` are of 64 MiB, and so on. Then,
unless `--only-saving`: a commit of 16,384 ranks, a choice among 1,000 checkpoints, and an upload.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from tests.bench import ending
from tests.bench.saving import fleet, upload
from tests.bench.saving.computation import Computation
from tests.bench.saving.others import Dcp, Raw, evict, overlapping_stager, timed
from tests.bench.saving.ours import Ours, make_state
from trainer import parallel

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where slots are
TENSORS = 48
COPIES_MIB_MAX = 2048
"""DCP's process and its own stager have copies of their own; of more than this they are left out,
for want of memory."""

RATIOS = {
    "stall_over_memcpy": ("stall", "memcpy"),
    "stall_synchronous_over_memcpy": ("stall_synchronous", "memcpy"),
    "stall_dcp_over_ours": ("dcp_thread_stall", "stall"),
    "stall_dcp_process_over_ours": ("dcp_process_stall", "stall"),
    "stall_dcp_overlapped_over_ours": ("dcp_thread_overlapped_stall", "stall"),
    "stall_dcp_process_overlapped_over_ours": ("dcp_process_overlapped_stall", "stall"),
    "compute_beside_copy": ("compute_beside", "compute"),
    "compute_beside_copy_dcp_thread": ("compute_beside_dcp_thread", "compute"),
    "compute_beside_copy_dcp_process": ("compute_beside_dcp_process", "compute"),
    "compute_beside_copy_dcp_thread_overlapped": (
        "compute_beside_dcp_thread_overlapped",
        "compute",
    ),
    "compute_beside_copy_dcp_process_overlapped": (
        "compute_beside_dcp_process_overlapped",
        "compute",
    ),
    "save_over_raw": ("raw_write", "save"),
    "save_over_raw_past_the_cache": ("raw_direct", "save"),
    "save_dcp_over_ours": ("dcp_save", "save"),
    "restore_over_raw": ("raw_read", "restore"),
    "restore_over_raw_past_the_cache": ("raw_read_direct", "restore"),
    "restore_over_raw_into_new_memory": ("raw_read_new", "restore"),
    "restore_dcp_over_ours": ("dcp_load", "restore"),
    "restore_of_rank_over_raw": ("raw_read", "restore_of_rank"),
    "restore_of_rank_dcp_over_ours": ("dcp_load", "restore_of_rank"),
}
"""Of medians of seconds: which over which. `save_over_raw` is a share of raw's speed."""

Rows = dict[str, list[float]]


class Background(NamedTuple):
    """A way of DCP to save in the background."""

    name: str
    kind: AsyncCheckpointerType
    stager: DefaultStager | None = None


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--mib", type=int, default=1024)
    options.add_argument("--also", type=int, nargs="*", default=[64, 4096])
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--threads", type=int, default=1, help="that compute beside a save")
    options.add_argument("--ranks", type=int, default=16_384)
    options.add_argument("--generations", type=int, default=100)
    options.add_argument("--checkpoints", type=int, default=1000)
    options.add_argument("--upload-mib", type=int, default=256)
    parts = options.add_mutually_exclusive_group()
    parts.add_argument("--only-saving", action="store_true")
    parts.add_argument("--all-but-saving", action="store_true")
    options.add_argument("--root", type=Path, default=None, help="folder on the disk to measure")
    options.add_argument("--json", action="store_true")
    chosen = options.parse_args()
    # torch says so of everything that it may still change.
    warnings.simplefilter("ignore")
    found: dict[str, float] = {}
    for mib in () if chosen.all_but_saving else (chosen.mib, *chosen.also):
        suffix = "" if mib == chosen.mib else f"@{mib}"
        # What is large takes long, and differs less from round to round.
        rounds = chosen.rounds if mib <= COPIES_MIB_MAX else max(chosen.rounds // 2, 1)
        took = measure_size(mib, rounds, chosen.threads, chosen.root)
        found |= {f"{name}{suffix}": value for name, value in took.items()}
    if not chosen.only_saving:
        found |= fleet.measure(chosen.ranks, chosen.generations, chosen.checkpoints)
        found |= upload.measure(chosen.upload_mib << 20, max(chosen.rounds // 2, 1))
    if chosen.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:<36}{value:12.4g}")


def measure_size(mib: int, rounds: int, threads: int, root: Path | None) -> dict[str, float]:
    """Return the medians, in seconds, of every side with `mib` of state, and their ratios."""
    size = mib << 20
    state = make_state(size, TENSORS)
    rows: Rows = {}
    with folders(root) as (disk, memory), parallel.alone() as world:
        raw, dcp = Raw(state, disk / "raw"), Dcp(state, disk / "dcp")
        ours = Ours(state, world, memory, disk / "ours")
        step, ways = Computation(size, threads), backgrounds(mib)
        try:
            for turn in range(rounds + 1):
                row = one_round(ours, raw, dcp, ways, step)
                # In the first, memory is made, and DCP's process started.
                for name, value in row.items() if turn else ():
                    rows.setdefault(name, []).append(value)
            memory_over_state = ours.memory_over_state()
        finally:
            ours.close()
            for way in ways:
                if way.stager is not None:
                    way.stager.close()
    middle = {name: statistics.median(values) for name, values in rows.items()}
    gib = size / 2**30
    return {
        **{n: middle[a] / middle[b] for n, (a, b) in RATIOS.items() if a in middle},
        "digest_core_s_per_gib": (middle["stage_core"] - middle["memcpy_core"]) / gib,
        "digest_core_s_per_gib_synchronous": (
            middle["stage_synchronous_core"] - middle["memcpy_core"]
        )
        / gib,
        "agent_core_s_per_gib": middle["agent_core"] / gib,
        "memory_over_state": memory_over_state,
        **{f"{name}_s": value for name, value in middle.items()},
    }


def backgrounds(mib: int) -> list[Background]:
    """Return the ways of DCP to save `mib` of state in the background."""
    thread, process = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS
    ways = [Background("dcp_thread", thread)]
    if mib <= COPIES_MIB_MAX:
        ways += [
            Background("dcp_thread_overlapped", thread, overlapping_stager(shared=False)),
            Background("dcp_process", process),
            Background("dcp_process_overlapped", process, overlapping_stager(shared=True)),
        ]
    return ways


def one_round(
    ours: Ours, raw: Raw, dcp: Dcp, ways: list[Background], step: Computation
) -> dict[str, float]:
    """Return the seconds of every side, one after the other."""
    row = {}
    row["memcpy"], row["memcpy_core"] = timed(raw.copy)
    row["compute"] = step.compute()
    saved = ours.save(overlap=True)
    row |= {"save": saved.durable_s}
    row |= {"stage_core": saved.rank_core_s, "agent_core": saved.agent_core_s}
    row["stall"], row["compute_beside"] = ours.save_beside(step)
    saved = ours.save()
    row |= {"stall_synchronous": saved.stall_s, "stage_synchronous_core": saved.rank_core_s}
    row["raw_direct"], _ = timed(raw.write_past_the_cache)
    row["raw_write"], _ = timed(raw.write)
    for way in ways:
        took = dcp.save_beside(step, way.kind, way.stager)
        row[f"{way.name}_stall"], row[f"compute_beside_{way.name}"] = took
    row["dcp_save"], _ = timed(dcp.save)
    evict(raw.file, ours.body, *dcp.files)
    os.sync()
    row["raw_read"], _ = timed(raw.read)
    row["raw_read_direct"], _ = timed(raw.read_past_the_cache)
    evict(raw.file)
    row["raw_read_new"], _ = timed(raw.read_into_new_memory)
    ours.forget()
    row["restore"], row["restore_of_rank"] = ours.restore()
    row["dcp_load"], _ = timed(dcp.load)
    return row


@contextmanager
def folders(root: Path | None) -> Iterator[tuple[Path, Path]]:
    """Make a folder on the disk and one in shared memory; both are gone afterwards."""
    with ending.new_folder(root) as disk, ending.new_folder(SHARED_MEMORY) as memory:
        yield Path(disk), Path(memory)


if __name__ == "__main__":
    main()
