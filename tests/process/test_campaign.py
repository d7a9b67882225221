"""`holdfast campaign` strikes a small live world, and says how much of it was noticed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from orchestrator.campaign import calm, catalogue, conduct, job
from tests import runfiles
from tests.runs import HEEDING, REPOSITORY

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]
FEW = ("--clean-steps", "0", "--pairs", "0", "--no-whole-runs")


def command(*arguments: str) -> list[str]:
    return [*HEEDING, str(Path(sys.executable).with_name("holdfast")), "campaign", *arguments]


def holdfast(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=380, check=False,
        cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


def shares(told: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {
        name: (share["count"], share["of"])
        for name, share in told["summary"].items()
        if share is not None and "of" in share
    }


def test_forty_trials_with_an_interrupt_find_every_fault_of_state_and_name_its_rank(
    tmp_path: Path,
) -> None:
    """One test: to bring a world to where faults are let loose on it takes as long as they do."""
    out = tmp_path / "out"
    page = tmp_path / "page.html"
    asked = ("--trials", "40", "--seed", "11", *FEW, "--out", str(out), "-o", "json")
    first = interrupted(out, tmp_path / "err", *asked)
    (out / "room" / "left by one that was killed").mkdir(parents=True)

    told = json.loads(holdfast(*asked, "--html", str(page)).stdout)

    assert results(out)[: len(first)] == first
    assert (told["done"], told["trajectories"]) == (40, 1)
    clean = sum(line.get("clean_steps", 0) for line in known(out))
    # Twins of two snapshots, of which each step is counted once, although they were taken twice.
    assert clean == told["summary"]["false_alarms_per_1000_steps"]["of"] <= 2 * (4 + 120)
    found = shares(told)
    assert found["state_recall"][0] == found["state_recall"][1] >= 10
    state = [row for row in told["by_class"] if row["group"] == "state"]
    assert all(row["exact"]["count"] == row["recall"]["count"] for row in state)
    assert max(row["latency_max"] or 0 for row in state) <= 1
    assert told["alarms"] == []
    persistent = [row for row in told["by_class"] if row["group"] == "persistent"]
    noticed, of = found["persistent_compute_recall"]
    # Low bits need not show in the one micro-batch in sixteen that is computed once more.
    assert noticed >= 0.8 * of >= 4
    assert all(row["exact"]["count"] == row["recall"]["count"] for row in persistent)
    # A wrong product enters the sum over ranks: whatever compares replicas sees nothing of it.
    assert sum(row["baselines"]["hash of replicas"] for row in persistent) == 0
    assert "<svg" in page.read_text()
    # What is done is not done again.
    begun = time.monotonic()
    assert json.loads(holdfast(*asked).stdout) == told
    assert "40 of 40 trials" in holdfast(*asked[:-2]).stdout
    assert time.monotonic() - begun < 20


def interrupted(out: Path, err: Path, *asked: str) -> list[Any]:
    """Begin a campaign, and interrupt it after two trials; return their results.

    Meanwhile another one is refused, and afterwards nobody is left.
    """
    with err.open("w") as told:
        begun = subprocess.Popen(command(*asked), cwd=REPOSITORY, stdout=told, stderr=told)
    deadline = time.monotonic() + 120
    while not (out / "room").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    other = holdfast(*asked, code=1)
    while "2 of 40" not in err.read_text():
        assert time.monotonic() < deadline, err.read_text()
        assert begun.poll() is None, err.read_text()
        time.sleep(0.1)
    begun.send_signal(signal.SIGINT)

    assert "a campaign is under way there already" in other.stderr
    assert begun.wait(30) == 130
    assert "the same command goes on from here" in err.read_text()
    assert not [entry for entry in Path("/proc").iterdir() if str(out) in _words(entry)]
    assert not (out / "room").exists()
    kept = results(out)
    # The third may have been over by the time that it was heard.
    assert 2 <= len(kept) <= 3
    return kept


def known(out: Path) -> list[Any]:
    """Return what the file of a campaign has been told, without what says which one it is."""
    return [json.loads(line) for line in (out / "campaign.jsonl").read_bytes().splitlines()[1:]]


def results(out: Path) -> list[Any]:
    return [line["result"] for line in known(out) if "result" in line]


def _words(process: Path) -> str:
    try:
        return (process / "cmdline").read_text() if process.name.isdigit() else ""
    except OSError:
        return ""


def test_steps_without_a_fault_are_of_another_run_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that begins anew in the same way would say nothing new, however long it went on."""
    monkeypatch.setattr(calm, "RUN_STEPS", 4)
    with calm.Calm(job.small(), tmp_path, seed=1, taken=12) as steps:
        for count in (2, 2, 1):
            steps.rest(count)

        assert (steps.clean_steps, steps.alarms, steps.false_triggers) == (5, [], 0)
    setups = [json.loads((tmp_path / f"world-{n}" / "setup.json").read_bytes()) for n in (12, 16)]
    seeds = {setup["job"]["trainer"]["seed"] for setup in setups}
    assert len({*seeds, job.small().spec.trainer.seed}) == 3


