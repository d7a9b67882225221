"""Which files of shared memory may be written over, in whatever order things happen."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
)

from orchestrator.agent.shards import (
    SLOTS,
    MalformedError,
    NotHeldError,
    Shard,
    Shelf,
    StaleError,
)
from orchestrator.core.lineage import continued
from orchestrator.protocol.ids import Generation, Rank, Step
from orchestrator.protocol.messages import Ancestor

MEMORY = Path("/memory")
RANKS = st.integers(0, 1).map(Rank)
STEPS = st.integers(0, 4).map(Step)


class Bench:
    """A shelf, and what it said and removed."""

    def __init__(self) -> None:
        self.freed: list[tuple[Rank, int]] = []
        self.removed: list[Path] = []
        self.shelf = Shelf(
            MEMORY,
            on_freed=lambda rank, slot: self.freed.append((rank, slot)),
            remove=self.removed.append,
        )

    def stage(self, rank: int, step: int, generation: int, slot: int) -> Shard:
        path = self.shelf.slot_file(Rank(rank), slot)
        return self._put(Shard(Rank(rank), Step(step), Generation(generation), 1, "{}", path, slot))

    def copy(self, rank: int, step: int, generation: int, name: str = "copy") -> Shard:
        return self._put(
            Shard(Rank(rank), Step(step), Generation(generation), 1, "{}", MEMORY / name)
        )

    def _put(self, shard: Shard) -> Shard:
        self.shelf.put(shard)
        return shard

    def held(self) -> list[tuple[int, int]]:
        return [(h.rank, h.step) for h in self.shelf.holdings()]


def test_retain_frees_older_slots_and_says_so_and_removes_older_copies() -> None:
    bench = Bench()
    bench.stage(0, 1, 0, slot=0)
    bench.stage(0, 2, 0, slot=1)
    bench.copy(1, 1, 0)

    bench.shelf.retain(Step(2))

    assert bench.held() == [(0, 2)]
    assert bench.freed == [(0, 0)]
    assert bench.removed == [MEMORY / "copy"]
    assert bench.shelf.free_slots(Rank(0)) == (0, 2)


def test_a_slot_that_is_read_is_freed_when_the_last_reader_is_done() -> None:
    bench = Bench()
    shard = bench.stage(0, 1, 0, slot=0)
    with bench.shelf.pinned(shard):
        with bench.shelf.pinned(shard):
            bench.shelf.retain(Step(2))
            assert bench.held() == []
        assert bench.shelf.free_slots(Rank(0)) == (1, 2)
        assert bench.freed == []

    assert bench.freed == [(0, 0)]
    assert bench.shelf.free_slots(Rank(0)) == (0, 1, 2)


def test_without_a_free_slot_the_oldest_step_that_is_not_safe_gives_way() -> None:
    bench = Bench()
    for slot, step in enumerate((4, 8, 12)):
        bench.stage(0, step, 0, slot=slot)
    bench.shelf.retain(Step(4))

    assert bench.shelf.evict(Rank(0))

    assert bench.held() == [(0, 4), (0, 12)]
    assert bench.freed == [(0, 1)]
    assert not bench.shelf.evict(Rank(0))  # there is a free slot again


def test_what_is_retained_newest_or_being_read_never_gives_way() -> None:
    bench = Bench()
    bench.stage(0, 4, 0, slot=0)
    read = bench.stage(0, 8, 0, slot=1)
    bench.stage(0, 12, 0, slot=2)
    bench.shelf.retain(Step(4))

    with bench.shelf.pinned(read):
        assert not bench.shelf.evict(Rank(0))

    assert bench.held() == [(0, 4), (0, 8), (0, 12)]


def test_a_generation_drops_newer_steps_of_older_ones_and_keeps_its_own() -> None:
    bench = Bench()
    bench.stage(0, 1, 0, slot=0)
    bench.stage(0, 2, 0, slot=1)
    # A buddy that is faster than us is in the next generation already.
    bench.copy(1, 2, 1)

    bench.shelf.begin(Generation(1), Step(1))

    assert bench.held() == [(0, 1), (1, 2)]
    # The seats of the new generation say so; a message to the old one would be lost.
    assert bench.freed == []
    assert bench.shelf.free_slots(Rank(0)) == (1, 2)


def test_a_generation_from_the_seed_keeps_nothing() -> None:
    bench = Bench()
    bench.stage(0, 0, 0, slot=0)
    bench.shelf.begin(Generation(1), None)
    assert bench.held() == []


def test_old_news_of_a_generation_changes_nothing() -> None:
    bench = Bench()
    bench.shelf.begin(Generation(3), Step(5))
    bench.stage(0, 7, 3, slot=0)

    bench.shelf.begin(Generation(3), Step(5))
    bench.shelf.begin(Generation(2), None)

    assert bench.held() == [(0, 7)]
    assert bench.shelf.lineage.generation == 3


def test_after_going_back_older_steps_are_kept_again() -> None:
    bench = Bench()
    bench.shelf.retain(Step(9))
    with pytest.raises(StaleError, match="step 8"):
        bench.stage(0, 8, 0, slot=0)

    bench.shelf.begin(Generation(1), Step(4))
    bench.stage(0, 8, 1, slot=0)

    assert bench.held() == [(0, 8)]


def test_a_copy_of_an_abandoned_lineage_is_refused_and_its_file_removed() -> None:
    bench = Bench()
    bench.shelf.begin(Generation(2), Step(4))

    with pytest.raises(StaleError, match="generation 1, this node is at generation 2 from step 4"):
        bench.copy(0, 5, 1)

    assert bench.removed == [MEMORY / "copy"]
    bench.copy(0, 4, 1)
    assert bench.held() == [(0, 4)]


def test_a_node_that_missed_a_generation_keeps_of_its_own_what_that_one_continued() -> None:
    bench = Bench()
    for slot, step in enumerate((10, 20, 30)):
        bench.stage(0, step, 1, slot=slot)

    # Generation 2 went back to step 10, and this node has not heard of it.
    line = (Ancestor(Generation(1), Step(10)), Ancestor(Generation(2), Step(40)))
    bench.shelf.begin(Generation(3), Step(40), line)

    assert bench.held() == [(0, 10)]
    with pytest.raises(StaleError, match="generation 1, this node is at generation 3"):
        bench.copy(0, 20, 1)
    bench.copy(0, 20, 2, "redone")
    assert bench.held() == [(0, 10), (0, 20)]


def test_a_generation_from_a_checkpoint_keeps_what_the_one_that_wrote_it_has_staged() -> None:
    bench = Bench()
    bench.stage(0, 20, 1, slot=0)
    bench.stage(1, 20, 2, slot=0)

    # Both generations came to step 20; only one of them wrote the checkpoint.
    bench.shelf.begin(Generation(3), Step(20), (Ancestor(Generation(1), Step(20)),))

    assert bench.held() == [(0, 20)]


def test_the_same_step_anew_takes_the_place_of_the_old_one() -> None:
    bench = Bench()
    bench.copy(0, 1, 0, "first")
    second = bench.copy(0, 1, 0, "second")

    assert bench.removed == [MEMORY / "first"]
    assert bench.shelf.find(Rank(0), Step(1)) is second


def test_what_a_rank_restores_from_stays_until_it_stages() -> None:
    bench = Bench()
    source = bench.stage(0, 1, 0, slot=0)
    bench.shelf.begin(Generation(1), Step(1))
    bench.shelf.lend(source)

    bench.shelf.retain(Step(2))
    assert bench.shelf.free_slots(Rank(0)) == (1, 2)

    bench.stage(0, 2, 1, slot=1)
    assert bench.shelf.free_slots(Rank(0)) == (0, 2)
    assert bench.freed == [(0, 0)]


def test_a_slot_that_a_rank_wrote_over_is_not_freed_by_those_who_read_the_old_shard() -> None:
    bench = Bench()
    old = bench.stage(0, 1, 0, slot=0)
    with bench.shelf.pinned(old):
        new = bench.stage(0, 2, 0, slot=0)

    assert bench.shelf.find(Rank(0), Step(1)) is None
    assert bench.shelf.find(Rank(0), Step(2)) is new
    assert bench.freed == []


def test_what_is_not_held_is_named() -> None:
    with pytest.raises(NotHeldError, match="rank 1, step 2"):
        Bench().shelf.require(Rank(1), Step(2))


def test_an_index_that_is_none_is_refused() -> None:
    with pytest.raises(MalformedError, match="rank 1"):
        Shard.of(Rank(1), '{"step": "one"}', MEMORY / "x")


@dataclass
class Known:
    """What the model knows of a shard."""

    shard: Shard
    pins: int = 0
    lent: bool = False
    over: bool = False
    """Written over by its own rank, which is the only one who may."""


class AnyOrder(RuleBasedStateMachine):
    """Ranks stage only to slots they were given; agents copy, write, restore, retain, restart.

    Some generations are begun without this node, which hears of them with the next one.
    """

    pinned_shards = Bundle("pinned_shards")

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench()
        self.shelf = self.bench.shelf
        self.generation, self.retained = 0, -1
        # Of every generation since 1, heard of or not: the step from which it continued.
        self.restores: list[Step | None] = []
        self.ancestors: tuple[Ancestor, ...] = ()
        self.known: list[Known] = []
        self.files = 0
        # What each rank may write to, as its SDK counts it.
        self.slots: dict[Rank, list[int]] = {Rank(r): list(range(SLOTS)) for r in range(2)}

    def current(self, rank: int, step: int) -> Known:
        found = self.shelf.require(Rank(rank), Step(step))
        return next(known for known in self.known if known.shard is found)

    def found(self, known: Known) -> bool:
        return self.shelf.find(known.shard.rank, known.shard.step) is known.shard

    def told(self) -> None:
        while self.bench.freed:
            rank, slot = self.bench.freed.pop()
            assert slot not in self.slots[rank], "told twice: it would be written to twice"
            self.slots[rank].append(slot)

    def put(self, shard: Shard) -> None:
        try:
            self.shelf.put(shard)
        except StaleError:
            if shard.slot is not None:
                self.slots[shard.rank].append(shard.slot)
            return
        self.known.append(Known(shard))

    @rule(rank=RANKS, step=STEPS)
    def rank_stages(self, rank: Rank, step: Step) -> None:
        if not self.slots[rank]:
            return
        slot = self.slots[rank].pop(0)
        path = self.shelf.slot_file(rank, slot)
        for known in self.known:
            if known.shard.path == path:
                assert not known.pins, "a slot was written to while somebody reads it"
                assert not known.lent, "a slot was written to while its rank restores from it"
                known.over = True
        for known in self.known:
            if known.shard.rank == rank:
                known.lent = False
        self.put(Shard(rank, step, Generation(self.generation), 1, "{}", path, slot))
        self.told()

    @rule(rank=RANKS, step=STEPS, older=st.integers(0, 2))
    def copy_arrives(self, rank: Rank, step: Step, older: int) -> None:
        self.files += 1
        generation = Generation(max(self.generation - older, 0))
        self.put(Shard(rank, step, generation, 1, "{}", MEMORY / f"copy-{self.files}"))
        self.told()

    def pick(self, data: st.DataObject) -> Known:
        held = [(h.rank, h.step) for h in self.shelf.holdings()]
        return self.current(*data.draw(st.sampled_from(held)))

    @precondition(lambda self: self.shelf.holdings())
    @rule(data=st.data(), target=pinned_shards)
    def somebody_reads(self, data: st.DataObject) -> Known:
        known = self.pick(data)
        known.pins += 1
        self.shelf.pin(known.shard)
        return known

    @rule(known=consumes(pinned_shards))
    def somebody_is_done(self, known: Known) -> None:
        known.pins -= 1
        self.shelf.unpin(known.shard)
        self.told()

    @precondition(lambda self: self.shelf.holdings())
    @rule(data=st.data())
    def rank_is_told_to_restore(self, data: st.DataObject) -> None:
        known = self.pick(data)
        for other in self.known:
            if other.shard.rank == known.shard.rank:
                other.lent = False
        known.lent = True
        self.shelf.lend(known.shard)
        self.told()

    @rule(step=STEPS)
    def controller_retains(self, step: Step) -> None:
        self.retained = max(self.retained, step)
        self.shelf.retain(step)
        self.told()

    @precondition(lambda self: self.shelf.holdings())
    @rule(data=st.data())
    def shard_turns_out_bad(self, data: st.DataObject) -> None:
        self.shelf.drop(self.pick(data).shard)
        self.told()

    def follow(self, restore: Step | None) -> None:
        newest = Generation(len(self.restores))
        self.ancestors = continued(self.ancestors, newest, restore, None)
        self.restores.append(restore)

    def counts(self, shard: Shard) -> bool:
        """Whether every generation since the one that staged the shard has continued it."""
        since = self.restores[shard.generation : self.generation]
        return all(restore is not None and shard.step <= restore for restore in since)

    @rule(missed=st.lists(st.none() | STEPS, max_size=2), restore=st.none() | STEPS)
    def generation_begins(self, missed: list[Step | None], restore: Step | None) -> None:
        for one in (*missed, restore):
            self.follow(one)
        self.generation = len(self.restores)
        self.retained = min(self.retained, -1 if restore is None else restore)
        for known in self.known:
            known.lent = False
        self.shelf.begin(Generation(self.generation), restore, self.ancestors)
        assert self.bench.freed == []
        for rank in self.slots:
            self.slots[rank] = list(self.shelf.free_slots(rank))

    @invariant()
    def a_rank_is_offered_exactly_the_slots_that_nobody_needs(self) -> None:
        needed = {
            known.shard.path
            for known in self.known
            if not known.over and (known.pins or known.lent or self.found(known))
        }
        for rank, told in self.slots.items():
            files = {slot: self.shelf.slot_file(rank, slot) for slot in range(SLOTS)}
            assert sorted(told) == [slot for slot, file in files.items() if file not in needed]
            assert sorted(told) == list(self.shelf.free_slots(rank))

    @invariant()
    def nothing_outside_the_lineage_is_held(self) -> None:
        for holding in self.shelf.holdings():
            assert holding.step >= self.retained
            shard = self.shelf.require(holding.rank, holding.step)
            assert self.counts(shard)

    @invariant()
    def no_file_is_removed_that_is_held_or_read(self) -> None:
        removed = set(self.bench.removed)
        assert len(removed) == len(self.bench.removed)
        for known in self.known:
            if known.pins or known.lent or self.found(known):
                assert known.shard.path not in removed

    def teardown(self) -> None:
        """Once nobody reads any more, a generation from the seed leaves no file behind."""
        for known in self.known:
            for _ in range(known.pins):
                self.shelf.unpin(known.shard)
        self.shelf.begin(Generation(self.generation + 1), None)
        own = {known.shard.path for known in self.known if known.shard.slot is None}
        assert own <= set(self.bench.removed)
        assert self.shelf.free_slots(Rank(0)) == tuple(range(SLOTS))


TestAnyOrder = AnyOrder.TestCase
