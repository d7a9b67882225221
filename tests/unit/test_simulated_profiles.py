"""Profiles: where every number comes from, how it grows, and what is said of a bad file."""

from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import compose
from orchestrator.document import BadFileError
from orchestrator.faults.cluster import Cluster
from orchestrator.worlds.simulated import profiles
from orchestrator.worlds.simulated.profile import Constant, Kind, Profile, kind_of

SIZES = (8, 512, 2_048, 16_384, 40_000, 98_304, 131_072)


def every_constant(profile: Profile) -> dict[str, Constant]:
    habits = profile.habits
    assert habits is not None
    own = {"detectWithin": habits.detect_within, "durable": habits.durable}
    if habits.memory:
        own["memory"] = habits.memory
    if habits.requeue:
        own["requeue"] = habits.requeue
    return profile.constants() | own | dict(habits.detect) | dict(habits.localise)


@pytest.mark.parametrize("name", profiles.names())
def test_a_packaged_profile_is_read_and_says_where_every_number_comes_from(name: str) -> None:
    profile = profiles.packaged(name)

    assert profile.name == name
    assert profile.about
    for constant in every_constant(profile).values():
        assert constant.source
        assert all(point.source for point in constant.points)
        assert constant.value >= 0


def test_what_the_issue_names_comes_with_holdfast() -> None:
    wanted = ("byterobust-like", "llama-like", "measured", "torchrun-like")

    assert profiles.names() == wanted


@pytest.mark.parametrize("name", profiles.names())
def test_a_profile_that_is_written_is_read_back_the_same(name: str, tmp_path: Path) -> None:
    profile = profiles.packaged(name)
    (tmp_path / "one.json").write_text(profiles.text(profile, json=True))
    (tmp_path / "one.yaml").write_text(profiles.text(profile, json=False))

    assert profiles.read(tmp_path / "one.json") == profile
    assert profiles.read(tmp_path / "one.yaml") == profile


@pytest.mark.parametrize("name", profiles.names())
def test_nothing_takes_less_in_a_larger_job(name: str) -> None:
    profile = profiles.packaged(name)

    for small, large in pairwise(profile.scaled(gpus=size) for size in SIZES):
        for constant, grown in zip(small.constants(), large.constants(), strict=True):
            assert large.constants()[grown].value >= small.constants()[constant].value * (
                1 - 1e-12
            ), constant


@pytest.mark.parametrize("name", profiles.names())
def test_a_scaled_profile_has_every_known_number_at_its_size_with_its_origin(name: str) -> None:
    profile = profiles.packaged(name)

    for known, constant in profile.constants().items():
        for point in constant.points:
            scaled = profile.scaled(gpus=point.gpus).constants()[known]
            assert (scaled.value, scaled.origin) == (point.value, point.origin)
            assert scaled.source == point.source


def test_nccl_goes_from_17_s_at_16k_to_200_s_at_98k_along_a_power_law() -> None:
    profile = profiles.packaged("llama-like")
    between = profile.scaled(gpus=40_132).rendezvous  # the geometric mean of the two sizes

    assert profile.rendezvous.value == 17.0
    assert profile.scaled(gpus=98_304).rendezvous.value == 200.0
    assert between.value == pytest.approx((17 * 200) ** 0.5, rel=1e-4)
    assert between.origin == "published"


def test_what_lies_beyond_all_known_sizes_is_an_assumption() -> None:
    beyond = profiles.packaged("llama-like").scaled(gpus=131_072).rendezvous

    assert beyond.value > 200.0
    assert beyond.origin == "assumed"
    assert "beyond" in beyond.source


def test_between_what_was_measured_and_what_is_assumed_everything_is_assumed() -> None:
    stop = profiles.packaged("measured").scaled(gpus=512).stop

    assert stop.origin == "assumed"


def test_scaling_twice_is_the_same_as_scaling_once() -> None:
    profile = profiles.packaged("measured")

    assert profile.scaled(gpus=512).scaled(gpus=98_304) == profile.scaled(gpus=98_304)


# Whether imitations come near to what is published of whom they imitate ------------------------


def lost_share(profile: Profile, gpus: int = 16_384) -> float:
    """Return which share of time is lost, added up class by class (small losses)."""
    scaled, habits = profile.scaled(gpus=gpus), profile.habits
    assert habits is not None
    every_s = (habits.memory or habits.durable).value
    back_s = scaled.stop.value + scaled.seat.value + scaled.rendezvous.value
    back_s += scaled.load.value + scaled.first_step.value
    back_s += scaled.fetch.value if habits.memory else scaled.read.value
    lost = scaled.stall.value / every_s
    for each in compose.packaged_model().classes:
        share = 1.0 if each.planned else each.interrupting
        per_s = each.hazard.per_s(scaled.step.value) * Cluster(gpus=gpus).count(each.entity) * share
        found_s = habits.detect_s(each)
        assert found_s is not None
        # Whether it stands still until it is known, or computes what will be undone: it is lost.
        lost += per_s * (found_s + habits.localise_s(each) + back_s + every_s / 2)
    return lost


