"""Drawn schedules: calibrated to what was published, and the same from the same seed."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import compose
from orchestrator.faults import draw as drawing
from orchestrator.faults.arrivals import Clock
from orchestrator.faults.cluster import Cluster
from orchestrator.faults.draw import draw, replay, scaled_counts
from orchestrator.faults.expected import expected
from orchestrator.faults.model import FaultModel
from orchestrator.faults.record import FaultRecord
from orchestrator.faults.schedule import NAMES, Schedule
from orchestrator.faults.sections import ModelError
from orchestrator.policy.arithmetic import spares_poisson

MODEL = compose.packaged_model()
RECORD = compose.packaged_record(MODEL)
LLAMA = Cluster(gpus=16_384)
DAYS = 54.0
QUIET = {"link-flap": 0.0, "sdc-false-alarm": 0.0}
"""Nine in ten faults, and none of them interrupts."""
CLOCKS: tuple[Clock, ...] = ("poisson", "weibull", "bursty")


def chance(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def drawn(seed: int, cluster: Cluster = LLAMA, **options: Any) -> Schedule:
    given_ = {"model": MODEL, "days": DAYS, "factors": QUIET} | options
    model = given_.pop("model")
    return draw(model, cluster, rng=chance(seed), **given_)


def replayed(seed: int, cluster: Cluster = LLAMA, days: float = DAYS, **options: Any) -> Schedule:
    return replay(RECORD, MODEL, cluster, days=days, rng=chance(seed), **options)


@pytest.fixture(scope="module")
def many() -> Sequence[Schedule]:
    return [drawn(seed) for seed in range(150)]


def test_54_days_have_419_unexpected_and_47_planned_interruptions(many: Sequence[Schedule]) -> None:
    unexpected = np.array([each.interrupting.sum() for each in many])
    planned = np.array([each.planned.sum() for each in many])

    # Five standard errors of a mean of 150 Poisson draws: 8.4 and 2.8.
    assert unexpected.mean() == pytest.approx(419, abs=8.4)
    assert planned.mean() == pytest.approx(47, abs=2.8)
    assert np.std(unexpected) == pytest.approx(419**0.5, rel=0.2)
    assert DAYS * 24 / unexpected.mean() == pytest.approx(3.09, abs=0.07)


def test_each_category_has_the_share_that_was_published(many: Sequence[Schedule]) -> None:
    kinds = np.concatenate([each.faults.kind[each.interrupting] for each in many])
    share = np.bincount(kinds, minlength=len(MODEL.classes)) / len(kinds)
    of_class = {each.name: share[k] for k, each in enumerate(MODEL.classes)}
    published = {"GPU": 64.0, "Dependency": 13.4, "Network": 8.4, "Host": 5.0, "Unknown": 1.7}

    for category, percent in published.items():
        names = {name for row in RECORD.rows if row.category == category for name in row.counts}
        assert 100 * sum(of_class[n] for n in names) == pytest.approx(percent, abs=0.6), category


def test_lemons_are_few_and_fail_far_more_often(many: Sequence[Schedule]) -> None:
    of_nodes, of_lemons = 0, 0
    for each in many:
        struck = each.faults.node[each.interrupting & (each.faults.nodes == 1)]
        of_nodes += len(struck)
        of_lemons += int(np.isin(struck, each.lemons).sum())
        assert len(each.lemons) in (24, 25)

    # 1.2 % of the nodes weigh 20 times as much: 0.24 / (0.24 + 0.988) of all faults.
    assert of_lemons / of_nodes == pytest.approx(0.195, abs=0.01)


def test_nodes_are_taken_out_six_times_a_day_and_need_the_published_spares(
    many: Sequence[Schedule],
) -> None:
    """With the repair time of every node set to one value, as the published figures have it."""
    hours = {4: 4, 12: 8, 24: 13, 72: 29, 168: 59}
    taken = [each.faults.at_s[(each.faults.out_s > 0) & each.interrupting] for each in many]
    per_day = float(np.mean([len(at_s) for at_s in taken])) / DAYS

    assert per_day == pytest.approx(6.1, abs=0.25)
    for repair_h, spares in hours.items():
        closed = spares_poisson(removals_per_day=per_day, out_s=repair_h * 3600)
        assert closed == pytest.approx(spares, abs=1)
        out = [out_at_once(at_s, repair_h * 3600.0) for at_s in taken]
        assert np.quantile(np.concatenate(out), 0.99) == pytest.approx(spares, abs=2)


def test_as_many_nodes_leave_together_as_the_means_say(many: Sequence[Schedule]) -> None:
    together = {each.nodes: each.per_day for each in expected(MODEL, LLAMA).together}
    faults = [each.faults for each in many]
    drawn_nodes = np.concatenate([f.nodes[(f.out_s > 0) & (f.at_s > 0)] for f in faults])
    per_day = np.bincount(drawn_nodes) / (DAYS * len(many))

    assert set(together) == set(range(1, 17)) == set(np.flatnonzero(per_day))
    assert per_day[1] == pytest.approx(together[1], rel=0.02)
    several = sum(rate for nodes, rate in together.items() if nodes > 1)
    assert per_day[2:].sum() == pytest.approx(several, rel=0.15)


def out_at_once(at_s: np.ndarray, repair_s: float) -> np.ndarray:
    """How many nodes are out, every hour from when as many are out as ever will be."""
    hours_s = np.arange(repair_s, DAYS * 86_400, 3600.0)
    return np.searchsorted(at_s, hours_s) - np.searchsorted(at_s, hours_s - repair_s)


def test_repairs_take_as_long_as_their_parts_say(many: Sequence[Schedule]) -> None:
    kind = [each.name for each in MODEL.classes].index("gpu-fault")
    days = np.concatenate([e.faults.out_s[e.faults.kind == kind] for e in many]) / 86_400

    assert len(days) > 20_000
    assert (days < 1).mean() == pytest.approx(0.62, abs=0.015)
    assert (days > 14).mean() == pytest.approx(0.10, abs=0.01)
    assert days.mean() * 86_400 == pytest.approx(MODEL.repair_named("standard").mean_s, rel=0.03)


def test_every_hundredth_hardware_fault_takes_neighbours_along(many: Sequence[Schedule]) -> None:
    wide = single = 0
    for each in many:
        nodes = each.faults.nodes[each.faults.kind == 0]
        wide, single = wide + int((nodes > 1).sum()), single + int((nodes == 1).sum())
        assert ((nodes >= 1) & (nodes <= 16)).all()

    assert wide / (wide + single) == pytest.approx(0.01, abs=0.003)


@pytest.mark.parametrize("seed", range(3))
def test_a_replayed_record_has_exactly_its_counts_whatever_the_seed(seed: int) -> None:
    again = replayed(seed)

    assert {name: n for name, n in again.counts.items() if n} == RECORD.counts
    assert (again.interrupting.sum(), again.planned.sum(), len(again)) == (419, 47, 466)


def test_a_record_is_scaled_only_when_asked() -> None:
    half = replayed(0, Cluster(gpus=8192), days=27.0)
    assert len(half) == 466

    scaled = replayed(0, Cluster(gpus=8192), days=27.0, scaled=True)

    # Hardware: half the GPUs for half the time. Of the job: half the time.
    job = 54 + 2 + 7 + 47
    assert len(scaled) == round((466 - job) / 4 + job / 2)
    assert scaled_counts(RECORD, MODEL, LLAMA, DAYS) == RECORD.counts


def test_a_background_adds_what_no_record_counts_and_interrupts_nobody_more() -> None:
    alone, among = replayed(5), replayed(5, background=True)

    assert among.interrupting.sum() == 419
    assert among.planned.sum() == 47
    assert among.counts["slow-node-transient"] > 50
    assert among.counts["preemption"] == among.counts["power-domain"] == 0
    assert np.array_equal(among.lemons, alone.lemons)


def test_more_faults_than_nodes_are_refused() -> None:
    with pytest.raises(ModelError, match="356 faults of nodes, expected at most 64") as caught:
        replayed(0, Cluster(gpus=512))

    assert "scaled" in caught.value.hint


@pytest.mark.parametrize("clock", CLOCKS)
def test_every_clock_keeps_the_mean_rate(clock: Clock) -> None:
    found = [int(drawn(seed, clock=clock).interrupting.sum()) for seed in range(120)]

    # Bursty runs differ by 63, so that a mean of 120 is good to 6.
    assert np.mean(found) == pytest.approx(420, abs=15)


def test_gaps_are_uneven_as_the_clock_says() -> None:
    def unevenness(clock: Clock) -> float:
        gaps = [
            np.diff(each.faults.at_s[each.interrupting & (each.faults.at_s > 0)])
            for each in (drawn(seed, clock=clock) for seed in range(40))
        ]
        return float(np.mean([gap.std() / gap.mean() for gap in gaps]))

    # Standard deviation / mean: 1 without memory, 1.35 for a Weibull of shape 0.75.
    assert unevenness("poisson") == pytest.approx(1, abs=0.03)
    assert unevenness("weibull") == pytest.approx(1.35, abs=0.05)
    assert unevenness("bursty") > 1.08


def test_a_weibull_clock_is_as_fast_at_the_start_as_later() -> None:
    at_s = np.concatenate(
        [
            each.faults.at_s[each.interrupting & (each.faults.at_s > 0)]
            for each in (drawn(seed, clock="weibull") for seed in range(100))
        ]
    )

    first = (at_s < DAYS * 86_400 / 10).mean()
    assert first == pytest.approx(0.1, abs=0.006)


@pytest.mark.parametrize("clock", CLOCKS)
def test_columns_are_sorted_of_one_length_and_within_the_cluster(clock: Clock) -> None:
    cluster = Cluster(gpus=8 * 37)  # the last rack, domain and pod are partly filled
    schedule = draw(MODEL, cluster, days=30, rng=chance(3), clock=clock, factor=20)
    faults = schedule.faults

    assert {len(getattr(faults, name)) for name in NAMES} == {len(schedule)}
    assert (np.diff(faults.at_s) >= 0).all()
    assert faults.at_s[0] >= 0
    assert faults.at_s[-1] < 30 * 86_400
    assert ((faults.node >= -1) & (faults.node < 37)).all()
    assert (faults.node + faults.nodes <= 37).all()
    assert ((faults.node == -1) == (faults.nodes == 0)).all()
    for name in ("lasts_s", "out_s", "notice_s", "slow"):
        assert (getattr(faults, name) >= 0).all()
    assert (faults.slow < 1).all()
    for kind, each in enumerate(MODEL.classes):
        places = faults.place[faults.kind == kind]
        assert ((places >= 0) & (places < cluster.count(each.entity))).all(), each.name


def test_switching_one_class_off_leaves_the_others_as_they_were() -> None:
    every, fewer = drawn(7), drawn(7, factors=QUIET | {"gpu-fault": 0.0})
    others = every.faults.taken(every.faults.kind != 0)

    assert fewer.counts["gpu-fault"] == 0
    assert all(np.array_equal(getattr(others, n), getattr(fewer.faults, n)) for n in NAMES)


def test_rates_can_be_scaled_all_together() -> None:
    found = [int(drawn(seed, factor=3).interrupting.sum()) for seed in range(30)]

    assert np.mean(found) == pytest.approx(3 * 420, rel=0.02)


HASHED = """
import hashlib, numpy as np
from orchestrator import compose
from orchestrator.faults.cluster import Cluster
from orchestrator.faults.draw import draw, replay
from orchestrator.faults.schedule import NAMES
model = compose.packaged_model()
record = compose.packaged_record(model)
digest = hashlib.sha256()
for clock in ("poisson", "weibull", "bursty", "record"):
    rng = np.random.Generator(np.random.Philox(41))
    where = {"days": 54, "rng": rng}
    if clock == "record":
        drawn = replay(record, model, Cluster(gpus=16384), background=True, **where)
    else:
        drawn = draw(model, Cluster(gpus=2048), clock=clock, **where)
    for name in NAMES:
        digest.update(getattr(drawn.faults, name).tobytes())
