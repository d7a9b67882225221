"""What `holdfast describe` prints of scripted runs."""

from pathlib import Path

import pytest

from orchestrator.protocol.ids import NodeId, Rank, Step
from orchestrator.protocol.messages import DetectorFailed, StateDiverged
from orchestrator.protocol.timeouts import Timeouts
from orchestrator.worlds.folder import RunFolder
from tests.conftest import RUN, Cluster
from tests.journals import (
    killed_rank,
    raising,
    told,
    write,
)

pytestmark = pytest.mark.usefixtures("home")


def test_describe_run_prints_every_timeout_with_its_rule(demo: RunFolder) -> None:
    out = told("describe", "run", "demo")

    rows = Cluster(RUN).state.timeouts.table()
    assert len(rows) == len(Timeouts.__struct_fields__) - 1
    for name, value, rule in rows:
        (line,) = [line for line in out.splitlines() if f" {name} " in line]
        assert f" {value:g} " in line
        assert line.endswith(rule)
    assert str(demo.root) in out
    assert "kill-rank rank 1 at step 13: found by inc-1 after 20 ms" in out


def test_describe_run_says_which_detectors_raised_and_where(home: Path) -> None:
    cluster = killed_rank()
    for rank in (2, 0):
        off = DetectorFailed(
            generation=cluster.state.generation,
            ranks=(Rank(rank),),
            detector="digests",
            reason="ValueError: no",
        )
        assert cluster.say("node-1", off) == []
    write(cluster, home / "demo")

    out = told("describe", "run")

    assert "detector digests was switched off on rank 2: ValueError: no" in out
    assert "detector digests was switched off on rank 0" not in out, "the first is enough"
    assert "detector digests was switched off on rank 0" in told("get", "events")


@pytest.mark.usefixtures("demo")
def test_describe_incident_tells_what_broke_what_was_done_why_and_what_it_cost() -> None:
    out = told("describe", "incident", "inc-1")

    for part in (
        "training again after 250 ms",
        "rank 1 on node-0 was ended by signal 9 (SIGKILL) in forward after step 13",
        "it was planned: fault 0 of the fault plan",
        "restart in place: every node looks well",
        "continued from step 10: own memory (4 ranks)",
        "3 steps done again (11 to 13)",
        "lost_work: steps that are done again",
        "planned fault: kill-rank rank 1 at step 13",
        "+0.250 s",
        "docs/runbook.md#crash",
        "holdfast logs demo --rank 1",
    ):
        assert part in out


def test_describe_run_says_how_much_arithmetic_the_newest_whole_line_tells_of(
    demo: RunFolder,
) -> None:
    assert "Arithmetic" not in told("describe", "run", "demo")

    numbers = '"loss":2.5,"gradNorm":0.5,"learningRate":0.1,"tokens":64,"seconds":0.5'
    rates = '"tokensPerS":128.0,"tflopsPerGpu":{},"mfu":{}'
    lines = [
        f'{{"generation":1,"step":{step},{numbers},{rates.format(speed, share)}}}'
        for step, speed, share in ((4, 399.96, 0.404), (5, 0.5, "null"))
    ]
    demo.steps.write_text(lines[0] + "\n" + lines[1])
    assert "Arithmetic:   400 TFLOPS per rank, MFU 40.4 % (step 4)" in told("describe", "run")

    demo.steps.write_text("\n".join(lines) + "\n")
    assert "Arithmetic:   0.5 TFLOPS per rank (step 5)" in told("describe", "run", "demo")


def test_describe_run_says_what_the_newest_evaluation_came_to(demo: RunFolder) -> None:
    assert "Evaluation" not in told("describe", "run", "demo")

    sources = "{" + ",".join(f'"s{n}/":{n}.5' for n in range(1, 7)) + "}"
    numbers = '"generation":1,"step":{},"loss":2.25,"samples":32,"sources":{}'
    lines = [f"{{{numbers.format(step, of)}}}\n" for step, of in ((20, "{}"), (40, sources))]

    demo.evaluations.write_text(lines[0])
    assert "Evaluation:   loss 2.2500 on 32 samples after step 20\n" in told(
        "describe", "run", "demo"
    )
    demo.evaluations.write_text("".join(lines))
    words = "after step 40; s1/ 1.5000; s2/ 2.5000; s3/ 3.5000; s4/ 4.5000; 2 more\n"
    assert words in told("describe", "run", "demo")


def test_describe_incident_shows_the_traceback_of_what_ended_the_run(home: Path) -> None:
    write(raising(), home / "demo")

    out = told("describe", "incident")

    assert "inc-2: exception, ended the run (Failed)" in out
    assert '|   File "a.py", line 1, in f' in out
    assert "signature: ValueError at a.py:1:f (after step 5)" in out


def test_describe_incident_says_a_long_evidence_once(home: Path) -> None:
    cluster = killed_rank()
    evidence = "digests of weights differ: rank 1 has 075d3a52aec7281f, two ranks 6a9eaddfa47de27e"
    fact = StateDiverged(
        generation=cluster.state.generation,
        step=cluster.state.reached_step,
        since=Step(11),
        nodes=(NodeId("node-0"),),
        ranks=(Rank(1),),
        evidence=evidence,
        proven=True,
    )
    cluster.after(0.1).say("node-0", fact)
    write(cluster, home / "demo")

    out = told("describe", "incident")

    assert out.count(evidence) == 1
    assert f"What broke:\n  {evidence}" in out
    assert "s: what broke, above\n" in out
    assert "because rank 0, rank 1, node-0: what broke, above; " in out


def test_an_incident_that_is_open_says_so(home: Path) -> None:
    cluster = killed_rank()
    cluster.lose("node-2")
    cluster.lose("node-1")
    cluster.after(2).tick()
    write(cluster, home / "demo")

    out = told("describe", "incident")

    assert "inc-2: node-lost, OPEN for 2.00 s; the run is Gathering" in out
    assert "nothing yet; the run is Gathering" in out
    assert "began: node-1 ended" in out


def test_describe_incident_cuts_a_long_time_line_in_its_middle(home: Path) -> None:
    cluster = killed_rank()
    cluster.lose("node-2")
    cluster.lose("node-1")
    for incarnation in range(2, 102):
        cluster.after(0.1).join("node-2", incarnation=incarnation)
        cluster.lose("node-2")
    write(cluster, home / "demo")

    out = told("describe", "incident")

    assert "lines: holdfast get events --run demo" in out
    assert out.count("\n") < 120


@pytest.mark.usefixtures("demo")
def test_describe_node_and_checkpoint_tell_who_holds_what() -> None:
    assert "step 10: shards of ranks 0, 1, 2, 3" in told("describe", "node", "node-1")
    assert "inc-1" in told("describe", "node", "node-0")
    for name in ("step-10", "10", "checkpoint/step-10"):
        assert "node-0, node-1" in told("describe", "checkpoint", name)
