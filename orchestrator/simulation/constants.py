"""What a simulated cluster takes besides what its profile says, each with where it comes from.

They belong to what befalls a machine, not to a system that runs on it: all profiles share them.
"""

from __future__ import annotations

from typing import Final

from orchestrator.worlds.simulated.profile import Constant

PROBE_AFTER_DEATH: Final = Constant(
    1.0, "assumed", "until an agent has read the driver's log after a rank of its node died"
)
GPU_PROBE_EVERY: Final = Constant(
    10.0, "published", "between two looks of an agent at its GPUs: arXiv 2509.16293, Table 3"
)
LINK_PROBE_EVERY: Final = Constant(
    30.0, "published", "between two looks of an agent at its links: arXiv 2509.16293, Table 3"
)
PLANNED_OUT: Final = Constant(
    1_800.0, "assumed", "until a node is back that an operation, or its owner, wanted"
)
RELAPSES_MEAN: Final = Constant(
    3_600.0,
    "assumed",
    "until a node that came back unrepaired fails again, once it is in the job",
)
LEAVES: Final = Constant(
    60.0, "assumed", "from the word that a node can not be used until it is switched off"
)
SUSPECTED_OUT: Final = Constant(
    1_800.0,
    "assumed",
    "until a healthy node that was taken out with a bad one has passed its tests",
)

BY_NAME: Final = {
    "probeAfterDeath": PROBE_AFTER_DEATH,
    "gpuProbeEvery": GPU_PROBE_EVERY,
    "linkProbeEvery": LINK_PROBE_EVERY,
    "plannedOut": PLANNED_OUT,
    "relapsesMean": RELAPSES_MEAN,
    "leaves": LEAVES,
    "suspectedOut": SUSPECTED_OUT,
}
"""All of them, seconds, as reports name them."""