def test_an_imitation_of_llama_3_comes_near_to_what_is_published_of_it() -> None:
    assert 0.89 < 1 - lost_share(profiles.packaged("llama-like")) < 0.92


def test_an_imitation_of_torchrun_comes_near_to_what_is_published_without_better_means() -> None:
    assert 0.88 < 1 - lost_share(profiles.packaged("torchrun-like")) < 0.92


def test_an_imitation_of_byterobust_comes_near_to_what_is_published_of_it() -> None:
    assert 0.965 < 1 - lost_share(profiles.packaged("byterobust-like")) < 0.98


# Fields of a file -------------------------------------------------------------------------------


def test_habits_leave_to_the_detectors_what_they_find_themselves() -> None:
    model = compose.packaged_model()
    measured, legacy = (
        profiles.packaged("measured").habits,
        profiles.packaged("torchrun-like").habits,
    )
    assert measured is not None
    assert legacy is not None

    assert measured.detect_s(model.class_named("gpu-fault")) is None
    assert measured.detect_s(model.class_named("sdc-onset")) == 4 * 3600.0
    assert legacy.detect_s(model.class_named("gpu-fault")) == 600.0
    assert legacy.detect_s(model.class_named("nccl-watchdog")) == 1800.0
    assert legacy.localise_s(model.class_named("gpu-fault")) == 0.0


@pytest.mark.parametrize("name", profiles.names())
def test_what_is_counted_in_detection_is_not_counted_twice(name: str) -> None:
    profile = profiles.packaged(name)
    assert profile.habits is not None
    own = profile.habits.notice.value == "own"

    assert (profile.exit.value > 0) is own
    assert (profile.gone.value > 0) is own


def test_habits_say_of_each_kind_of_fault_how_it_is_found_and_understood() -> None:
    model, habits = compose.packaged_model(), profiles.packaged("byterobust-like").habits
    assert habits is not None
    spans = {
        name: (habits.detect_s(each), habits.localise_s(each))
        for name in (
            "gpu-fault",
            "link",
            "software-bug",
            "nccl-watchdog",
            "sdc-onset",
            "preemption",
        )
        for each in [model.class_named(name)]
    }

    assert spans == {
        "gpu-fault": (10.0, 53.0),
        "link": (30.0, 60.0),
        "software-bug": (60.0, 93.0),
        "nccl-watchdog": (600.0, 60.0),
        "sdc-onset": (600.0, 4289.0),
        "preemption": (0.0, 0.0),
    }
    assert habits.detect_s(model.class_named("planned-operation")) == 0.0


def test_every_class_of_the_fault_model_is_of_a_kind_that_habits_know() -> None:
    kinds = {each.name: kind_of(each) for each in compose.packaged_model().classes}

    assert set(kinds.values()) == set(get_args(Kind))
    assert kinds["storage-stall"] == "storage"
    assert kinds["sdc-false-alarm"] == "sdc"


GUESS = {"origin": "assumed", "source": "a guess"}
SOUND = profiles.plain(profiles.packaged("llama-like"))


def refused(change: Any) -> tuple[str, str]:
    """Message and hint for the sound file with one thing changed."""
    data = msgspec.json.decode(msgspec.json.encode(SOUND))
    change(data)
    with pytest.raises(BadFileError) as caught:
        profiles.parse(yaml.safe_dump(data), "mine.yaml")
    assert str(caught.value).endswith(": mine.yaml")
    assert caught.value.hint
    return str(caught.value), caught.value.hint


