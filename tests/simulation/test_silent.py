"""Silent corruption in whole runs: what it costs depends on who looks for it."""

import msgspec
import pytest

from orchestrator import compose
from orchestrator.faults.corruption import CorruptionKind, CorruptionShare
from orchestrator.simulation.experiment import Outcome, conduct, inputs
from orchestrator.simulation.settings import Settings, SettingsError
from orchestrator.worlds.simulated import profiles
from orchestrator.worlds.simulated.profile import Profile
from orchestrator.worlds.simulated.watching import Detectors, Watching
from tests.experiments import BRISK, given

MODEL = compose.packaged_model()


def profile(detectors: Detectors) -> Profile:
    habits = profiles.packaged("measured").habits
    assert habits is not None
    assert habits.silent is not None
    watching = Watching(value=detectors, origin="assumed", source="a test wants it so")
    silent = msgspec.structs.replace(habits.silent, watching=watching)
    return msgspec.structs.replace(BRISK, habits=msgspec.structs.replace(habits, silent=silent))


def corrupted(kind: CorruptionKind, detectors: Detectors, **settings: object) -> Outcome:
    """A run of 8 hours in which numbers are silently wrong once."""
    classes = tuple(msgspec.structs.replace(each, fatal=0.0) for each in MODEL.classes)
    only = (CorruptionShare(name=kind, share=1.0, assumption="a test wants it so"),)
    model = msgspec.structs.replace(MODEL, classes=classes, corruption=only)
    asked = {"minutes": 480.0, "save_every": "30s", "durable_every": "10m", **settings}
    return conduct(
        given({"sdc-onset": 1}, model=model, profile=profile(detectors), **asked),  # type: ignore[arg-type]
        4,
    )


@pytest.mark.parametrize(
    ("kind", "detectors", "noticed"),
    [
        ("state", "digests", True),
        ("persistent", "digests", False),
        ("persistent", "both", True),
        ("state", "none", False),
    ],
)
def test_what_a_detector_sees_is_undone_at_once_and_what_none_sees_after_hours(
    *, kind: CorruptionKind, detectors: Detectors, noticed: bool
) -> None:
    found = corrupted(kind, detectors)

    assert found.silent == {f"{kind}, {'noticed' if noticed else 'missed'}": 1}
    assert (found.silent_s < 30) is noticed
    assert (found.silent_s > 1_800) is not noticed
    if noticed:
        assert found.ledger["lost_work"] < 700
        assert found.incidents == {"silent-corruption": 1}
        assert found.spares["removals"] == 1


def test_what_is_wrong_on_one_of_two_replicas_takes_both_nodes_out_and_brings_both_back() -> None:
    found = corrupted("state", "digests", replicas=2, spares=3)

    assert found.silent == {"state, noticed": 1}
    assert found.spares["removals"] == 2
    assert found.incidents == {"silent-corruption": 1}


def test_without_replicas_nobody_has_what_state_could_be_compared_with() -> None:
    found = corrupted("state", "digests", replicas=1)

    assert found.silent == {"state, missed": 1}


def test_who_looks_changes_nothing_of_what_befalls_a_run() -> None:
    drawn = {"gpus": 512, "days": 0.5, "class_rates": {"sdc-onset": 0.0}}

    digests, both = (
        conduct(inputs(Settings(**drawn, watch=watch)), 3)  # type: ignore[arg-type]
        for watch in ("digests", "both")
    )

    assert digests.moments == both.moments
    assert digests.ledger == both.ledger


def test_a_profile_that_does_not_say_what_its_detectors_see_is_not_asked_to_look() -> None:
    with pytest.raises(SettingsError, match="'llama-like' does not say what detectors notice"):
        inputs(Settings(gpus=64, days=0.02, profile="llama-like", watch="both"))
