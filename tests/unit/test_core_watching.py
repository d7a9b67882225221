"""Whoever asks hears where nothing looks for wrong state, and why."""

from typing import Any

import msgspec
import pytest

from orchestrator.core import watching
from orchestrator.protocol.runfile import TrainingRun
from tests import runfiles


def said(replicas: int = 3, **sections: dict[str, Any]) -> tuple[str, str]:
    run = msgspec.convert(runfiles.fields("watched", **sections), TrainingRun)
    return watching.digests(run, replicas), watching.replays(run, replicas)


def test_three_replicas_have_both() -> None:
    digests, replays = said(trainer={"device": "cpu"})

    assert (digests, replays) == ("on: the majority of 3 replicas says who differs", "on")
    assert "nobody can say which is right" in said(2)[0]


@pytest.mark.parametrize("name", ["tp", "cp", "pp"])
def test_groups_that_share_a_micro_batch_compute_those_of_others(name: str) -> None:
    cut = {"dpReplicate": 3, "dpShard": 1, name: 2}
    assert said(parallelism=cut, trainer={"device": "cpu"})[1] == "on"
    assert said(1, parallelism=cut)[1] == "off: there is nobody else to compute it"


def test_one_replica_is_compared_with_nothing_and_replayed_if_it_has_shards() -> None:
    assert said(1, parallelism={"dpReplicate": 1, "dpShard": 4})[1].startswith("on")
    digests, replays = said(1, parallelism={"dpReplicate": 4, "dpShard": 1})
    assert digests.startswith("off: one replica")
    assert replays == "off: there is nobody else to compute it"


def test_what_is_switched_off_names_the_field() -> None:
    assert said(detection={"digestShare": 0.0, "replayShare": 0.0}) == (
        "off: spec.detection.digestShare is 0",
        "off: spec.detection.replayShare is 0",
    )


def test_gpus_are_not_replayed_since_two_processes_on_them_may_differ() -> None:
    assert said(trainer={"device": "cuda"})[1].startswith("off: two processes are not known")
    assert said(trainer={"device": "auto"})[1].startswith("on where ranks compute on CPUs; off on")
    asked = {"replaysOnGpus": True}
    assert said(trainer={"device": "cuda"}, detection=asked)[1].startswith("on; on GPUs as long as")
    assert said(trainer={"device": "cpu"}, detection=asked)[1] == "on"
    assert said(trainer={"device": "cpu"})[1] == "on"
