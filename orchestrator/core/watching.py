"""Where nothing looks for wrong state, and why. The trainer goes by the same rules."""

from __future__ import annotations

from orchestrator.protocol.fitting import EMBEDDED
from orchestrator.protocol.runfile import TrainingRun

REPLICAS_MAJORITY = 3
_BITS = "two processes are not known to get the same bits on a GPU"
_REPLAYS_ON = {
    "cpu": "on",
    "cuda": f"off: {_BITS}; samples are read twice all the same",
    "auto": f"on where ranks compute on CPUs; off on GPUs: {_BITS}; samples are read twice",
}
_TESTED = "on; on GPUs as long as tests say that ranks come to the same bits"


def looks(run: TrainingRun, replicas: int) -> bool:
    """Whether anything looks for wrong state, as far as is known: a program may by itself.

    Args:
        run: what is run.
        replicas: that train now.
    """
    if digests(run, replicas).startswith("on"):
        return True
    # Which device `auto` takes is known on the ranks alone; it would be GPUs on most nodes, and
    # there it takes a test.
    told = replays(run, replicas)
    return told == "on"


def digests(run: TrainingRun, replicas: int) -> str:
    """Say whether replicas are compared, and why not.

    Args:
        run: what is run.
        replicas: that train now.
    """
    if run.spec.trainer.entrypoint != EMBEDDED:
        return "left to the program, which has them with trainer.watch.Watched"
    if run.spec.detection.digest_share == 0:
        return "off: spec.detection.digestShare is 0"
    if replicas < 2:
        return "off: one replica (spec.parallelism.dpReplicate) has none to be compared with"
    if replicas < REPLICAS_MAJORITY:
        return f"on; of {replicas} replicas that differ nobody can say which is right"
    return f"on: the majority of {replicas} replicas says who differs"


def replays(run: TrainingRun, replicas: int) -> str:
    """Say whether ranks compute each other's micro-batches once more, and why not.

    Args:
        run: what is run.
        replicas: that train now.
    """
    spec = run.spec
    if spec.trainer.entrypoint != EMBEDDED:
        return "off: only the embedded trainer has them"
    if spec.detection.replay_share == 0:
        return "off: spec.detection.replayShare is 0"
    if replicas * run.layout.dp_shard == 1:
        return "off: there is nobody else to compute it"
    if spec.detection.replays_on_gpus and spec.trainer.device != "cpu":
        return _TESTED
    return _REPLAYS_ON[spec.trainer.device]
