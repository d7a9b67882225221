"""The kinds of fault that can be let loose on a real run, and what each takes."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

FaultKind = Literal[
    "kill-rank",
    "exit-rank",
    "segfault-rank",
    "freeze-rank",
    "spin-rank",
    "slow-rank",
    "kill-agent",
    "lose-node",
    "partition-node",
    "kill-controller",
    "corrupt-shard",
    "full-disk",
    "slow-disk",
]
KINDS: tuple[FaultKind, ...] = get_args(FaultKind)


class Traits(NamedTuple):
    """What a kind of fault is aimed at and does."""

    target: Literal["rank", "node", "controller"]
    lasting: bool
    """Whether it takes `for`: it ends by itself after that long."""
    summary: str


CATALOGUE: dict[FaultKind, Traits] = {
    "kill-rank": Traits("rank", lasting=False, summary="SIGKILL to a rank's process"),
    "exit-rank": Traits("rank", lasting=False, summary="the rank raises an exception"),
    "segfault-rank": Traits("rank", lasting=False, summary="SIGSEGV to a rank's process"),
    "freeze-rank": Traits("rank", lasting=True, summary="SIGSTOP; with `for`, SIGCONT afterwards"),
    "spin-rank": Traits(
        "rank", lasting=False, summary="endless loop; `holdGil` blocks all threads"
    ),
    "slow-rank": Traits("rank", lasting=True, summary="the rank gets `share` of its time"),
    "kill-agent": Traits("node", lasting=False, summary="SIGKILL to a node's agent"),
    "lose-node": Traits("node", lasting=False, summary="agent, ranks and memory of a node vanish"),
    "partition-node": Traits("node", lasting=True, summary="the agent is alive but unreachable"),
    "kill-controller": Traits("controller", lasting=False, summary="SIGKILL to the controller"),
    "corrupt-shard": Traits("node", lasting=False, summary="bits flip in the newest checkpoint"),
    "full-disk": Traits("node", lasting=True, summary="writes to the durable tier get ENOSPC"),
    "slow-disk": Traits("node", lasting=True, summary="each durable operation takes `delay` more"),
}