def test_a_campaign_goes_from_one_trajectory_to_the_next_and_each_trial_comes_out_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is interrupted goes on in the middle of a trajectory, with nothing counted twice."""
    monkeypatch.setattr(catalogue, "TRIALS_OF_ONE", 3)
    monkeypatch.setattr(conduct, "SNAPSHOTS", (2, 4))
    trials = catalogue.draw(1, 5, ranks=job.RANKS, snapshots=2, groups=("state",))

    with conduct.Conductor(job.small(), tmp_path / "all") as conductor:
        whole = [conductor.conduct(trial) for trial in trials]
        steps = conductor.clean_steps
    with conduct.Conductor(job.small(), tmp_path / "rest", whole[:3], unwatched=True) as conductor:
        again = [conductor.conduct(trial) for trial in trials[3:]]
        rest = conductor.clean_steps

    assert [result.trainer_seed for result in whole] == [trial.trainer_seed for trial in trials]
    setups = [json.loads(file.read_bytes()) for file in sorted(tmp_path.glob("all/*/setup.json"))]
    seeds = [setup["job"]["trainer"]["seed"] for setup in setups]
    assert seeds == list(dict.fromkeys(trial.trainer_seed for trial in trials))
    assert len(seeds) == 2
    struck = {(trial.trainer_seed, trial.snapshot) for trial in trials}
    assert steps == (catalogue.MOMENTS + catalogue.HORIZON["state"]) * len(struck)
    # What they would come to unwatched is told besides, and changes nothing that comes after.
    untold = {"harmful": None, "loss_gap": None, "weight_gap": None}
    assert [msgspec.structs.replace(result, **untold) for result in again] == whole[3:]
    assert {type(result.harmful) for result in again if result.effective} == {bool}
    before = {(trial.trainer_seed, trial.snapshot) for trial in trials[:3]}
    assert rest == (catalogue.MOMENTS + catalogue.HORIZON["state"]) * len(struck - before)


def test_a_run_that_is_not_marked_for_it_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(runfiles.text())

    done = holdfast(str(run), "--out", str(tmp_path / "out"), code=2)

    assert "spec.campaign is false, expected true" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_whose_state_no_two_ranks_share_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    fields = msgspec.to_builtins(job.small())
    fields["spec"]["parallelism"] = {"dpReplicate": 1, "dpShard": 3}
    run.write_text(yaml.safe_dump(fields))

    assert "dpShard, tp, pp and cp are 1" in holdfast(str(run), code=2).stderr


def test_the_folder_of_another_campaign_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "campaign.jsonl").write_text("{}\n")
    done = holdfast("--trials", "2", *FEW, "--out", str(out), code=2)
    assert "not the results of a campaign" in done.stderr

    kept = {"seed": 1, "trials": 2, "whole_runs": False, "run": msgspec.to_builtins(job.small())}
    (out / "campaign.jsonl").write_text(json.dumps(kept) + "\n")
    done = holdfast("--trials", "2", "--seed", "2", *FEW, "--out", str(out), code=2)
    assert "seed of the campaign that lies there is another one" in done.stderr
    asked = ("--trials", "2", "--seed", "1", *FEW, "--out", str(out))
    done = holdfast(*asked, "--groups", "state", code=2)
    assert "groups of the campaign that lies there is another one" in done.stderr
    done = holdfast(*asked, "--groups", "stat", code=2)
    assert "--groups has 'stat', expected some of state, persistent" in done.stderr
    assert "less than or equal to" in holdfast("--seed", str(1 << 63), code=2).stderr
