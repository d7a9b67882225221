"""What fewer replicas are counted as: their speed, what is lost, and whose bits are the same."""

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator import compose
from orchestrator.core.phases import RunPhase
from orchestrator.policy import shrinking
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.simulation import checkers
from tests import runfiles
from tests.conftest import Cluster
from tests.replicas import (
    Wide,
    hold,
    shrunk,
    until_it_pays,
)
from tests.runs import steps_job
from tests.simulated import SimulatedJob


def test_training_with_half_the_replicas_counts_as_half_and_its_incident_pays_the_rest() -> None:
    job = SimulatedJob(
        steps_job(
            nodes__spares=0,
            parallelism={"dpReplicate": 2, "dpShard": 2},
            recovery={"minReplicas": 1},
            trainer__options={"step_s": 0.1},
        ),
        [{"when": {"step": 20}, "fault": "lose-node", "node": "node-1"}],
    )

    _, told = job.conduct()

    trained_s = 40 * 0.2  # from step 20 on, at half the speed
    assert told.ledger["lost_capacity"] == pytest.approx(trained_s / 2, rel=0.05)
    assert told.incidents[0].ledger["lost_capacity"] == told.ledger["lost_capacity"]
    assert told.ledger["effective"] == pytest.approx(60 * 0.1, rel=0.05)
    assert sum(told.ledger.values()) == pytest.approx(told.wall_s, abs=1e-6)
    assert (told.replicas, told.replicas_least) == (1, 1)
    assert told.ettr == pytest.approx(told.ledger["effective"] / told.wall_s, abs=1e-6)


def test_what_was_learned_of_steps_is_stretched_with_them(wide: Wide) -> None:
    cluster = wide(4, 1)
    before_s = cluster.state.step_times.quantile(0.5)

    cluster.lose("node-1")

    assert cluster.state.step_times.quantile(0.5) == pytest.approx(before_s * 4 / 3)


def test_the_journal_of_a_world_that_shrinks_and_grows_leads_to_the_same_decisions(
    wide: Wide,
) -> None:
    cluster = shrunk(wide)
    cluster.join("node-1", incarnation=2)
    until_it_pays(cluster)
    cluster.train(1)
    hold(cluster, cluster.state.reached_step)
    cluster.resume()
    assert cluster.state.phase is RunPhase.TRAINING

    fresh = checkers.check(cluster.run, cluster.entries)

    assert [r.after for r in fresh.state.resizes] == [3, 4]
    assert fresh.state.ledger.spans() == cluster.state.ledger.spans()


@pytest.mark.parametrize(
    ("batch", "micro", "replicas", "speed"),
    [(128, 1, 7, (16, 19)), (128, None, 7, (1, 2)), (8, 1, 4, (1, 2)), (100, 3, 6, (6, 8))],
    ids=["many rounds", "one round", "half", "a batch that does not divide"],
)
def test_speed_follows_from_how_many_rounds_the_replica_with_most_of_them_takes(
    batch: int, micro: int | None, replicas: int, speed: tuple[int, int]
) -> None:
    trainer = {"globalBatch": batch} | ({} if micro is None else {"microBatch": micro})
    sections = {"nodes": {"count": 8}, "parallelism": {"dpReplicate": 8}, "trainer": trainer}

    run = compose.parse(runfiles.text(**sections), TrainingRun, "run.yaml")

    assert run.speed(replicas) == speed


@pytest.mark.parametrize(
    ("sections", "least"),
    [
        ({"trainer": {"reduction": "deterministic"}}, 4),
        ({"trainer": {}}, 7),
        ({"trainer": {"reduction": "deterministic", "entrypoint": "mine:main"}}, 7),
        ({"trainer": {}, "recovery": {"minReplicas": 2}}, 2),
        ({"trainer": {"reduction": "deterministic"}, "recovery": {"minReplicas": 7}}, 7),
    ],
    ids=["same bits", "other bits", "who knows", "told to", "told not to"],
)
def test_a_run_that_was_not_told_otherwise_shrinks_only_if_its_result_stays_the_same(
    sections: dict[str, Any], least: int, cluster_of: Callable[[str], Cluster]
) -> None:
    sections["trainer"]["globalBatch"] = 7
    text = runfiles.text(nodes={"count": 7}, parallelism={"dpReplicate": 7}, **sections)

    assert shrinking.least(cluster_of(text).state) == least
