"""Forms the world of a generation, shards the model over it, and gets out when a peer is gone.

Getting out is the hard part. With gloo, destroying a group whose peer died can wait for ever in
the group's destructor, and a collective with a frozen peer only ends at its timeout. What works
is to shut down the group's own sockets, which fails the collective at once, and to keep the old
groups until the next world has formed (trainer.abandoned). A process that can not get rid of many
worlds gives way to a parked one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _world
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from orchestrator.protocol import runfile
from orchestrator.protocol.groups import ALL, connection, name_of
from orchestrator.protocol.layout import Layout
from orchestrator.worker import EXIT_STUCK, MisconfiguredError, PeerLostError, Seat, Worker
from trainer import groups, pairs, waiting
from trainer.abandoned import Abandoned
from trainer.guard import Guard
from trainer.shares import Place

HOST_VARIABLE = "HOLDFAST_HOST"
"""Address of this machine as other ranks reach it; loopback unless it is set."""
BREAK_EVERY_S = 0.02
SHARD_PARAMETERS_MIN = 4_000_000
"""A layer below this is not worth collectives of its own: it is gathered with the others."""
WORLDS_MAX = 32
"""A process that still has this many worlds which it left does not leave another: it ends."""
LOOK_EVERY = timedelta(seconds=0.1)
_worlds = itertools.count()
_abandoned = Abandoned()


class _Mesh(DeviceMesh):
    """A mesh that cuts each part once: fully_shard asks for the same one for every weight.

    Names of dimensions may end in `@` and a number, which nobody who asks for a part has to know.
    """

    def __getitem__(self, mesh_dim_names: str | tuple[str, ...]) -> DeviceMesh:
        parts: dict[str | tuple[str, ...], DeviceMesh] = self.__dict__.setdefault("_parts", {})
        if mesh_dim_names not in parts:
            asked = (mesh_dim_names,) if isinstance(mesh_dim_names, str) else mesh_dim_names
            full = {name.partition("@")[0]: name for name in self.mesh_dim_names or ()}
            names = tuple(full.get(name, name) for name in asked)
            parts[mesh_dim_names] = super().__getitem__(names)
        return parts[mesh_dim_names]


class World:
    """The process groups of one generation.

    Attributes:
        layout: how its ranks are cut, and where this one stands is `position`.
        context: the ranks with which this one shares its sequences, None if it does not.
        replica: which copy of the model this rank works on.
        shard: which of `shards` parts of that copy is its own.
        place: where this rank stands among those that train on different data.
        groups: names of the groups in which it waits for others, but for that of all ranks.
        counts: whether collectives are told apart by group, and why not, if this torch does not
            let that be.
    """

    def __init__(self, rank: int, layout: Layout, device: torch.device) -> None:
        self.rank, self.layout, self.device = rank, layout, device
        self.size, self.shards = layout.world_size, layout.shard_count
        self.position = at = layout.position(rank)
        self.replica, self.shard = at.dp_replicate, layout.shard_of(rank)
        self.place = Place(self.replica, layout.dp_replicate, at.dp_shard, layout.dp_shard)
        self.mesh: DeviceMesh | None = None
        self.context: dist.ProcessGroup | None = None
        self.groups: list[str] = []
        self.counts = Guard("groups")
        self._store: Store | None = None
        self._others = _sockets()
        self._broken, self._left = threading.Event(), threading.Event()
        self._breaker = threading.Thread(target=self._break, name="holdfast-break", daemon=True)
        self._breaker.start()

    def join(self, store: Store, timeout_s: float) -> None:
        """Meet the other ranks at `store`. Blocks until all are there."""
        self._store = store
        cuda = self.device.type == "cuda"
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=timeout_s),
            device_id=self.device if cuda else None,
        )
        layout = self.layout
        sizes = {"replicate": layout.dp_replicate}
        if layout.pp > 1:
            sizes |= {"pp": layout.pp}
        sizes |= {"shard": layout.dp_shard * layout.cp}
        if layout.tp > 1:
            sizes |= {"tp": layout.tp}
        names = tuple(sizes)
        if layout.tp > 1:
            # Torch remembers how operations on a mesh come out, with the groups of the mesh that it
            # saw first. What is cut with `tp` must not be taken for that of a world before.
            number = next(_worlds)
            names = tuple(f"{name}@{number}" for name in names)
        ranks = torch.arange(self.size).view(*sizes.values())
        self.mesh = _Mesh(self.device.type, ranks, mesh_dim_names=names)
        if layout.cp > 1:
            # Not a dimension of the mesh: weights are sharded over dpShard and cp as over one.
            rows = ranks.view(-1, layout.cp, layout.tp).transpose(1, 2).reshape(-1, layout.cp)
            # Everybody makes all groups, or ranks count them differently.
            made = {tuple(members): dist.new_group(members) for members in rows.tolist()}
            self.context = next(g for members, g in made.items() if self.rank in members)
        called = list(self._call_groups(names))
        # What is not counted is not announced, or it would look as if nobody had ever entered it.
        self.groups = [] if self.counts.off else called

    def _call_groups(self, names: tuple[str, ...]) -> Iterator[str]:
        """Have waits in each group be counted apart; yield what they are called."""
        assert self.mesh is not None
        assert dist.group.WORLD is not None
        self.counts.call(partial(groups.call, dist.group.WORLD, ALL), None)
        called = {name.partition("@")[0]: self.mesh[name].get_group() for name in names}
        if self.context is not None:
            called["cp"] = self.context
        for kind, group in called.items():
            if group.size() == 1:
                continue  # nobody is waited for
            members = dist.get_process_group_ranks(group)
            links: dict[tuple[str, int], str] = {}
            if kind == "pp":
                for place, other in enumerate(members):
                    links["send", place] = connection(kind, self.rank, other)
                    links["recv", place] = connection(kind, other, self.rank)
            name = name_of(kind, members)
            self.counts.call(partial(groups.call, group, name, links), None)
            yield name
            # Stages tell their neighbours only, of which the first and the last one may be, too.
            at = group.rank()
            for place in dict.fromkeys(((at - 1) % group.size(), (at + 1) % group.size())):
                yield from (links[way, place] for way in ("send", "recv") if links)
            if kind in ("tp", "cp") and self.device.type == "cpu":
                self.counts.call(partial(groups.wait_in_python, group), None)

    @property
    def store(self) -> Store:
        """Where ranks leave word for each other that is no collective's."""
        assert self._store is not None
        return self._store

    @property
    def twins(self) -> dist.ProcessGroup:
        """The ranks with the same shard, one of each replica, by replica."""
        assert self.mesh is not None
        return self.mesh["replicate"].get_group()

    def gather(self, values: list[float] | torch.Tensor) -> list[list[float]]:
        """Return the values of every rank, by rank: the same bits everywhere.

        A rank that has them on its GPU hands over a tensor, float64, and waits for it only here.
        """
        own = torch.as_tensor(values, dtype=torch.float64, device=self.device)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        self.wait(dist.all_gather(rows, own, async_op=True))
        return torch.stack(rows).tolist()

    def wait(self, work: dist.Work | None) -> None:
        """Wait for a collective, or until this world is broken up.

        The second is for gloo, which tells a send nothing if its write is what finds a connection
        broken: it would wait for the timeout of the collective, and did after one of ten aborts.

        Raises:
            PeerLostError: if the world was broken up.
        """
        assert work is not None
        if self.device.type == "cuda":
            work.wait()
            return
        while True:
            try:
                work.wait(LOOK_EVERY)
            except RuntimeError as error:
                if work.is_completed():
                    work.wait()  # raises what went wrong, unless it came out well just now
                elif self._broken.is_set():
                    raise PeerLostError(f"the world was broken up: {error}") from error
                else:
                    continue
            return

    def break_out(self) -> None:
        """Make whatever the main thread waits for in this world fail. Any thread, does not block.

        Sockets are shut down again and again until the main thread has left: one that is just
        forming the world opens further ones after a first sweep.
        """
        self._broken.set()

    def leave(self) -> None:
        """Forget this world, so that another can be formed in this process."""
        self.close()
        # Every group that torch has made, also those of a mesh that never stood as a whole.
        _abandoned.add([self._store, *_world.pg_map])
        self._store = self.context = None
        if dist.is_initialized():
            dist.destroy_process_group()
        else:
            _forget_half_formed()
        groups.forget()
        mesh, self.mesh = self.mesh, None
        if mesh is not None:
            _forget_groups(mesh)

    def close(self) -> None:
        """End the thread that stands by to break out."""
        self._left.set()
        self._broken.set()
        # A sweep that is still under way could hit the sockets of the next world.
        self._breaker.join()

    def _break(self) -> None:
        self._broken.wait()
        if self.device.type == "cuda" and not self._left.is_set():
            self._abort_collectives()
        while not self._left.is_set():
            for inode, descriptor in _sockets().items():
                if inode not in self._others:
                    _shut_down(descriptor, inode)
            self._left.wait(BREAK_EVERY_S)

    def _abort_collectives(self) -> None:
        groups = self.mesh.get_all_groups() if self.mesh is not None else []
        for group in [*groups, self.context, dist.group.WORLD]:
            if group is not None:
                group.abort()


