"""The kinds of fault that can be let loose on a real run, and what each takes."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

FaultKind = Literal[
    "kill-rank",
    "exit-rank",
    "segfault-rank",
    "freeze-rank",
    "spin-rank",
    "block-rank",
    "skip-collective",
    "mismatch-collective",
    "slow-rank",
    "throttle-rank",
    "overload-rank",
    "stall-data",
    "kill-agent",
    "lose-node",
    "partition-node",
    "slow-link",
    "kill-controller",
    "corrupt-shard",
    "full-disk",
    "read-only-disk",
    "slow-disk",
    "flip-bit",
    "wrong-matmul",
]
KINDS: tuple[FaultKind, ...] = get_args(FaultKind)


Extra = Literal[
    "for",
    "holdGil",
    "share",
    "delay",
    "state",
    "tensor",
    "element",
    "bit",
    "atStep",
    "chance",
    "magnitude",
    "times",
]
EXTRAS: tuple[Extra, ...] = get_args(Extra)


class Traits(NamedTuple):
    """What a kind of fault is aimed at, what it takes and does."""

    target: Literal["rank", "node", "controller"]
    takes: tuple[Extra, ...]
    """Fields that shape it. With `for` it ends by itself after that long."""
    summary: str


CATALOGUE: dict[FaultKind, Traits] = {
    "kill-rank": Traits("rank", (), "SIGKILL to a rank's process"),
    "exit-rank": Traits("rank", (), "the rank raises an exception"),
    "segfault-rank": Traits("rank", (), "SIGSEGV to a rank's process"),
    "freeze-rank": Traits("rank", ("for",), "SIGSTOP; with `for`, SIGCONT afterwards"),
    "spin-rank": Traits("rank", ("holdGil",), "endless loop; `holdGil` blocks all threads"),
    "block-rank": Traits("rank", (), "the rank waits in a system call that never returns"),
    "skip-collective": Traits("rank", (), "the rank leaves out its next sum of gradients"),
    "mismatch-collective": Traits("rank", (), "the rank gathers where all others add up gradients"),
    "slow-rank": Traits("rank", ("for", "share"), "the rank gets `share` of its time"),
    "throttle-rank": Traits(
        "rank", ("times",), "whatever the rank computes takes `times` as much of its processor"
    ),
    "overload-rank": Traits(
        "rank", ("times",), "the rank has `times` as much to compute as it says"
    ),
    "stall-data": Traits(
        "rank", ("delay",), "samples come `delay` later; without `delay` no more come at all"
    ),
    "kill-agent": Traits("node", (), "SIGKILL to a node's agent"),
    "lose-node": Traits("node", ("for",), "agent, ranks and memory vanish; `for` gives it back"),
    "partition-node": Traits("node", ("for",), "the agent is alive but unreachable"),
    "slow-link": Traits(
        "node", ("for", "times"), "copies to its buddy take `times` as long; collectives do not"
    ),
    "kill-controller": Traits("controller", (), "SIGKILL to the controller"),
    "corrupt-shard": Traits("node", (), "bits flip in the newest checkpoint"),
    "full-disk": Traits("node", ("for",), "writes to the durable tier get ENOSPC"),
    "read-only-disk": Traits("node", ("for",), "writes to the durable tier get EROFS"),
    "slow-disk": Traits("node", ("for", "delay"), "each durable operation takes `delay` more"),
    "flip-bit": Traits(
        "rank",
        ("state", "tensor", "element", "bit", "atStep"),
        "a bit of a rank's training state flips, and nothing raises an error",
    ),
    "wrong-matmul": Traits(
        "rank",
        ("tensor", "element", "atStep", "chance", "magnitude"),
        "a rank's products come out wrong from now on, each with `chance`",
    ),
}