def setting(path: str, value: Any) -> Any:
    *parents, last = path.split("/")

    def change(data: Any) -> None:
        for name in parents:
            data = data[int(name) if name.isdigit() else name]
        data[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "said", "hint"),
    [
        ("constants/stop/value", "-5s", "stop: value is -5s, expected 0s or more", "unit"),
        ("constants/stop/value", 5, "constants.stop: value is 5 without a unit", "unit"),
        ("constants/stop/value", "5", "constants.stop: span is '5', expected a number and", "unit"),
        ("constants/stop/value", "fast", "constants.stop: span is 'fast'", "unit"),
        ("constants/stop/values", "5s", "unknown field `values`: constants.stop", "`value`?"),
        ("constants/stops", {}, "there is no constant 'stops'", "'stop'?"),
        ("constants/stop/origin", "guessed", "invalid enum value 'guessed'", "explain"),
        ("constants/stop/source", "", "expected `str` of length >= 1", "explain"),
        ("constants/stop/samples", 3, "origin is assumed and samples is 3", "median"),
        ("constants/stop/origin", "measured", "origin is measured and samples is 0", "median"),
        ("constants/stop", {"value": "1s"}, "constants.stop has no `origin`", "published"),
        ("constants/stop", {}, "found neither of `value` and `points`", "depend on size"),
        ("constants/seat/value", "1s", "found both of `value` and `points`", "depend on size"),
        ("constants/seat/source", "me", "constants.seat has points, and an origin", "its own"),
        ("constants/seat/points/0/gpus", 100_000, "37s at 100000 GPUs is followed by", "ascending"),
        ("constants/seat/points/0/value", "600s", "600s at 16384 GPUs is followed", "ascending"),
        ("constants/seat/points/0/value", "0s", "expected more than 0s, growing", "ascending"),
        ("constants/seat/points/1/gpus", 16_385, "no more than with the power of 8", "far enough"),
        ("constants/seat/points/0/value", 37, "points[0]: value is 37 without a unit", "unit"),
        ("constants/stop/varies", {"sigma": 3.0, **GUESS}, "stop.varies.sigma is 3, expect", "0.2"),
        ("constants/stop/varies", {"sigma": 0.0, **GUESS}, "more than 0 and at most 2", "0.2"),
        ("constants/stop/varies", {"sigma": 0.1}, "missing required field `origin`", "explain"),
        ("habits/spares/value", "hot", "habits.spares.value is 'hot', expected one of", "profiles"),
        ("habits/spares/value", "requeue", "habits.requeue is missing", "scheduler"),
        ("habits/localise/gpu", {}, "there is no kind of fault 'gpu'", "there are: hang"),
        ("habits/colour", "red", "unknown field `colour`", "notice"),
        ("name", "Llama 3", "expected `str` matching regex", "explain"),
        ("kind", "FaultModel", "invalid enum value 'FaultModel'", "explain"),
    ],
)  # fmt: skip
def test_a_bad_profile_is_refused_with_what_is_wrong_where_and_what_to_do(
    path: str, value: Any, said: str, hint: str
) -> None:
    message, advice = refused(setting(path, value))

    assert said in message
    assert hint in advice


def test_what_varies_does_so_around_its_mean_and_at_every_size() -> None:
    rendezvous = profiles.packaged("measured").scaled(gpus=40_000).rendezvous
    chance = np.random.Generator(np.random.Philox(0))

    drawn = np.array([rendezvous.drawn(chance) for _ in range(4_000)])

    assert rendezvous.varies is not None
    assert drawn.mean() == pytest.approx(rendezvous.value, rel=0.02)
    assert np.log(drawn).std() == pytest.approx(rendezvous.varies.sigma, rel=0.05)


def test_a_profile_without_some_constants_is_refused_naming_them() -> None:
    def without(data: Any) -> None:
        del data["constants"]["stop"], data["constants"]["firstStep"]

    message, hint = refused(without)

    assert "constants has no stop, firstStep, expected all 19 constants" in message
    assert "holdfast measure" in hint


def test_a_profile_that_is_not_there_is_refused_with_the_nearest_that_is() -> None:
    with pytest.raises(BadFileError, match="there is no profile 'lama-like'") as caught:
        profiles.packaged("lama-like")

    assert "'llama-like'" in caught.value.hint


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda data: data.decode("latin-1")))
def test_any_text_is_a_profile_or_refused(text: str) -> None:
    with pytest.raises(BadFileError):
        profiles.parse(text, "mine.yaml")


ANY = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
SPANS = st.sampled_from(["0s", "1us", "0.000000001ms", "5ms", "999999999d", "-1s", "s"])


@given(
    st.sampled_from(["value", "origin", "source", "samples", "points", "other"]),
    ANY | SPANS | st.lists(st.fixed_dictionaries({"gpus": ANY, "value": SPANS}), max_size=3),
    st.sampled_from(["constants/stop", "constants/seat", "habits/durable", "habits/detect/sdc"]),
)
def test_whatever_stands_in_one_place_it_is_taken_or_refused(
    field: str, value: Any, path: str
) -> None:
    data = msgspec.json.decode(msgspec.json.encode(SOUND))
    setting(f"{path}/{field}", value)(data)
    refusal = None
    try:
        profile = profiles.parse(msgspec.json.encode(data).decode(), "mine.json")
    except BadFileError as error:
        refusal = error
    if refusal is not None:
        assert ": mine.json" in str(refusal)
        assert refusal.hint
    else:
        assert profile.scaled(gpus=1 << 24).constants().keys() == profile.constants().keys()


def test_growth_as_steep_as_is_taken_can_be_scaled_to_any_size() -> None:
    data = msgspec.json.decode(msgspec.json.encode(SOUND))
    for index, (gpus, value) in enumerate([(8, "0.001ms"), (4096, "999999999d")]):
        setting(f"constants/seat/points/{index}/gpus", gpus)(data)
        setting(f"constants/seat/points/{index}/value", value)(data)

    scaled = profiles.parse(yaml.safe_dump(data), "mine").scaled(gpus=1 << 24)

    assert scaled.seat.value > 1e13