@contextlib.contextmanager
def form(worker: Worker, seat: Seat, job: runfile.Trainer, layout: Layout) -> Iterator[World]:
    """Form the world of this seat's generation, and leave it however the block ends.

    Raises:
        PeerLostError: if a collective in the block, or forming the world, failed.
        Aborted: if this rank was told to leave.
        MisconfiguredError: if there is no such device.
    """
    # Nobody counts before the first step: a process that is new would have counted less by then.
    waiting.count().counter = None
    world = World(seat.rank, layout, device_of(job.device, seat.local_rank))
    worker.on_abort(world.break_out)
    try:
        store = _open_store(worker, seat)
        world.join(PrefixStore(f"generation-{seat.generation}", store), seat.collective_timeout_s)
        _abandoned.let_go()
        yield world
    except BaseException as error:
        # Whoever waits for this rank in a collective must hear of it, not wait for an order.
        world.break_out()
        lost = _is_peer_failure(error)
        if len(_abandoned) >= WORLDS_MAX and (lost or worker.aborted):
            _give_way(worker, error)
        worker.check()  # an order to leave explains the failure better than its symptom
        if lost:
            raise PeerLostError(str(error)) from error
        raise
    finally:
        world.leave()


def _give_way(worker: Worker, error: BaseException) -> NoReturn:
    """End this process as soon as it is told to leave: then nobody takes that for a failure."""
    if not worker.aborted:
        worker.troubled(error)
    while not worker.aborted:
        time.sleep(0.005)
    os._exit(EXIT_STUCK)


