"""How each class of a fault model shows in a cluster: what the controller gets to see of it.

The model says what breaks and how often; nothing here knows how long it takes to be noticed. That
is up to the detectors that really run, and to what a world takes: the period of a probe, the time
until collectives fail.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from orchestrator.faults.model import Effect, FaultClass

Sign = Literal[
    "vanish",
    "abort",
    "stall",
    "unlinked",
    "cut",
    "jam",
    "raise",
    "hang",
    "slow",
    "wrong",
    "drain",
    "taken",
    "save-fails",
    "nothing",
]
"""How a fault shows.

vanish: agent, ranks and memory of a node are gone. abort: the library ends a rank by SIGABRT, and a
probe names the node when it looks after the death. stall: a rank stands still without an error, and
the next probe names the node. unlinked: collectives fail, nobody dies, the next probe names the
node. cut: nobody reaches the nodes any more. jam: collectives fail for everybody, nobody is to
blame. raise: a rank raises an exception. hang: all ranks stand still, nobody stands out. slow:
steps take longer. wrong: numbers are wrong, seen or not. drain: a planned operation. taken: the
owner takes a node. save-fails: the durable tier does not answer. nothing: transports and ranks ride
over it, or nothing is seen of it.
"""

Sort = Literal["seen", "silent", "planned", "slow", "saving", "mistaken"]
"""seen: it interrupts the job at once, and nobody planned it. silent: it would interrupt the job if
anybody knew. planned: an operation. slow, saving: the job goes on. mistaken: nothing was broken."""

SIGNS: Mapping[str, Sign] = MappingProxyType(
    {
        "gpu-fault": "abort",
        "hbm-fatal": "abort",
        "hbm-remap": "nothing",
        "gpu-sram": "abort",
        "gpu-system-processor": "stall",
        "gpu-thermal": "abort",
        "sdc-onset": "wrong",
        "sdc-latent": "wrong",
        "sdc-false-alarm": "nothing",
        "nic": "unlinked",
        "ssd": "abort",
        "power-supply": "vanish",
        "chassis": "vanish",
        "io-board": "vanish",
        "cpu": "vanish",
        "system-memory": "vanish",
        "host-maintenance": "vanish",
        "slow-node": "slow",
        "slow-node-transient": "slow",
        "preemption": "taken",
        "link": "unlinked",
        "link-flap": "nothing",
        "rack-switch": "cut",
        "fabric": "jam",
        "power-domain": "vanish",
        "power-smoothing": "slow",
        "congestion": "slow",
        "software-bug": "raise",
        "dependency": "raise",
        "nccl-watchdog": "hang",
        "storage-stall": "save-fails",
        "planned-operation": "drain",
    }
)
"""Of the classes of the packaged model. Which of the GPU's faults abort and which stall is assumed
after arXiv 2407.21783, section 3.3.4: remote faults often appear as stalled loads and stores, with
no error code; a system processor (GSP) that times out is of that kind (arXiv 2503.11901)."""

OF_EFFECT: Mapping[Effect, tuple[Sign, Sign]] = MappingProxyType(
    {
        "crash": ("vanish", "raise"),
        "hang": ("stall", "hang"),
        "network": ("unlinked", "jam"),
        "slow": ("slow", "slow"),
        "sdc": ("wrong", "wrong"),
        "drain": ("drain", "drain"),
        "preempt": ("taken", "taken"),
        "save-fails": ("save-fails", "save-fails"),
        "worn": ("nothing", "nothing"),
        "false-alarm": ("nothing", "nothing"),
    }
)
"""Of a class that is not in the packaged model: if it is of a node, and if it is of the job."""


def sign_of(fault: FaultClass) -> Sign:
    """Return how a class shows; one that is not in the packaged model by its effect."""
    if fault.name in SIGNS:
        return SIGNS[fault.name]
    of_node, of_job = OF_EFFECT[fault.effect]
    everybodys = fault.entity in ("job", "pod") or fault.cause == "software"
    return of_job if everybodys else of_node


def sort_of(fault: FaultClass, sign: Sign, *, fatal: bool) -> Sort:
    """Return what a fault that shows in this way means for the job."""
    if fault.planned:
        return "planned"
    match sign:
        case "slow" | "nothing":
            return "slow"
        case "save-fails":
            return "saving"
        case "wrong" if not fatal:
            return "silent"
        case _:
            return "seen"
