"""What verdicts about devices add up to, and who may give them."""

from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.standing import (
    ACTORS,
    STRIKES_DAYS,
    TRANSITIONS,
    Act,
    Actor,
    DeviceVerdict,
    Proof,
    Standing,
    fold,
    mermaid,
    refusal,
)
from orchestrator.protocol.ids import Serial

ROOT = Path(__file__).parents[2]
DAY_S = 86_400.0


def verdict(
    act: Act, *, day: float = 0.0, actor: Actor | None = None, **said: str
) -> DeviceVerdict:
    proof = said.get("proof", "replay" if act is Act.CONVICTED else "")
    return DeviceVerdict(
        serial=Serial(said.get("serial", "m-1")),
        act=act,
        actor=actor or ACTORS[act][0],
        by="ann",
        reason=said.get("reason", f"{act} on day {day:g}"),
        proof=Proof(proof),
        at=day * DAY_S,
        id=f"{act}/{day}",
    )


def standing(*verdicts: DeviceVerdict) -> Standing:
    return fold(verdicts)[Serial("m-1")].standing


def test_the_diagram_in_the_docs_is_the_table() -> None:
    assert f"```mermaid\n{mermaid()}\n```" in (ROOT / "docs/states.md").read_text(encoding="utf-8")


def test_every_standing_can_be_reached_and_left() -> None:
    arrows = {(a, b) for moves in TRANSITIONS.values() for a, b in moves.items() if a is not b}

    assert {after for _, after in arrows} == set(Standing)
    assert {before for before, _ in arrows} == set(Standing)


def test_a_device_comes_back_by_steps() -> None:
    told = [
        verdict(Act.SUSPECTED, day=1),
        verdict(Act.CONVICTED, day=2),
        verdict(Act.RELEASED, day=3),
        verdict(Act.PASSED, day=4),
        verdict(Act.CLEARED, day=5),
    ]

    assert [standing(*told[: n + 1]) for n in range(5)] == [
        Standing.SUSPECT,
        Standing.QUARANTINED,
        Standing.RETEST,
        Standing.PROBATION,
        Standing.HEALTHY,
    ]


def test_however_often_it_is_suspected_a_device_is_not_barred() -> None:
    assert standing(*(verdict(Act.SUSPECTED, day=day) for day in range(20))) is Standing.SUSPECT


@pytest.mark.parametrize("between", [(Act.RELEASED,), (Act.RELEASED, Act.PASSED, Act.CLEARED)])
def test_the_second_conviction_within_ninety_days_retires(between: tuple[Act, ...]) -> None:
    back = [verdict(act, day=1) for act in between]
    first, second = verdict(Act.CONVICTED), verdict(Act.CONVICTED, day=STRIKES_DAYS)

    assert standing(first, *back, second) is Standing.RETIRED


def test_two_runs_that_convict_for_one_fault_do_not_retire() -> None:
    told = [verdict(Act.CONVICTED), verdict(Act.CONVICTED, day=0.1)]

    assert standing(*told) is Standing.QUARANTINED
    assert standing(*told, verdict(Act.RELEASED), verdict(Act.CONVICTED)) is Standing.RETIRED


def test_an_operator_may_end_a_probation_that_nothing_else_does() -> None:
    told = [verdict(act) for act in (Act.CONVICTED, Act.RELEASED, Act.PASSED, Act.RELEASED)]

    assert standing(*told) is Standing.HEALTHY


def test_a_conviction_of_long_ago_does_not_count_as_the_first() -> None:
    back = [verdict(act, day=1) for act in (Act.RELEASED, Act.PASSED, Act.CLEARED)]
    second = verdict(Act.CONVICTED, day=STRIKES_DAYS + 1)

    assert standing(verdict(Act.CONVICTED), *back, second) is Standing.QUARANTINED


def test_nobody_is_convicted_without_a_proof() -> None:
    hearsay = verdict(Act.CONVICTED, proof="")

    assert refusal(hearsay) == "nobody is convicted without a proof"
    assert standing(hearsay) is Standing.HEALTHY


@pytest.mark.parametrize(
    ("act", "actor"),
    [
        (act, actor)
        for act, actor in product(Act, ("controller", "preflight", "operator"))
        if actor not in ACTORS[act]
    ],
)
def test_who_may_not_say_so_changes_nothing(act: Act, actor: Actor) -> None:
    convicted = verdict(Act.CONVICTED)
    for before in ([], [convicted], [convicted, verdict(Act.RELEASED)]):
        wrong = verdict(act, actor=actor, proof="replay")

        assert refusal(wrong)
        records = fold([*before, wrong])
        assert records[Serial("m-1")].standing is (
            fold(before)[Serial("m-1")].standing if before else Standing.HEALTHY
        )


def test_a_verdict_that_comes_too_late_is_kept_and_changes_nothing() -> None:
    record = fold([verdict(Act.CONVICTED, reason="digests differ"), verdict(Act.PASSED)])[
        Serial("m-1")
    ]

    assert (record.standing, record.why, record.verdicts) == (
        Standing.QUARANTINED,
        "digests differ",
        2,
    )


@given(
    st.lists(
        st.tuples(
            st.sampled_from(Act),
            st.sampled_from(["controller", "preflight", "operator"]),
            st.sampled_from(Proof),
            st.integers(0, 200),
        ),
        max_size=12,
    )
)
def test_whatever_was_said_only_proof_or_a_person_bars_a_device(
    said: list[tuple[Act, Actor, Proof, int]],
) -> None:
    told = [verdict(act, day=day, actor=actor, proof=proof) for act, actor, proof, day in said]
    proven = any(v.act is Act.CONVICTED and not refusal(v) for v in told)
    asked = any(v.act is Act.RETIRED and not refusal(v) for v in told)

    for record in fold(told).values():
        assert not record.standing.barred or proven or asked
        assert len(record.convicted_at) <= sum(v.act is Act.CONVICTED for v in told)