@contextlib.contextmanager
def alone(store: Store | None = None, device: str = "cpu") -> Iterator[World]:
    """Form a world of one, and leave it without a trace; `device` as in `device_of`."""
    world = World(0, Layout(), device_of(device, 0))
    try:
        world.join(store or HashStore(), 60.0)
        yield world
    finally:
        mesh, world.mesh = world.mesh, None
        world.close()
        dist.destroy_process_group()
        groups.forget()
        if mesh is not None:
            _forget_groups(mesh)


def device_of(wanted: str, local_rank: int) -> torch.device:
    """Return the device that `spec.trainer.device` means for a rank, and make it the current one.

    Raises:
        MisconfiguredError: if it asks for a GPU where there is none.
    """
    there = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
    if wanted == "cuda" and there <= local_rank:
        raise MisconfiguredError(
            f"spec.trainer.device is cuda, expected at least {local_rank + 1} GPUs, found {there}",
            hint="`auto` takes GPUs where there are some; ranksPerNode is the number per node",
        )
    if there <= local_rank:
        # Ranks share the cores; threads of each that spin for work made a step ten times slower.
        torch.set_num_threads(1)
        return torch.device("cpu")
    # Without it cuBLAS may share its scratch between streams, and then sum in the order in which
    # they come; of this size torch takes as much anyway on GPUs from Hopper on. Read when the first
    # product of matrices is computed. Source: cuBLAS, section 2.1.4, results reproducibility.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def shard(
    part: nn.Module, world: World, compute: torch.dtype = torch.float32, *, apart: bool = False
) -> None:
    """Shard a model, or a stage of one, in place, so that gradients come out as sums over ranks.

    Args:
        part: of float32; its `layers` may be worth collectives of their own.
        world: over which.
        compute: the type of weights as layers see them. Shards, sums over ranks and the optimizer
            are float32 all the same.
        apart: add up the ranks of each replica only, after every backward pass.
    """
    assert world.mesh is not None
    mesh = world.mesh["shard"] if apart else world.mesh["replicate", "shard"]
    mixed = compute is not torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=compute if mixed else None,
        reduce_dtype=torch.float32 if mixed else None,
        # Layers get what they need in the type that it has to have: angles are float32.
        cast_forward_inputs=False,
    )
    layers = part.get_submodule("layers").children()
    modules = [layer for layer in layers if _parameters(layer) >= SHARD_PARAMETERS_MIN]
    # A rank that has the whole model keeps it as layers see it for the backward pass. A pipeline
    # comes back to a stage with every micro-batch: it stays together for the step.
    stays = (mixed and world.shards == 1) or world.layout.pp > 1
    for module in [*modules, part]:
        sharded = fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=False if stays else None,
        )
        # Each rank's loss is divided by the tokens of the global batch already. Alone, a rank
        # would divide by one, which takes as long and as much memory as any other number.
        if mesh.size() > 1:
            sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    if world.device.type == "cpu" and world.layout.dp_shard * world.layout.cp == len(pairs.PAIR):
        pairs.exchange(part, world.wait)


