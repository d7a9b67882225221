"""Whether a fault was effective, noticed, and by whom; and what it all comes to."""

from typing import Any

import msgspec
import pytest

from orchestrator.campaign.baselines import Seen, flagged
from orchestrator.campaign.catalogue import Group, Trial
from orchestrator.campaign.judging import Result, Watched, judged, onset
from orchestrator.campaign.summary import Clean, campaign, per_thousand
from orchestrator.cli import campaigns
from orchestrator.cli.choices import Form
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.injections import Injection
from orchestrator.protocol.messages import StateDiverged
from orchestrator.protocol.trials import StepRow

FIRST = 200


def seen(step: int, *, state: str = "", losses: float | None = 2.0, odd: int = -1) -> Seen:
    """Return a step of three ranks; rank `odd` has other weights than the others."""
    return Seen(
        tuple(
            StepRow(
                step=step,
                loss=losses,
                grad_norm=1.0,
                weights="odd" if rank == odd else "w",
                state=f"{step}{state}",
                struck=0,
            )
            for rank in range(3)
        )
    )


BEFORE = [seen(step, losses=2.0 + 0.01 * (step % 7)) for step in range(1, FIRST)]
TWIN = [seen(step) for step in range(FIRST, FIRST + 12)]


def trial(site: Any = "weights", group: Group = "state") -> Trial:
    how = Injection(site=site, form="flip", rank=Rank(1), step=2, bits=(3,))
    return Trial(number=4, name="a class", group=group, injection=how)


def told(step: int, *ranks: int, proven: bool = True) -> StateDiverged:
    return StateDiverged(
        generation=Generation(3),
        step=Step(step - 1),
        since=Step(step - 2),
        nodes=(NodeId("node-1"),),
        ranks=tuple(map(Rank, ranks)),
        evidence="differs",
        proven=proven,
    )


def judge(steps: list[Seen], *found: StateDiverged, **changes: Any) -> Result:
    of = changes.pop("trial", trial())
    watched = Watched(**{"refused": ["", "", ""], "steps": steps, "found": list(found), **changes})
    return judged(of, before=BEFORE, twin=TWIN, watched=watched)


def test_a_fault_that_leaves_no_trace_does_not_count() -> None:
    result = judge(TWIN[:6])

    assert (result.effective, result.noticed) == (False, False)


def test_what_is_found_before_the_first_wrong_step_is_applied_has_no_latency() -> None:
    steps = [TWIN[0], seen(FIRST + 1, state="x"), seen(FIRST + 2, state="x")]

    assert onset(TWIN, steps) == FIRST + 1
    result = judge(steps, told(FIRST + 1, 1))

    assert (result.effective, result.noticed, result.latency) == (True, True, 0)
    assert result.named == "exact"


@pytest.mark.parametrize(
    ("fact", "named"),
    [
        (told(FIRST + 2, 1), "exact"),
        (told(FIRST + 2, 1, proven=False), "among others"),
        (told(FIRST + 2, 0, 1, 2), "among others"),
        (told(FIRST + 2, 0), "wrong"),
        (told(FIRST + 2), "nobody"),
    ],
)
def test_the_culprit_is_named_exactly_only_alone_and_proven(
    fact: StateDiverged, named: str
) -> None:
    result = judge([TWIN[0], *(seen(FIRST + n, state="x") for n in (1, 2))], fact)

    assert (result.named, result.latency) == (named, 1)


def test_a_step_that_was_thrown_away_before_it_moved_anything_is_noticed_at_once() -> None:
    result = judge(TWIN[:3], told(FIRST + 3, 1), thrown=[FIRST + 3])

    assert (result.effective, result.noticed, result.latency) == (True, True, 0)
    # Without, it was gone by the end of its step.
    assert not judge(TWIN[:3], told(FIRST + 2, 1)).effective


def test_what_goes_on_with_the_bits_of_its_twin_after_it_was_noticed_is_unharmed() -> None:
    back = [TWIN[0], seen(FIRST + 1, state="x"), TWIN[2], TWIN[3]]

    assert judge(back, told(FIRST + 2, 1)).unharmed
    assert not judge(back[:2], told(FIRST + 2, 1)).unharmed
    assert not judge(back).unharmed, "nobody noticed it: it was no repair"


