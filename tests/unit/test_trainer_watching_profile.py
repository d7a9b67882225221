"""How often the job of the packaged profile looks at itself, by the formulas of the trainer."""

from orchestrator.protocol.runfile import Detection
from orchestrator.worlds.simulated import profiles
from trainer.replay import every
from trainer.shares import Share
from trainer.watch import period_of

WEIGHTS, TOKENS, GPUS, REPLICAS = 405e9, 16 * 2**20, 16_384, 8
KINDS = 4  # weights, both moments, the gradient
MICRO_BATCHES = [range(16)]


def test_a_job_of_405b_on_16k_gpus_looks_as_often_as_its_profile_says() -> None:
    habits = profiles.packaged("measured").habits
    assert habits is not None
    assert habits.silent is not None
    shares = Detection()

    words = KINDS * WEIGHTS / (GPUS / REPLICAS)
    digests = period_of(words, 6 * WEIGHTS * TOKENS / GPUS, "cuda", shares.digest_share)
    replays = every(shares.replay_share, Share(MICRO_BATCHES, MICRO_BATCHES))

    assert habits.silent.digest_every.value == digests
    assert habits.silent.replay_every.value == replays
