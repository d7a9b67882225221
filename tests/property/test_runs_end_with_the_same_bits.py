"""Whatever is let loose on a run, it ends with the bits of its undisturbed twin.

pytest tests/property/test_runs_end_with_the_same_bits.py --seeds 50
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.core.report import Report
from tests import drawn, tiny
from tests.runs import Job

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]
RUNS: dict[int, dict[str, Any]] = {2: tiny.RUN, 3: copy.deepcopy(tiny.RUN)}
"""By the number of their nodes. Two swap their copies; on three, copies go round in a circle."""
RUNS[3]["spec"]["nodes"] = {"count": 3, "ranksPerNode": 1, "spares": 1}
RUNS[3]["spec"]["parallelism"] = {"dpReplicate": 1, "dpShard": 3}
RUNS[3]["spec"]["trainer"]["globalBatch"] = 3


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("--seeds")))


@pytest.fixture
def nodes(seed: int) -> int:
    """How many nodes a seed trains on: a third of them on three, one of the first two."""
    return 3 if seed % 3 == 1 else 2


@pytest.fixture(scope="module")
def twin_of_three(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return tiny.undisturbed(tmp_path_factory.mktemp("twin"), RUNS[3])


@pytest.fixture
def disturbed(seed: int, nodes: int, tmp_path: Path) -> Iterator[Job]:
    run = RUNS[nodes]
    ranks = nodes * run["spec"]["nodes"]["ranksPerNode"]
    plan = drawn.plan(seed, steps=tiny.STEPS, nodes=nodes, ranks=ranks, spares=1)
    job = Job(tmp_path, run, plan)
    yield job
    job.close()


def test_a_drawn_fault_plan_changes_no_bit(
    seed: int, nodes: int, disturbed: Job, request: pytest.FixtureRequest
) -> None:
    code, report = disturbed.conduct("--quiet", timeout_s=250)

    words = f"seed {seed}: {json.dumps(disturbed.faults)}; {report.reason}"
    assert code == 0, words
    # Of the two, only that which is wanted is run, and once.
    twin = request.getfixturevalue("twin" if nodes == 2 else "twin_of_three")
    tiny.assert_same_bits(report, twin, words)
    assert disturbed.leftovers() == []