def last_of_step(model: nn.Module, world: World, *, last: bool, apart: bool) -> None:
    """Say whether the next backward pass is the last of its step, after which ranks add up.

    Until then, a rank that has the whole model keeps weights as layers see them.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last or apart, recurse=False)
            if world.shards == 1:
                module.set_reshard_after_backward(last, recurse=False)


def not_to_be_added_up(model: nn.Module, world: World) -> None:
    """Say that the next backward pass is for this rank's eyes only: no rank adds anything up."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(False, recurse=False)
            if world.shards == 1:
                module.set_reshard_after_backward(True, recurse=False)


def recovers(model: nn.Module) -> bool:
    """Whether a model can be used again after a pass in it has raised: torch 2.13 and newer."""
    return hasattr(model, "reset_iter_state")


def recover(model: nn.Module) -> None:
    """Bring a model back to how it is between two steps, after a pass in it has raised.

    Layers would else go on with the whole weights of before, and wait for the end of that pass.
    """
    model.reset_iter_state()  # type: ignore[operator]


def let_go(model: nn.Module) -> None:
    """Hold no more than this rank's part of the weights, after a pass that no backward follows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _forget_half_formed() -> None:
    """Reset what a world that never stood left behind in torch.

    Torch counts groups and puts the count into the keys under which ranks meet. A rank that
    failed half way would look for its peers under other keys than they do, for ever. Destroying
    a world resets the count, and a world of one needs nobody.
    """
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    dist.destroy_process_group()


def _forget_groups(mesh: DeviceMesh) -> None:
    """Have a mesh let go of its groups: torch's cache of shardings remembers meshes for ever.

    With it go threads of gloo that wake a hundred times a second. A torch that keeps them elsewhere
    keeps them.
    """
    getattr(mesh, "_pg_registry", {}).clear()  # nothing public lets go of them


def _open_store(worker: Worker, seat: Seat) -> TCPStore:
    timeout = timedelta(seconds=seat.collective_timeout_s)
    if seat.rank == 0:
        host = os.environ.get(HOST_VARIABLE, "127.0.0.1")
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        worker.offer(f"{host}:{store.port}")
        return store
    host, _, port = worker.rendezvous(seat.collective_timeout_s).rpartition(":")
    return TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timeout)


def _is_peer_failure(error: BaseException) -> bool:
    if isinstance(error, (dist.DistError, TimeoutError)):
        return True
    text = str(error)
    # A pipeline wraps what went wrong in a stage.
    return isinstance(error, RuntimeError) and (
        "gloo" in text
        or "Connection" in text
        or "Broken pipe" in text
        or (error.__cause__ is not None and _is_peer_failure(error.__cause__))
    )


def _sockets() -> dict[int, int]:
    """Return the open sockets of this process: inode to descriptor.

    Inodes name sockets: the number of a closed descriptor is given out again.
    """
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed since it was listed
            status = os.fstat(int(entry.name))
            if stat.S_ISSOCK(status.st_mode):
                found[status.st_ino] = int(entry.name)
    return found


def _shut_down(descriptor: int, inode: int) -> None:
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as opened:
        if os.fstat(opened.fileno()).st_ino != inode:
            return
        # A listening socket stays: gloo ends the process when it can not accept any more.
        if not opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            opened.shutdown(socket.SHUT_RDWR)
