"""However often and whenever the controller is killed, nothing is lost and nothing is done twice.

pytest tests/property/test_controller_is_killed_at_any_moment.py --seeds 50
"""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from orchestrator.core import journal
from orchestrator.core.decisions import StartGeneration
from orchestrator.core.report import Report
from orchestrator.faults.plan import FaultPlan
from orchestrator.protocol.ids import Generation
from tests import tiny
from tests.killing import Killer
from tests.runs import Job, steps_job

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]
STEPS = 200
KINDS = ("kill-rank", "exit-rank", "segfault-rank", "freeze-rank", "kill-agent", "lose-node")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        seeds = metafunc.config.getoption("--seeds")
        dear = "twin" in metafunc.fixturenames
        metafunc.parametrize("seed", range(max(seeds // 2, 1) if dear else seeds))


def drawn(seed: int, *, count: int, steps: int) -> list[dict[str, Any]]:
    """Return so many faults of ranks and nodes at different steps; at most one node is lost."""
    chance = np.random.Generator(np.random.Philox(seed))
    moments = sorted(chance.choice(np.arange(8, steps * 3 // 4), count, replace=False).tolist())
    faults: list[dict[str, Any]] = []
    for step in moments:
        lost = any(fault["fault"] == "lose-node" for fault in faults)
        kind = KINDS[int(chance.integers(len(KINDS) - lost))]
        target: dict[str, Any] = {"rank": int(chance.integers(4))}
        if kind in ("kill-agent", "lose-node"):
            target = {"node": f"node-{int(chance.integers(2))}"}
        faults.append({"when": {"step": step}, "fault": kind, **target})
    return faults


@pytest.fixture
def job_of(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    made: list[Job] = []

    def make(run: dict[str, Any], faults: list[dict[str, Any]]) -> Job:
        made.append(Job(tmp_path, run, faults))
        return made[0]

    yield make
    for job in made:
        job.close()


def test_a_run_whose_controller_is_killed_at_any_moment_ends_exactly_right(
    seed: int, job_of: Callable[..., Job], tmp_path: Path
) -> None:
    (tmp_path / "lockstep").mkdir()
    options = {"steps": STEPS, "step_s": 0.05, "save_every": 5, "durable_every": 20}
    options["lockstep"] = str(tmp_path / "lockstep")
    run = steps_job(trainer__steps=STEPS, trainer__options=options)
    job = job_of(run, drawn(seed, count=3, steps=STEPS))

    report, words = endure(job, seed, kills=8)

    assert report.losses == [(step, 1.0 / step) for step in range(1, STEPS + 1)], words
    # Of each of the four shards: (steps, rank).
    assert report.final_state_digest == f"{4 * STEPS:016x}{0 + 1 + 2 + 3:016x}", words
    assert (report.divergences, report.replicas_differ) == ([], []), words


def test_a_llama_whose_controller_is_killed_at_any_moment_ends_with_the_same_bits(
    seed: int, job_of: Callable[..., Job], twin: Report
) -> None:
    job = job_of(tiny.RUN, drawn(seed, count=2, steps=tiny.STEPS))

    report, words = endure(job, seed, kills=6)

    tiny.assert_same_bits(report, twin, words)


def endure(job: Job, seed: int, *, kills: int) -> tuple[Report, str]:
    """Run a job while its controller is killed; return its report and how it came about."""
    job.start("--quiet")
    killer = Killer(job, seed)
    killer.kill(kills)
    code = killer.watch(200)

    words = f"seed {seed}: {json.dumps(job.faults)}; killed {'; '.join(killer.kills)}"
    report = job.report()
    assert code == 0, f"{words}; {report.reason}"
    # On a busy machine a run may be over before its controller has come up so often.
    assert len(killer.kills) >= 2, words
    assert sum(round(s * 1e6) for s in report.ledger.values()) == round(report.wall_s * 1e6)
    assert_replays(job)
    assert_nothing_was_done_twice(job, killer, words)
    assert job.leftovers() == []
    return report, words


def assert_replays(job: Job) -> None:
    """The command itself says that every decision on record follows from what happened."""
    command = [str(Path(sys.executable).with_name("holdfast")), "replay", str(job.folder.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "byte for byte the same" in done.stdout


def assert_nothing_was_done_twice(job: Job, killer: Killer, words: str) -> None:
    """Ask those who would have done it: agents, ranks, and the store."""
    agents = {path.parent.name: path.read_text() for path in job.folder.nodes.glob("*/agent.log")}
    entered = Counter(
        f"{node} enters generation {generation}"
        for node, log in agents.items()
        for generation in re.findall(r"generation (\d+) begins", log)
    )
    assert entered, words
    assert max(entered.values()) == 1, f"{words}: {entered.most_common(3)}"

    seated = Counter(
        place
        for path in job.folder.logs.glob("rank-*.log")
        # What the trainer without torch says when it takes a seat; the Llama says nothing.
        for place in re.findall(r"pid \d+ (generation \d+ rank \d+)", path.read_text())
    )
    assert set(seated.values()) <= {1}, f"{words}: {seated.most_common(3)}"

    plan = msgspec.json.decode(job.folder.plan_file.read_bytes(), type=FaultPlan)
    let_loose = {
        text: sum(log.count(f"fault plan: {text}\n") for log in agents.values())
        for text in (fault.describe() for fault in plan.faults)
    }
    # One that is due on a node that another one has just ended does not happen at all.
    assert set(let_loose.values()) <= {0, 1}, f"{words}: {let_loose}"
    assert 1 in let_loose.values(), words

    twice = {name: inodes for name, inodes in killer.commits.items() if len(inodes) != 1}
    assert killer.commits, words
    assert twice == {}, words
    committed = Counter(checkpoint.step for checkpoint in job.report().checkpoints)
    assert max(committed.values()) == 1, words

    orders: dict[Generation, StartGeneration] = {}
    for entry in journal.read(job.folder.journal.read_bytes()).entries:
        for order in entry.decisions:
            if isinstance(order, StartGeneration):
                # Said again to whoever may not have heard it; never another one.
                assert orders.setdefault(order.generation, order) == order, words
