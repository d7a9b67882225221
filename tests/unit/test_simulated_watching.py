"""What detectors of silent corruption notice: by kind, by who looks, and what files say of it."""

from typing import Any

import msgspec
import pytest
import yaml

from orchestrator import compose
from orchestrator.document import BadFileError
from orchestrator.faults.corruption import CORRUPTION_KINDS, CorruptionShare, check, kind_at
from orchestrator.faults.sections import ModelError
from orchestrator.worlds.simulated import profiles
from orchestrator.worlds.simulated.watching import Detectors, Watch, Watching

MODEL = compose.packaged_model()
STEP_S = 6.5


def watch(detectors: Detectors) -> Watch:
    habits = profiles.packaged("measured").habits
    assert habits is not None
    assert habits.silent is not None
    watching = Watching(value=detectors, origin="assumed", source="a test wants it so")
    return msgspec.structs.replace(habits.silent, watching=watching)


def seen(detectors: Detectors, holders: int = 8) -> set[str]:
    looks = watch(detectors)
    return {k for k in CORRUPTION_KINDS if looks.see(k, holders=holders, step_s=STEP_S)}


def test_digests_see_state_the_replay_what_ranks_compute_and_none_nothing() -> None:
    assert seen("both") == set(CORRUPTION_KINDS)
    assert seen("digests") == {"state"}
    assert seen("none") == set()


def test_state_that_nobody_else_holds_is_compared_with_nothing() -> None:
    assert seen("both", holders=1) == set(CORRUPTION_KINDS) - {"state"}


@pytest.mark.parametrize(("holders", "proven"), [(2, False), (3, True)])
def test_of_two_who_hold_the_same_neither_is_proven_to_be_wrong(
    *, holders: int, proven: bool
) -> None:
    noticed = watch("digests").see("state", holders=holders, step_s=STEP_S)

    assert noticed is not None
    assert noticed.proven is proven


def test_a_corruption_is_noticed_half_a_period_after_its_onset_and_a_period_a_look_later() -> None:
    looks = watch("both")
    tell_s, every = looks.tell.seconds, looks.replay_every.value
    rare = looks.notices["rare"].looks.value

    once = looks.see("oneshot", holders=8, step_s=STEP_S)
    late = looks.see("rare", holders=8, step_s=STEP_S)

    assert once is not None
    assert late is not None
    assert once.after_s == pytest.approx(tell_s)
    assert late.after_s == pytest.approx((rare - 0.5) * every * STEP_S + tell_s)
    assert late.every == every


def test_shares_of_the_packaged_model_are_of_every_kind_and_of_the_whole() -> None:
    assert [each.name for each in MODEL.corruption] == list(CORRUPTION_KINDS)
    drawn = [kind_at(MODEL.corruption, (n + 0.5) / 1000) for n in range(1000)]

    for each in MODEL.corruption:
        assert drawn.count(each.name) / 1000 == pytest.approx(each.share, abs=0.001)
    assert kind_at((), 0.5) is None


def share(name: Any, of: float) -> CorruptionShare:
    return CorruptionShare(name=name, share=of, assumption="a test wants it so")


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ([share("state", 0.5), share("rare", 0.4)], "sum to 0.9, expected 1"),
        ([share("state", 0.5), share("state", 0.5)], "'state' is there twice"),
    ],
)
def test_shares_that_are_not_of_the_whole_are_refused(
    shares: list[CorruptionShare], said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        check(shares)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("watching/value", "eyes", "invalid enum value 'eyes'"),
        ("replayEvery/value", 0, "Expected `int` >= 1"),
        ("tell/value", "5", "span is '5'"),
        ("notices/state/recall/samples", 0, "expected samples with what was measured"),
        ("notices/state/recall/value", 1.5, "Expected `float` <= 1.0"),
        ("notices/sometimes", {}, "sometimes"),
    ],
)
def test_what_a_profile_can_not_say_of_detectors_is_refused(
    path: str, value: Any, said: str
) -> None:
    told = yaml.safe_load(profiles.text(profiles.packaged("measured"), json=False))
    *parents, last = path.split("/")
    section = told["habits"]["silent"]
    for name in parents:
        section = section[name]
    section[last] = value

    with pytest.raises(BadFileError) as caught:
        profiles.parse(yaml.safe_dump(told), "mine.yaml")
    assert said.lower() in str(caught.value).lower()
