"""What detectors cost is measured over stretches in which all of them are at work."""

from orchestrator.campaign import costs, job
from trainer.replay import Pace
from trainer.shares import Place, share_of


def test_each_stretch_has_a_replay_or_the_median_of_them_would_leave_it_out() -> None:
    spec = job.usual().spec
    work = share_of(spec.trainer, Place(0, spec.parallelism.dp_replicate, 0, 1))

    assert costs.STRETCH_STEPS % Pace(spec.detection.replay_share, work).every == 0
