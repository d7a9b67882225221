"""What the durable tier does in the background: verify what was written, and keep anchors of it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.core.decisions import JudgeCheckpoint
from orchestrator.core.trust import Verdict
from orchestrator.protocol.ids import Generation, Step
from storage import verdicts
from storage.leases import Leases
from storage.verdicts import Trust, standing_of
from tests.vaults import WITHIN_S, Gate, Tier


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[Tier]:
    tier = Tier(tmp_path / "tier")
    yield tier
    tier.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def trust(tier: Tier, step: int) -> Trust:
    return standing_of(tier.store, step, 1).trust


def test_what_was_committed_is_read_back_and_verified(tier: Tier) -> None:
    vault = tier.open(scrub_mib_per_second=64)

    tier.commit(vault, 20, epoch=1)

    until(lambda: trust(tier, 20) is Trust.BYTES_VERIFIED)


def test_damage_is_found_before_anybody_needs_the_checkpoint(tier: Tier) -> None:
    tier.commit(tier.open(), 20, epoch=1)
    tier.commit(tier.open(), 40, epoch=1)
    tier.damage(20, 1)

    tier.commit(tier.open(scrub_mib_per_second=64), 60, epoch=1)

    until(lambda: standing_of(tier.store, 20, 1).kind == verdicts.SUSPECT)
    until(lambda: trust(tier, 40) is Trust.BYTES_VERIFIED)
    (key,) = standing_of(tier.store, 20, 1).keys
    assert "scrub found expected xxh3-128" in verdicts.reason_of(tier.store, key)


def test_verified_ones_become_anchors_and_others_go(tier: Tier) -> None:
    vault = tier.open(keep_last=2, scrub_mib_per_second=64)
    for step in range(20, 340, 20):
        tier.commit(vault, step, epoch=1)
        until(lambda step=step: trust(tier, step) is Trust.BYTES_VERIFIED)

    steps = tier.steps()
    assert steps[:2] == [320, 300]
    assert steps[-1] <= 160
    assert len(steps) < 9


def test_what_is_just_being_read_back_is_not_deleted_however_long_that_takes(tier: Tier) -> None:
    gate = Gate("get", ".st", by="scrub")
    vault = tier.open(gate, keep_last=1, scrub_mib_per_second=64)
    tier.commit(vault, 20, epoch=1)
    assert gate.reached.wait(WITHIN_S)

    for step in (40, 60, 80):
        tier.commit(vault, step, epoch=1)

    assert tier.steps() == [80, 20]
    gate.opened.set()
    until(lambda: trust(tier, 20) is Trust.BYTES_VERIFIED)


def test_what_a_reader_has_a_lease_of_stays(tier: Tier) -> None:
    vault = tier.open(keep_last=1)
    tier.commit(vault, 20, epoch=1)
    leases = Leases(tier.store, time.time)  # noqa: TID251 - as the vault has it
    key = leases.take(20, 1, "reader", 60.0)

    tier.commit(vault, 40, epoch=1)
    tier.commit(vault, 60, epoch=1)
    assert tier.steps() == [60, 20]

    leases.drop(key)
    tier.commit(vault, 80, epoch=1)
    assert tier.steps() == [80]


def test_whoever_ordered_the_commit_is_told_what_reading_it_back_came_to(tier: Tier) -> None:
    tier.commit(tier.open(), 20, epoch=1)
    tier.damage(20, 1)
    tier.commit(tier.open(scrub_mib_per_second=64), 40, epoch=1)

    until(lambda: len(tier.judged) == 2)

    whole, damaged = [(e.step, e.verdict, e.reason) for e in tier.judged]
    assert whole == (40, Verdict.BYTES_VERIFIED, "every byte is what was staged")
    assert damaged[:2] == (20, Verdict.SUSPECT)
    assert "scrub found expected xxh3-128" in damaged[2]
    assert "p/w of gen/" in damaged[2]


def test_a_verdict_that_is_ordered_is_on_record_before_it_is_told(tier: Tier) -> None:
    vault = tier.open()
    tier.commit(vault, 20, epoch=1)
    order = JudgeCheckpoint(
        generation=Generation(3),
        step=Step(20),
        epoch=Generation(1),
        verdict=Verdict.STATE_VERIFIED,
        reason="2 replicas have the same bytes",
    )

    vault.judge(order, tier.take)

    until(lambda: [(e.step, e.verdict) for e in tier.judged] == [(20, Verdict.STATE_VERIFIED)])
    assert tier.judged[0].reason == order.reason
    assert trust(tier, 20) is Trust.STATE_VERIFIED
    (key,) = standing_of(tier.store, 20, 1).keys
    assert verdicts.reason_of(tier.store, key) == f"state-verified: {order.reason}"


def test_verdicts_are_those_that_the_store_knows() -> None:
    assert {str(verdict) for verdict in Verdict} < set(verdicts.KINDS)
