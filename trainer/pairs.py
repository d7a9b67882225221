"""What two ranks of a replica tell each other on CPUs, straight from the memory where it lies.

gloo's own forms copy more than they have to, or send more: its gather joins what came in memory of
its own and copies it out again, and its reduce-scatter sums up everything on both ranks, of which
each keeps its half. For 5 million float32 the two took 12 and 20 ms of a core, these 4 and 8.

For two only: more would have to tell each other in rounds, and would add up in another order.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from trainer.reduction import Wait, Waiting

PAIR = range(2)
"""The two ranks, by their number among themselves."""


class PairAllGather(Waiting, AllGather):
    """Sends this rank's half to the other one, which receives it where it belongs."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,  # noqa: FBT001, FBT002 - as torch calls it
    ) -> None:
        """Leave the halves of both ranks in `output_tensor`, by rank.

        They are there when it returns, also if torch would wait for them later, as it does with
        pipelines: to have this wait in its place is to have it bounded.
        """
        del async_op
        halves = output_tensor.view(len(PAIR), -1)
        own, others = halves[group.rank()], halves[1 - group.rank()]
        if own.data_ptr() != input_tensor.data_ptr():  # FSDP has it where it belongs already
            own.copy_(input_tensor)
        _swap(others, own, group, self._wait)


class PairReduceScatter(Waiting, ReduceScatter):
    """Sends the half that is the other's to it, and adds what came of one's own."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,  # noqa: FBT001, FBT002 - as torch calls it
    ) -> None:
        """Leave this rank's half of the sum in `output_tensor`."""
        assert op == dist.ReduceOp.SUM
        del async_op  # as above
        halves = input_tensor.view(len(PAIR), -1)
        own, others = halves[group.rank()], halves[1 - group.rank()]
        came = torch.empty_like(own)
        _swap(came, others, group, self._wait)
        torch.add(own, came, out=output_tensor.view(-1))


def _swap(came: Tensor, sent: Tensor, group: dist.ProcessGroup, wait: Wait) -> None:
    """Have what the other rank sends."""
    assert group.size() == len(PAIR)
    counts = [0 if rank == group.rank() else sent.numel() for rank in PAIR]
    wait(dist.all_to_all_single(came, sent, counts, counts, group, async_op=True))


def exchange(part: nn.Module, wait: Wait) -> None:
    """Have FSDP gather weights and add up gradients between two ranks in this way.

    Nothing comes out in other bits: two numbers have one sum, whoever adds them up.

    Args:
        part: what was sharded.
        wait: waits for a collective.
    """
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(PairAllGather(wait))
            module.set_custom_reduce_scatter(PairReduceScatter(wait))
