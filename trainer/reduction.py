"""Adds gradients up so that the sum does not depend on how many replicas there are, to the bit.

Floating-point addition is not associative, so what must stay the same is who is added to whom.
The leaves are the rounds of the global batch (trainer.shares): FSDP adds up the micro-batches of a
round within one replica, which has `dpShard` ranks in every world. Rounds are then added up in a
binary tree over their number that is the same in every world. A replica owns a stretch of rounds,
and holds the sums of the largest subtrees within it, at most 2 log2(rounds) of them; replicas
exchange those, shard by shard, and all finish the tree.

Letters: R replicas, K sums of this replica, T sums of all replicas, E elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

BUCKET_ELEMENTS = 1 << 22
"""Elements of each sum that are exchanged at once: what bounds the memory of an exchange."""


Wait = Callable[[dist.Work | None], None]


class Node(NamedTuple):
    """A subtree: of the rounds `[number << level, (number + 1) << level)`, as far as they exist."""

    level: int
    number: int


class Tree:
    """Sums of the largest subtrees of the rounds that were added so far, in order.

    The sum of a tree of which rounds are missing at the end is that of what is there.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.sums: list[list[Tensor]] = []
        """Of each node; a sum has as many tensors as what was added."""

    def add(self, node: Node, tensors: list[Tensor]) -> None:
        """Add a subtree's sum. It becomes the tree's: it is overwritten.

        Args:
            node: right behind what was added before.
            tensors: its sum.
        """
        while self.nodes and node.number % 2 and self.nodes[-1] == (node.level, node.number - 1):
            tensors = self._onto_last(tensors)
            self.nodes.pop()
            self.sums.pop()
            node = Node(node.level + 1, node.number // 2)
        self.nodes.append(node)
        self.sums.append(tensors)

    def total(self) -> list[Tensor]:
        """Return the sum of everything, and forget it."""
        while len(self.sums) > 1:
            self._onto_last(self.sums.pop())
        (total,) = self.sums
        self.nodes, self.sums = [], []
        return total

    def _onto_last(self, tensors: list[Tensor]) -> list[Tensor]:
        last = self.sums[-1]
        torch._foreach_add_(last, tensors)
        return last


def subtrees(rounds: range) -> list[Node]:
    """Return the largest subtrees within a stretch of rounds, in order.

    >>> subtrees(range(3, 8))
    [Node(level=0, number=3), Node(level=2, number=1)]
    """
    nodes, at = [], rounds.start
    while at < rounds.stop:
        level = (rounds.stop - at).bit_length() - 1
        if at:
            level = min(level, (at & -at).bit_length() - 1)  # no node begins elsewhere
        nodes.append(Node(level, at >> level))
        at += 1 << level
    return nodes


class Reduction:
    """The gradients of one rank's shard, summed over all rounds of the global batch.

    Args:
        rounds: of every replica, by replica.
        group: the ranks that have the same shard, by replica.
        wait: waits for a collective.
    """

    def __init__(self, rounds: Sequence[range], group: dist.ProcessGroup, wait: Wait) -> None:
        self._group, self._replica, self._wait = group, group.rank(), wait
        self._nodes = list(map(subtrees, rounds))
        self._rounds = rounds[self._replica]
        self._tree = Tree()
        self._at = self._rounds.start

    def add(self, gradients: list[Tensor]) -> None:
        """Take the gradients of the next round, which are overwritten."""
        assert self._at in self._rounds
        self._tree.add(Node(0, self._at), gradients)
        self._at += 1

    def finish(self) -> list[Tensor]:
        """Return the sum over all replicas: the same bits on each of them."""
        assert self._at == self._rounds.stop
        self._at = self._rounds.start
        if len(self._nodes) == 1:
            return self._tree.total()
        sums, self._tree = self._tree.sums, Tree()
        for pieces in _buckets(sums, BUCKET_ELEMENTS):
            self._exchange(pieces)
        return sums[0]

    def _exchange(self, pieces: list[list[Tensor]]) -> None:
        """Replace the first sum's pieces by those of the total.

        Each replica finishes the tree for one part of the elements, and all gather the results:
        that moves what an all-reduce would, times the sums that a replica has.
        """
        replicas, own = len(self._nodes), len(pieces)
        elements = sum(piece.numel() for piece in pieces[0])
        part = -(-elements // replicas)
        sums_KE = pieces[0][0].new_zeros(own, replicas * part)
        for sum_E, piece in zip(sums_KE, pieces, strict=True):
            torch.cat(piece, out=sum_E[:elements])
        sent_RKE = sums_KE.view(own, replicas, part).transpose(0, 1).contiguous()
        counts = [len(nodes) for nodes in self._nodes]
        came_TE = sums_KE.new_empty(sum(counts), part)
        sent, own_counts = sent_RKE.flatten(0, 1), [own] * replicas
        self._wait(
            dist.all_to_all_single(came_TE, sent, counts, own_counts, self._group, async_op=True)
        )
        tree = Tree()
        for node, row_E in zip((n for nodes in self._nodes for n in nodes), came_TE, strict=True):
            tree.add(node, [row_E])
        total_E = sums_KE.new_empty(replicas * part)
        parts = list(torch.split(total_E, part))
        self._wait(dist.all_gather(parts, tree.total()[0], self._group, async_op=True))
        lengths = [piece.numel() for piece in pieces[0]]
        torch._foreach_copy_(pieces[0], torch.split(total_E[:elements], lengths))


def _buckets(sums: list[list[Tensor]], size: int) -> Iterator[list[list[Tensor]]]:
    """Yield pieces of at most `size` elements that are the same part of every sum, as views."""
    flat = [[tensor.view(-1) for tensor in tensors] for tensors in sums]
    bucket: list[list[Tensor]] = [[] for _ in sums]
    room = size
    for same in zip(*flat, strict=True):
        at, end = 0, same[0].numel()
        while at < end:
            step = min(room, end - at)
            for pieces, tensor in zip(bucket, same, strict=True):
                pieces.append(tensor[at : at + step])
            at, room = at + step, room - step
            if room == 0:
                yield bucket
                bucket, room = [[] for _ in sums], size
    if room < size:
        yield bucket


class Waiting:
    """What those that FSDP is given have in common: how they wait, and memory of their own.

    Args:
        wait: waits for a collective, for so long at most.
    """

    def __init__(self, wait: Wait) -> None:
        self._wait = wait

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return a new tensor."""
        return torch.empty(*size, dtype=dtype, device=device)


class OrderedReduceScatter(Waiting, ReduceScatter):
    """What FSDP adds up the micro-batches of a round with, in the same tree as rounds.

    A backend's own reduce-scatter may add in another order where ranks are placed otherwise.
    This moves as many bytes.
    """

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,  # noqa: FBT001, FBT002 - as torch calls it
    ) -> None:
        """Leave this rank's part of the sum in `output_tensor`."""
        assert op == dist.ReduceOp.SUM
        assert not async_op
        came = torch.empty_like(input_tensor)
        self._wait(dist.all_to_all_single(came, input_tensor, group=group, async_op=True))
        tree = Tree()
        for shard, part in enumerate(came.view(group.size(), -1)):
            tree.add(Node(0, shard), [part])
        output_tensor.copy_(tree.total()[0])


def keep_order(model: torch.nn.Module, wait: Wait) -> None:
    """Have FSDP add up within a replica in a fixed order."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(OrderedReduceScatter(wait))