print(digest.hexdigest())
"""


def test_a_seed_draws_the_same_columns_in_every_process() -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", HASHED],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
            timeout=60,
        ).stdout
        for seed in ("0", "1", "4242")
    }

    assert len(found) == 1
    assert len(found.pop().strip()) == 64
    assert drawn(1).counts != drawn(2).counts


@pytest.mark.parametrize("gpus", [16_384, 131_072])
def test_54_days_are_drawn_in_well_under_a_second(gpus: int) -> None:
    began = time.process_time()
    schedule = draw(MODEL, Cluster(gpus=gpus), days=DAYS, rng=chance(1))
    spent_s = time.process_time() - began

    # 0.04 and 0.4 s when this was written.
    assert spent_s < 2.0
    assert len(schedule) == pytest.approx(5.4 * gpus, rel=0.05)


def test_what_memory_is_not_meant_for_is_refused_before_it_is_drawn() -> None:
    with pytest.raises(ModelError, match=r"faults in 54 days of 16384 GPUs, expected at most"):
        drawn(0, factor=1e6)
    with pytest.raises(ModelError, match=r"comes to 1.6\de\+07 faults in 0.001 days"):
        drawn(0, Cluster(gpus=1 << 24), days=0.001, factors=QUIET | {"sdc-latent": 1e6})


def test_a_clock_that_the_model_knows_nothing_of_is_refused() -> None:
    bare = msgspec.structs.replace(MODEL, weibull=None, bursts=None)

    for clock, section in (("weibull", "weibull"), ("bursty", "bursts")):
        with pytest.raises(ModelError, match=f"has no `{section}`"):
            drawn(0, model=bare, clock=clock)


def test_a_factor_of_a_class_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelError, match="no class 'gpu-falt'") as caught:
        drawn(0, factors={"gpu-falt": 0.0})
    assert "gpu-fault" in caught.value.hint
    with pytest.raises(ModelError, match="factor of 'gpu-fault' is -1"):
        drawn(0, factors={"gpu-fault": -1.0})


def test_a_cluster_of_uneven_nodes_or_none_is_refused() -> None:
    with pytest.raises(ValueError, match="gpus is 12, expected a multiple of 8"):
        Cluster(gpus=12)
    with pytest.raises(ValueError, match="gpus is 0, expected 1 to"):
        Cluster(gpus=0)


@settings(max_examples=25)
@given(
    nodes=st.integers(1, 600),
    per_node=st.sampled_from([1, 2, 8]),
    days=st.floats(0.01, 30),
    factor=st.floats(0, 50),
    clock=st.sampled_from(CLOCKS),
    seed=st.integers(0, 1 << 32),
)
def test_worlds_of_any_size_can_be_drawn(
    nodes: int, per_node: int, days: float, factor: float, clock: Clock, seed: int
) -> None:
    cluster = Cluster(gpus=nodes * per_node, gpus_per_node=per_node)

    schedule = draw(
        MODEL, cluster, days=days, rng=chance(seed), clock=clock, factor=factor, factors=QUIET
    )

    assert (schedule.faults.node + schedule.faults.nodes <= nodes).all()
    assert (schedule.faults.at_s <= days * drawing.DAY_S).all()


def test_a_file_of_ones_own_is_drawn_like_the_packaged_one() -> None:
    text = """
kind: FaultModel
name: mine
classes:
- {name: fan, entity: node, rate: 1 per node-day, blast: node, effect: crash, cause: hardware,
   fatal: 1, out: fan, assumption: it rattles}
repairs:
- {name: fan, parts: [{share: 1, span: 2h}], assumption: a screwdriver}
"""
    mine = compose.parse(text, FaultModel, "mine.yaml").checked()
    record = compose.parse(
        "{kind: FaultRecord, name: mine, model: mine, days: 1, gpus: 64, source: a log, rows: "
        "[{component: Fan, category: Host, count: 5, class: fan}]}",
        FaultRecord,
        "mine-record.yaml",
    ).checked(mine)

    schedule = draw(mine, Cluster(gpus=800), days=10, rng=chance(0))
    again = replay(record, mine, Cluster(gpus=64), days=1, rng=chance(0))

    assert len(schedule) == pytest.approx(1000, abs=150)
    assert set(schedule.faults.out_s) == {7200.0}
    assert len(schedule.lemons) == 0
    assert len(again) == 5
