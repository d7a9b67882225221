"""One rank stands still without an error, on real processes: it is named, whatever holds it."""

from pathlib import Path

import pytest

from tests.runs import Job, steps_job

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("phase", "options", "where"),
    [
        ("DATA", (), "is in none after 11, others wait in 12"),
        ("BACKWARD", ("pairs",), "has entered 11 of pair@2 and rank 3 waits there in 12"),
    ],
    ids=["a loader that waits for itself", "a collective of two that one leaves out"],
)
def test_a_rank_that_never_enters_what_the_others_wait_in_is_named(
    tmp_path: Path, phase: str, options: tuple[str, ...], where: str
) -> None:
    folders = {name: tmp_path / name for name in ("lockstep", *options)}
    for folder in folders.values():
        folder.mkdir()
    run = steps_job(
        **{f"trainer__options__{name}": str(folder) for name, folder in folders.items()},
        nodes__spares=0,
        trainer__options__stuck_rank=2,
        trainer__options__stuck_in=phase,
    )
    job = Job(tmp_path, run)
    _, report = job.conduct("--quiet")

    assert report.state == "Succeeded"
    (found,) = report.incidents
    assert found.kind == "hang"
    assert found.suspects == ["rank 2", "node-1"]
    assert where in found.evidence[0]
    assert found.detected_after_s < 10
    (lonely,) = (stack for stack in found.stacks if 2 in stack.ranks)
    assert lonely.ranks == (2,)
    assert any(frame.startswith("main (steps.py") for frame in lonely.frames)
    assert not any("_await_others" in frame for frame in lonely.frames)
    others = [stack for stack in found.stacks if stack is not lonely]
    assert all(any("_await_others" in f for f in stack.frames) for stack in others)
    assert {rank for stack in others for rank in stack.ranks} == {0, 1, 3}
    told = job.holdfast("describe", "incident", found.id, "--run", report.run).stdout
    assert "rank 2, suspected:" in told