def test_of_two_detectors_the_one_that_saw_it_first_counts() -> None:
    steps = [seen(FIRST + n, state="x") for n in range(3)]

    result = judge(steps, told(FIRST + 2, 0, 1, proven=False), told(FIRST + 1, 1))

    assert (result.latency, result.named) == (1, "exact")


def test_what_is_said_before_the_fault_is_let_loose_is_a_false_alarm_and_notices_nothing() -> None:
    steps = [TWIN[0], seen(FIRST + 1, state="x"), seen(FIRST + 2, state="x")]

    result = judge(steps, told(FIRST, 1))

    assert (result.noticed, result.alarms) == (False, ("differs",))
    assert judge(TWIN[:3], told(FIRST, 1)).alarms == ("differs",), "though it left no trace"
    assert judge(steps, told(FIRST + 1, 1)).alarms == ()
    # Of bytes that a rank begins with, the first step may tell.
    assert judge(steps, told(FIRST, 1), trial=trial("copied")).alarms == ()
    found = campaign([result], seed=1, trials=1, ranks=3, clean=Clean(1000, ("x",)), pairs=[])
    assert found.alarms == ["x", "differs"]
    assert found.summary.false_alarms_per_1000_steps.count == 2


def test_who_names_the_rank_of_a_bit_that_changed_and_left_no_trace_raises_no_false_alarm() -> None:
    """As of the sign of a zero, to which something is added in the same step."""
    struck = [
        Seen(tuple(msgspec.structs.replace(r, struck=int(s.of_ranks[0].step > FIRST))
                   for r in s.of_ranks))
        for s in TWIN[:3]
    ]  # fmt: skip

    assert judge(struck, told(FIRST + 1, 1)).alarms == ()
    assert not judge(struck, told(FIRST + 1, 1)).effective
    assert judge(struck, told(FIRST + 1, 0)).alarms == ("differs",), "somebody else"
    assert judge(struck, told(FIRST + 1, 0, 1)).alarms == ("differs",), "and somebody else"
    assert judge(struck, told(FIRST, 1)).alarms == ("differs",), "before it changed"
    assert judge(TWIN[:3], told(FIRST + 1, 1)).alarms == ("differs",), "it changed nothing"


def test_what_is_found_after_the_horizon_is_missed() -> None:
    steps = [seen(FIRST + n, state="x") for n in range(9)]

    assert not judge(steps, told(FIRST + 8, 1)).noticed
    assert not judge(steps, told(FIRST + 3, 1)).noticed, "in the fourth wrong step of three"
    assert judge(steps, told(FIRST + 2, 1)).noticed


def test_a_world_that_breaks_has_been_noticed_by_no_detector() -> None:
    wrong = [TWIN[0], seen(FIRST + 1, state="x")]

    silent = judge(TWIN[:1], crash="rank 1 raised IndexError: out of range")

    assert (silent.effective, silent.noticed, silent.crashed) == (True, False, True)
    assert (silent.named, silent.latency) == ("nobody", None)
    assert "IndexError" in silent.evidence
    assert judge(wrong, crash="rank 1 is gone").crashed
    heard = judge(wrong, told(FIRST + 1, 1), crash="rank 1 is gone")
    assert (heard.noticed, heard.crashed, heard.named) == (True, False, "exact")


def test_what_is_said_of_a_fault_that_has_left_no_trace_is_a_false_alarm() -> None:
    result = judge(TWIN[:6], told(FIRST + 2, 0))

    assert (result.effective, result.noticed, result.alarms) == (False, False, ("differs",))


def test_a_step_that_is_thrown_away_before_the_fault_makes_it_no_effective_one() -> None:
    result = judge(TWIN[:6], told(FIRST, 1), thrown=[FIRST])

    assert (result.effective, result.alarms) == (False, ("differs",))


def test_who_names_the_culprit_and_then_somebody_else_as_proven_was_wrong() -> None:
    steps = [TWIN[0], *(seen(FIRST + n, state="x") for n in (1, 2, 3))]

    assert judge(steps, told(FIRST + 2, 1), told(FIRST + 3, 0)).named == "wrong"
    assert judge(steps, told(FIRST + 2, 1), told(FIRST + 3, 0, proven=False)).named == "exact"


def test_bytes_that_are_refused_are_noticed_and_name_whose_they_are() -> None:
    result = judge([], trial=trial("staged"), refused=["", "ShardCorruptError: differs", ""])

    assert (result.effective, result.noticed, result.latency) == (True, True, 0)
    assert result.named == "exact"


