"""Saves and restores a state as a trainer's rank does: through slots, digests, agent, commit."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from orchestrator.protocol.ids import Generation, Step
from orchestrator.protocol.rank import Staged
from orchestrator.worker.slot import Slot, Slots, restore_reader
from storage.manifest import body_key, generation_prefix
from tests.bench.saving.computation import Computation
from tests.bench.saving.node import RANK, Begin, Fetch, Node, Save
from trainer.checkpoint import Checkpointer
from trainer.optim import ShardState
from trainer.parallel import World
from trainer.stamp import Cursor, Stamp

START = Cursor(samples=0, seed=0, seq_len=128, global_batch=8, data="0" * 64)
STATES = 3
"""Of each weight: itself and two moments, as AdamW has them."""
SAMPLE_S = 0.002


class Saved(NamedTuple):
    """What a save took: seconds that training waited, until the checkpoint was there, and on a
    core in the rank and in the agent."""

    stall_s: float
    durable_s: float
    rank_core_s: float
    agent_core_s: float


class Beside(NamedTuple):
    """What a save beside a step took: seconds that training waited before it and right before the
    next update, and that the step took to compute."""

    stall_s: float
    computed_s: float


class Hand:
    """Hands slots over to the agent, as `orchestrator.worker.Worker` does."""

    persisting = False

    def __init__(self, node: Node) -> None:
        self._node, self.slots = node, Slots(node.memory)

    def slot(self, size: int) -> Slot | None:
        return self.slots.claim(size)

    def staged(self, slot: Slot, *, generation: int, step: int, index: str, durable: bool) -> None:
        message = Staged(
            generation=Generation(generation),
            step=Step(step),
            slot=slot.number,
            index=index,
            durable=durable,
        )
        self._node.say(Save(message))

    def give_back(self, slot: Slot) -> None:
        raise AssertionError(slot.number)

    def abandoned(self, step: int, *, generation: int, reason: str) -> None:
        raise AssertionError(reason)

    def stalled(self, seconds: float) -> None:
        del seconds  # it is measured from outside


class Ours:
    """A rank with a state, its node, and one that takes its place.

    Args:
        state: tensors by name, all of one size; three of them make a weight.
        world: of one rank.
        memory: an empty folder in shared memory.
        root: folder of the durable tier.
    """

    def __init__(self, state: dict[str, Tensor], world: World, memory: Path, root: Path) -> None:
        self._world, self._root = world, root
        self._states = shard_states(state)
        uri = str(root)
        self._node, self._other = Node(memory / "here", uri), Node(memory / "there", uri)
        self._hand = Hand(self._node)
        self._generation = 0
        self._restores = 1 << 20

    def save(self, *, overlap: bool = False) -> Saved:
        """Make a checkpoint; older ones are removed first. Each is of a new generation.

        Args:
            overlap: copy in the thread that digests, as the trainer does; then there is no stall
                to speak of, since nothing is computed and no update comes.
        """
        checkpointer = self._begin()
        core_s, begun = time.process_time(), time.perf_counter()
        assert checkpointer.save(self._hand, self._generation, durable=True, overlap=overlap)
        stall_s = time.perf_counter() - begun
        checkpointer.settle()
        core_s = time.process_time() - core_s
        agent = self._node.hear()
        return Saved(stall_s, time.perf_counter() - begun, core_s, agent.core_s)

    def save_beside(self, step: Computation) -> Beside:
        """Make a checkpoint beside a step, as the trainer does."""
        checkpointer = self._begin()
        begun = time.perf_counter()
        assert checkpointer.save(self._hand, self._generation, durable=True, overlap=True)
        stall_s = time.perf_counter() - begun
        computed_s = step.compute()
        begun = time.perf_counter()
        checkpointer.await_copied(self._hand)
        stall_s += time.perf_counter() - begun
        checkpointer.settle()
        self._node.hear()
        return Beside(stall_s, computed_s)

    def forget(self) -> None:
        """Have the other node forget what it restored before, as one that is new to it has none.

        Its agent gives the memory back in a thread, which takes a core for 0.1 s for each GiB.
        """
        self._restores += 2
        self._other.ask(Begin(Generation(self._restores - 1)))
        while any(self._other.memory.iterdir()):
            time.sleep(SAMPLE_S)

    def restore(self) -> tuple[float, float]:
        """Fill the state from the newest checkpoint, on a node without it.

        Returns:
            The seconds, and how many of them the rank itself takes: its agent reads and verifies
            before that, beside the start of the rank's process and without it.
        """
        order = Fetch(
            Step(self._generation), Generation(self._generation), Generation(self._restores)
        )
        checkpointer = self._checkpointer()
        begun = time.perf_counter()
        restore = self._other.ask(order).restore
        assert restore is not None
        prepared = time.perf_counter()
        with restore_reader(restore.path) as read:
            assert checkpointer.restore(restore.index, read) == order.step
        over = time.perf_counter()
        return over - begun, over - prepared

    def memory_over_state(self) -> float:
        """Return the most memory that a save takes beside the state, as a share of it."""
        size = sum(t.nbytes for s in self._states for t in s[2:])
        most, over = 0, threading.Event()
        pids = ("self", str(self._node.pid))
        before = sum(map(_anonymous, pids))

        def watch() -> None:
            nonlocal most
            while not over.wait(SAMPLE_S):
                most = max(most, sum(map(_anonymous, pids)) - before + _shared(self._node.memory))

        watcher = threading.Thread(target=watch)
        watcher.start()
        self.save()
        over.set()
        watcher.join()
        return most / size

    @property
    def body(self) -> Path:
        """The file with the newest checkpoint's tensors."""
        return self._root / body_key(self._generation, self._generation, 0)

    def close(self) -> None:
        """End the nodes."""
        for node in (self._node, self._other):
            node.close()

    def _begin(self) -> Checkpointer:
        self._remove()
        self._generation += 1
        self._node.ask(Begin(Generation(self._generation)))
        self._hand.slots.begin(RANK, [0])
        return self._checkpointer()

    def _checkpointer(self) -> Checkpointer:
        stamp = Stamp("bench", "of a benchmark", self._generation, START)
        return Checkpointer(self._states, self._world, stamp)

    def _remove(self) -> None:
        if self._generation:
            shutil.rmtree(self._root / generation_prefix(self._generation, self._generation))
            shutil.rmtree(self._root / "commits")


def make_state(size: int, tensors: int) -> dict[str, Tensor]:
    """Return about `size` bytes of noise: so many weights of float32, with their moments."""
    noise = torch.Generator().manual_seed(0)
    items = size // 4 // (tensors * STATES)
    return {
        f"{state}.{number}": torch.randn(items, generator=noise)
        for number in range(tensors)
        for state in ("param", "exp_avg", "exp_avg_sq")
    }


def shard_states(state: dict[str, Tensor]) -> list[ShardState]:
    """Return the same tensors as an optimizer has them."""
    weights = [name.removeprefix("param.") for name in state if name.startswith("param.")]
    made = []
    for number in weights:
        param = state[f"param.{number}"]
        moments = state[f"exp_avg.{number}"], state[f"exp_avg_sq.{number}"]
        weight = nn.Parameter(param, requires_grad=False)
        made.append(ShardState(f"layers.{number}.w", weight, param, *moments))
    return made


def _anonymous(pid: str) -> int:
    """Return the bytes of a process's own memory, without what it shares."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


def _shared(memory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in memory.iterdir())
