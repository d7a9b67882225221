"""Shards between agents: copied, fetched, refused, restored in place."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from orchestrator.agent.shards import (
    CorruptError,
    MalformedError,
    NotHeldError,
    StaleError,
    UnreachableError,
)
from orchestrator.protocol.ids import Step
from orchestrator.protocol.messages import Holding
from orchestrator.protocol.rank import Restore
from storage.shard import encode_index, open_views
from tests.shards import (
    GENERATION,
    HERE,
    OTHER,
    RANK,
    STEP,
    THERE,
    Node,
    sealed,
    settled,
    stage,
    two,
)

pytestmark = pytest.mark.process


def test_a_copy_is_verified_held_and_can_be_fetched_back_after_its_owner_is_gone(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            here.stage(0, 7, 2)
            await here.keeper.copy_to(THERE, RANK, STEP)
            assert here.held == [(2, 0, 7)]
            assert there.held == [(2, 0, 7)]

            # The next incarnation of the agent has nothing.
            await here.keeper.close()
            spare = Node(tmp_path / "spare")
            spare.address = await spare.keeper.open()
            spare.begin(3, {THERE: there}, 7)
            restore, tier = await spare.keeper.prepare(RANK, STEP, THERE)

            assert tier == "fetched"
            assert spare.keeper.holdings() == (Holding(RANK, STEP),)
            index, body = sealed(0, 7, 2)
            assert restore.step == 7
            assert restore.index == encode_index(index).decode()
            (file,) = spare.memory.iterdir()
            assert restore.path == str(file)
            assert open_views(index, file.read_bytes()) == open_views(index, body)
            # And it can be had from there, by whoever needs it next.
            there.begin(4, {HERE: spare}, 7)
            there.keeper.retain(Step(7))
            await spare.keeper.close()

    asyncio.run(scenario())


def test_an_own_shard_is_restored_in_place_and_stays_until_its_rank_stages(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            here.stage(0, 7, 2, slot=1)
            here.begin(3, {THERE: there}, 7)

            restore, tier = await here.keeper.prepare(RANK, STEP, THERE)

            assert (tier, restore.path) == ("own", str(here.memory / "rank-00000.slot-1"))
            assert here.keeper.free_slots(RANK) == (0, 2)
            here.keeper.retain(Step(8))
            assert here.freed == []
            here.stage(0, 9, 3, slot=0)
            assert here.freed == [(0, 1)]
            assert here.keeper.free_slots(RANK) == (1, 2)

    asyncio.run(scenario())


def test_an_own_shard_with_a_flipped_bit_is_named_and_never_used(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            here.stage(0, 7, 2)
            here.damage("rank-*")

            with pytest.raises(CorruptError, match=r"param/layers\.\d\.w of shard 0 of step 7"):
                await here.keeper.prepare(RANK, STEP, THERE)

            # Dropped, so that asking again looks elsewhere; and said, so that nobody counts on it.
            assert here.keeper.holdings() == ()
            assert here.held == []
            there.stage(0, 7, 2)
            assert (await here.keeper.prepare(RANK, STEP, THERE))[1] == "fetched"
            assert there.held == [(2, 0, 7)]

    asyncio.run(scenario())


@pytest.mark.parametrize("direction", ["copy", "fetch"])
def test_a_shard_that_does_not_match_its_index_is_not_taken_over(
    tmp_path: Path, direction: str
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            source = here if direction == "copy" else there
            source.stage(0, 7, 2)
            source.damage("rank-*")

            copying = direction == "copy"
            call = (
                here.keeper.copy_to(THERE, RANK, STEP)
                if copying
                else here.keeper.prepare(RANK, STEP, THERE)
            )
            with pytest.raises(CorruptError, match=r"param/layers\.\d\.w"):
                await call
            target = there if copying else here
            assert (target.files(), target.keeper.holdings()) == ([], ())
            if not copying:
                # Who gave it has looked at its own, and counts on it no more than who asked.
                assert (there.keeper.holdings(), there.held) == ((), [])

    asyncio.run(scenario())


def test_a_copy_of_an_older_generation_is_refused_and_says_which_is_newer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            here.stage(0, 7, 2)
            there.begin(3, {}, 5)

            with pytest.raises(StaleError, match=r"generation 2.*generation 3 from step 5"):
                await here.keeper.copy_to(THERE, RANK, STEP)
            assert there.held == []

    asyncio.run(scenario())


def test_a_node_without_orders_learns_from_copies_what_is_over(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, spare):
            for step, slot in ((6, 0), (7, 1)):
                here.stage(0, step, 2, slot)
                await here.keeper.copy_to(THERE, RANK, Step(step))
            here.begin(3, {THERE: spare}, 6)
            here.stage(0, 8, 3, slot=2)

            await here.keeper.copy_to(THERE, RANK, Step(8))
            # Step 7 is of the generation that was abandoned.
            assert spare.keeper.holdings() == (Holding(RANK, Step(6)), Holding(RANK, Step(8)))

            here.stage(0, 9, 3, slot=1)
            here.keeper.retain(Step(8))
            await here.keeper.copy_to(THERE, RANK, Step(9))
            assert spare.keeper.holdings() == (Holding(RANK, Step(8)), Holding(RANK, Step(9)))
            await settled(lambda: len(spare.files()) == 2)

    asyncio.run(scenario())


def test_a_copy_survives_the_order_that_comes_after_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            here.begin(3, {THERE: there}, 5)
            here.stage(0, 7, 3)
            await here.keeper.copy_to(THERE, RANK, STEP)

            there.begin(3, {}, 5)

            assert there.keeper.holdings() == (Holding(RANK, STEP),)

    asyncio.run(scenario())


def test_an_address_may_become_known_later_and_is_not_awaited_for_ever(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            here.begin(GENERATION, {}, None)
            here.stage(0, 7, 2)
            with pytest.raises(UnreachableError, match=r"not on node-1 after 0.05 s"):
                await here.keeper.copy_to(THERE, RANK, STEP, timeout_s=0.05)

            copying = asyncio.create_task(here.keeper.copy_to(THERE, RANK, STEP))
            await asyncio.sleep(0.05)
            here.begin(GENERATION, {THERE: there}, None)
            await copying
            assert there.held == [(2, 0, 7)]

    asyncio.run(scenario())


def test_a_staged_message_that_comes_after_the_next_generation_began_is_ignored(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, _):
            late = stage(here.memory, 0, 7, 2)
            here.begin(3, {}, 7)
            here.keeper.staged(RANK, late)

            assert here.held == []
            assert here.keeper.free_slots(RANK) == (0, 1, 2)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "change", [{"slot": 3}, {"step": 8}, {"index": "{}"}, {"index": '{"step": 7}'}]
)
def test_a_staged_message_that_contradicts_its_index_is_refused(
    tmp_path: Path, change: dict[str, object]
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, _):
            message = msgspec.structs.replace(stage(here.memory, 0, 7, 2), **change)
            with pytest.raises(MalformedError, match="rank 0"):
                here.keeper.staged(RANK, message)
            assert here.keeper.holdings() == ()

    asyncio.run(scenario())


def test_a_generation_that_begins_while_state_is_fetched_ends_the_preparation(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            there.stage(0, 7, 2)
            here.begin(3, {}, 7)
            preparing = asyncio.create_task(here.keeper.prepare(RANK, STEP, THERE))
            await asyncio.sleep(0.01)
            here.begin(4, {THERE: there}, 5)

            with pytest.raises(StaleError, match="generation 4 from step 5"):
                await preparing
            assert here.keeper.holdings() == ()
            await settled(lambda: here.files() == [])

    asyncio.run(scenario())


def test_a_node_that_is_cut_off_neither_serves_nor_calls(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            here.stage(0, 7, 2)
            for cut_off in (here, there):
                cut_off.keeper.unreachable = True
                with pytest.raises(UnreachableError, match="cut off"):
                    await here.keeper.copy_to(THERE, RANK, STEP)
                cut_off.keeper.unreachable = False

            await here.keeper.copy_to(THERE, RANK, STEP)

    asyncio.run(scenario())


def test_what_is_not_held_is_said(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, _):
            with pytest.raises(NotHeldError):
                await here.keeper.copy_to(THERE, RANK, STEP)
            with pytest.raises(NotHeldError, match=r"127.0.0.1:\d+: shard of rank 0, step 7"):
                await here.keeper.prepare(RANK, STEP, THERE)
            with pytest.raises(NotHeldError, match="no source"):
                await here.keeper.prepare(RANK, STEP, "")

    asyncio.run(scenario())


def file_of(restore: Restore) -> Path:
    return Path(restore.path)


def test_what_another_replica_staged_here_is_copied_for_the_rank_that_starts_from_it(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            here.stage(OTHER, 7, 2, slot=1)
            here.begin(3, {THERE: there}, 7)

            restore, tier = await here.keeper.prepare(RANK, STEP, HERE, staged_as=OTHER)

            assert tier == "own"
            assert set(here.keeper.holdings()) == {Holding(RANK, STEP), Holding(OTHER, STEP)}
            _, body = sealed(OTHER, 7, 2)
            assert file_of(restore).read_bytes() == body
            # Its slot is the other rank's to write to, which may be seated here again.
            assert file_of(restore).name.startswith("restore-00000-7-")
            here.keeper.retain(Step(8))
            assert here.keeper.free_slots(OTHER) == (0, 1, 2)
            assert file_of(restore).exists()

    asyncio.run(scenario())


def test_what_another_replica_staged_is_fetched_under_its_name_and_held_under_the_own(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            there.stage(OTHER, 7, 2)
            here.begin(3, {THERE: there}, 7)
            there.begin(3, {HERE: here}, 7)

            restore, tier = await here.keeper.prepare(RANK, STEP, THERE, staged_as=OTHER)

            assert tier == "fetched"
            assert here.keeper.holdings() == (Holding(RANK, STEP),)
            assert file_of(restore).read_bytes() == sealed(OTHER, 7, 2)[1]
            again, tier = await here.keeper.prepare(RANK, STEP, THERE, staged_as=OTHER)
            assert (tier, again) == ("own", restore)

    asyncio.run(scenario())


def test_what_a_rank_staged_itself_is_not_taken_if_it_is_to_have_what_another_one_staged(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            here.stage(0, 7, 2)
            there.stage(OTHER, 7, 2)
            here.begin(3, {THERE: there}, 7)
            there.begin(3, {HERE: here}, 7)
            own = file_of((await here.keeper.prepare(RANK, STEP, THERE))[0])

            restore, tier = await here.keeper.prepare(RANK, STEP, THERE, staged_as=OTHER)

            assert tier == "fetched"
            assert file_of(restore) != own
            assert file_of(restore).read_bytes() == sealed(OTHER, 7, 2)[1]
            assert here.keeper.renewed() == (Holding(RANK, STEP),)

    asyncio.run(scenario())


def test_a_spoilt_shard_of_another_replica_is_not_copied_and_not_offered_any_more(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with two(tmp_path) as (here, there):
            here.stage(OTHER, 7, 2)
            here.begin(3, {THERE: there}, 7)
            with (here.memory / "rank-00003.slot-0").open("r+b") as file:
                file.seek(5_000)
                file.write(b"spoilt")

            with pytest.raises(CorruptError):
                await here.keeper.prepare(RANK, STEP, HERE, staged_as=OTHER)

            assert here.keeper.holdings() == ()
            assert [path.name for path in here.memory.iterdir() if "restore" in path.name] == []

    asyncio.run(scenario())
