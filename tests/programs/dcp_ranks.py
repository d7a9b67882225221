"""Four ranks save and load through torch.distributed.checkpoint, in many layouts.

Each state is saved by one, two or four of them and loaded by each of these numbers again; whoever
finds a bit that differs fails. Argument: folder.
"""

import itertools
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch._dynamo  # what fully_shard loads at its first use, here before the fork
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from storage import dcp

WORLDS = (1, 2, 4)
STEPS = 10


class Trained:
    """A small model, cut by fully_shard over some ranks, and its optimizer after two steps."""

    def __init__(self, mesh: DeviceMesh, seed: int) -> None:
        torch.manual_seed(seed)
        # Seven rows: no number of ranks but one divides them.
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False))
        for layer in self.model:
            fully_shard(layer, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1 * (seed + 1))
        self.steps = torch.tensor(seed)
        for _ in range(2):
            self.train()

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 5)).sum().backward()
        self.optimizer.step()

    def state(self) -> dict[str, object]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        beside = {"seen": [3, (0.9, 0.95)], "cursor": b"\x00\xff", "none": None}
        return {"model": model, "optim": optimizer, "steps": self.steps, "beside": beside}

    def take(self, state: dict[str, object]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optim"],
        )


def whole(value: object) -> object:
    """Return a state with every tensor as the bytes of the whole."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if isinstance(value, Tensor):
        return tuple(value.shape), value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    return value


def emptied(value: object) -> object:
    """Return a state without what is to be loaded into it."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        return {key: emptied(item) for key, item in value.items()}
    return [emptied(item) for item in value] if isinstance(value, list) else "?"


def loaded(trained: Trained, store: Path, group: dist.ProcessGroup) -> object:
    """Load the newest checkpoint into a model that was trained otherwise; return all of it."""
    state = emptied(trained.state())
    assert isinstance(state, dict)
    torch_dcp.load(state, storage_reader=dcp.StorageReader(store), process_group=group)
    trained.take(state)
    trained.steps = state["steps"]
    assert whole(trained.state()["model"]) == whole(state["model"])
    return whole(state)


def reshard(rank: int, folder: Path, groups: dict[int, dist.ProcessGroup]) -> None:
    """Save in every layout, with and without collectives, and load in every layout."""
    for world, confers in itertools.product(WORLDS, (True, False)):
        store = folder / f"{world}-{confers}"
        expected: object = None
        if rank < world:
            trained = Trained(DeviceMesh.from_group(groups[world], "cpu"), 0)
            expected = whole(trained.state())
            epoch = None if confers else dcp.agree_epoch(store, groups[world])
            torch_dcp.save(
                trained.state(),
                checkpoint_id=f"step-{STEPS}",
                storage_writer=dcp.StorageWriter(store, epoch=epoch, ranks=world),
                process_group=groups[world],
                use_collectives=confers,
            )
        dist.barrier()
        for other in WORLDS:
            if rank >= other:
                continue
            mesh = DeviceMesh.from_group(groups[other], "cpu")
            found = loaded(Trained(mesh, 1), store, groups[other])
            told = [expected]
            dist.broadcast_object_list(told, src=0, group=groups[other])
            assert found == told[0], f"{world} ranks, {confers=}, loaded by {other}"
        dist.barrier()


def save_beside_training(rank: int, folder: Path, group: dist.ProcessGroup) -> None:
    """Save three times while training goes on, and see that each is what was there then."""
    trained = Trained(DeviceMesh.from_group(group, "cpu"), 0)
    store, stager, expected, futures = folder / "async", dcp.AsyncStager(), [], []
    for step in range(3):
        trained.train()
        expected.append(whole(trained.state()))
        saved = torch_dcp.async_save(
            trained.state(),
            checkpoint_id=f"step-{step}",
            storage_writer=dcp.StorageWriter(store),
            async_stager=stager,
        )
        with torch.no_grad():
            for parameter in trained.model.parameters():
                parameter.zero_()
        futures.append(saved)
        saved.result()
        trained.optimizer.state.clear()
    stager.close()
    for step in range(3):
        state = emptied(trained.state())
        reader = dcp.StorageReader(store, step=step)
        torch_dcp.load(state, storage_reader=reader)
        assert reader.manifest.step == step
        found, then = whole(state), expected[step]
        assert isinstance(found, dict)
        assert isinstance(then, dict)
        assert found["model"] == then["model"], f"rank {rank}: step {step}"


def take_part(rank: int, folder: Path) -> None:
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=max(WORLDS))
    groups = {world: dist.new_group(list(range(world))) for world in WORLDS}
    reshard(rank, folder, groups)
    save_beside_training(rank, folder, groups[max(WORLDS)])
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # Forked, so that torch is loaded once.
    ranks = []
    for rank in range(max(WORLDS)):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                take_part(rank, Path(sys.argv[1]))
                code = 0
            except BaseException:  # noqa: BLE001 - CheckpointException is one
                traceback.print_exc()
            finally:
                os._exit(code)
        ranks.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    sys.exit(0 if codes == [0] * len(ranks) else f"exit codes of the ranks are {codes}")


if __name__ == "__main__":
    main()