def test_baselines_see_the_same_steps() -> None:
    calm = [seen(FIRST), seen(FIRST + 1)]
    assert set(flagged(BEFORE, calm).values()) == {None}

    assert flagged(BEFORE, [*calm, seen(FIRST + 2, losses=None)])["not finite"] == FIRST + 2
    assert flagged(BEFORE, [*calm, seen(FIRST + 2, losses=21.0)])["10x spike"] == FIRST + 2
    spike = flagged(BEFORE, [*calm, seen(FIRST + 2, losses=2.3)])
    assert spike["6 sigma, 128 steps"] == FIRST + 2
    assert spike["10x spike"] is None
    assert flagged(BEFORE, [seen(FIRST, odd=1)])["hash of replicas"] == FIRST


def test_a_baseline_that_has_cried_wolf_may_still_see_the_fault() -> None:
    steps = [seen(FIRST, odd=2), seen(FIRST + 1, state="x", odd=1)]

    assert (
        judged(
            trial(), before=BEFORE, twin=[steps[0], TWIN[1]], watched=Watched(steps=steps)
        ).baselines["hash of replicas"]
        == 1
    )


def test_an_outlier_widens_the_six_sigma_window_and_hides_the_next_one() -> None:
    spikes = [seen(FIRST, losses=9.0), seen(FIRST + 1), seen(FIRST + 2, losses=2.3)]

    assert flagged(BEFORE, spikes[:1])["6 sigma, 128 steps"] == FIRST
    assert flagged([*BEFORE, spikes[0]], spikes[1:])["6 sigma, 128 steps"] is None


def results() -> list[Result]:
    """Return six that count, of which two were missed and one crashed; one left no trace."""
    base = {"name": "a", "group": "state"}
    rules = {"baselines": dict.fromkeys(flagged([], []))}
    return [
        Result(
            number=0,
            effective=True,
            noticed=True,
            latency=0,
            named="exact",
            unharmed=True,
            **base,
            **rules,
        ),
        Result(number=1, effective=True, noticed=True, latency=2, named="wrong", **base, **rules),
        Result(number=2, effective=True, noticed=False, **base, **rules),
        Result(number=3, effective=False, **base),
        Result(number=4, name="b", group="oneshot", effective=True, **rules),
        Result(number=5, name="c", group="rare", effective=True, crashed=True, **rules),
        Result(number=6, name="c", group="rare", effective=True, noticed=True, latency=3, **rules),
    ]


def test_a_summary_counts_what_was_effective_and_publishes_what_was_missed() -> None:
    found = campaign(
        results(),
        seed=1,
        trials=9,
        ranks=3,
        clean=Clean(3000, (), 3),
        pairs=[(1.02, 1.0)] * 3,
    )

    summary = found.summary
    assert (summary.state_recall.count, summary.state_recall.of) == (2, 3)
    assert (summary.state_unharmed.count, summary.state_unharmed.of) == (1, 2)
    assert summary.oneshot_recall.value == 0.0
    assert summary.persistent_compute_recall.value is None
    assert (summary.culprit_exact.count, summary.culprit_exact.of) == (1, 3)
    assert (summary.rare_recall.count, summary.rare_recall.of) == (1, 2)
    assert summary.false_alarms_per_1000_steps.high == pytest.approx(1.229, abs=0.001)
    assert summary.false_triggers_per_1000_steps.value == pytest.approx(1.0)
    assert summary.overhead is not None
    assert summary.overhead.value == pytest.approx(0.02)
    assert found.misses == {"a": 1, "b": 1}
    (first, third, second) = found.by_class
    assert (first.trials, first.masked, first.latency_median, first.latency_max) == (4, 1, 1.0, 2)
    assert second.baselines == dict.fromkeys(flagged([], []), 0)
    assert (third.trials, third.crashed, third.recall.count) == (2, 1, 1)
    assert found.crashed == {"c": 1}
    assert found.done == 7
    text = campaigns.shown(found, Form.TEXT)
    assert "Not noticed, but raised something" in text
    assert "Rare, p = 0.01" in text


def test_false_alarms_are_told_per_thousand_steps() -> None:
    found = per_thousand(3, 2000)

    assert (found.value, found.count, found.of) == (1.5, 3, 2000)
