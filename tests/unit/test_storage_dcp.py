"""`torch.distributed.checkpoint` saves to our stores and loads from them, without a pickle."""

import io
import pickle
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from storage import dcp, verdicts
from storage.blob import BlobStore
from storage.dcp import stager as stager_module
from storage.errors import (
    BlobExistsError,
    ForeignCheckpointError,
    ShardCorruptError,
    StaleEpochError,
    StorageUnavailableError,
    UnstorableError,
)
from storage.faulty import FaultyStore
from storage.leases import Leases
from storage.local import LocalStore
from storage.manifest import body_key
from storage.memory import MemoryStore
from storage.wrappers import CountingStore
from tests.buckets import Server
from tests.checkpoints import committed, steps_of
from tests.journals import holdfast
from tests.states import RowsPlanner, emptied, saved

STATE: dict[str, Any] = {
    "model": {
        "w": torch.arange(24.0).reshape(6, 4),
        "half": torch.arange(5).to(torch.bfloat16),
        "none": torch.empty(0, 3),
        "one": torch.tensor(3),
        "mask": torch.tensor([True, False]),
        "f8": torch.arange(4.0).to(torch.float8_e4m3fn),
    },
    "optim": {
        "state": {"w": {"exp_avg": torch.ones(6, 4)}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "fused": None}],
    },
    "data": {"rank_0": b"\x80\x04.", "seen": OrderedDict(a=1)},
}


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    with warnings.catch_warnings():
        # Said of every save without a process group.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def save(
    address: dcp.target.Address,
    step: int,
    state: Any = STATE,
    planner: DefaultSavePlanner | None = None,
    **options: Any,
) -> None:
    writer = dcp.StorageWriter(address, **options)
    where = f"any/step-{step}"
    torch_dcp.save(state, checkpoint_id=where, storage_writer=writer, planner=planner)


def load(address: dcp.target.Address, state: Any = STATE, step: int | None = None) -> Any:
    found = emptied(state)
    torch_dcp.load(found, storage_reader=dcp.StorageReader(address, step=step))
    return found


def assert_same(one: Any, other: Any) -> None:
    if isinstance(other, Tensor):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert bytes_of(one) == bytes_of(other)
    elif isinstance(other, dict):
        assert one.keys() == other.keys()
        for key, item in other.items():
            assert_same(one[key], item)
    else:
        assert type(one) is type(other)
        assert one == other


def bytes_of(tensor: Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def cause_of(error: CheckpointException) -> BaseException:
    (failure,) = error.failures.values()
    return failure[0]


def refusal(
    address: dcp.target.Address, state: Any, step: int = 1, **options: Any
) -> BaseException:
    with pytest.raises(CheckpointException) as caught:
        save(address, step, state, **options)
    return cause_of(caught.value)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    save(tmp_path, 10)

    assert_same(load(tmp_path), STATE)


def test_a_state_comes_back_from_a_bucket(s3: Server) -> None:
    uri = s3.uri(s3.bucket())
    save(uri, 10)

    assert_same(load(uri), STATE)


def test_a_saved_state_is_a_checkpoint_like_any_other(tmp_path: Path) -> None:
    save(tmp_path, 10, run_id="mine")

    listed = holdfast("checkpoint", "ls", str(tmp_path), "-o", "json")
    verified = holdfast("checkpoint", "verify", str(tmp_path))

    assert '"run":"mine"' in listed.stdout.replace(" ", "")
    assert verified.exit_code == 0
    (body,) = tmp_path.rglob("*.st")
    assert torch.equal(load_file(body)["dcp/model.w"], STATE["model"]["w"])


def test_no_file_of_a_checkpoint_has_a_pickle_in_it(tmp_path: Path) -> None:
    save(tmp_path, 10)

    for path in tmp_path.rglob("*"):
        if path.is_file():
            with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, IndexError)):
                pickle.Unpickler(io.BytesIO(path.read_bytes())).load()  # noqa: S301 - our own file


def test_the_newest_is_loaded_unless_a_step_is_named_or_a_verdict_bars_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, {"t": torch.tensor(step)}, epoch=1)
    store = LocalStore(tmp_path)
    verdicts.add(store, 3, 1, verdicts.QUARANTINED, "by hand")

    assert load(tmp_path, {"t": torch.tensor(0)})["t"] == 2
    assert "checkpoint 3@1 is passed over: quarantined" in caplog.text
    assert load(tmp_path, {"t": torch.tensor(0)}, step=1)["t"] == 1
    with pytest.raises(CheckpointException, match="checkpoint is barred"):
        load(tmp_path, {"t": torch.tensor(0)}, step=3)


def test_a_checkpoint_that_is_not_there_is_missed_by_name(tmp_path: Path) -> None:
    save(tmp_path, 5)

    with pytest.raises(CheckpointException, match=r"no checkpoint of step 7.*there are: 5"):
        load(tmp_path, step=7)


def test_a_checkpoint_of_the_embedded_trainer_is_read_by_state_and_name() -> None:
    store = MemoryStore()
    committed(store, 7)
    state = {"param": {"w": torch.zeros(128, dtype=torch.uint8)}}

    # Two shards with the same rows of a larger tensor: the rest is nowhere.
    with pytest.raises(CheckpointException, match=r"64 of 128 elements are there: param\.v"):
        load(store, state)


@pytest.mark.parametrize(("ranks", "others"), [(1, 3), (3, 1), (2, 4)])
def test_rows_that_several_ranks_saved_are_put_together(ranks: int, others: int) -> None:
    store = MemoryStore()
    state = {"w": torch.randn(7, 3), "v": torch.randn(9), "lr": 0.5}
    saved(store, state, 1, ranks=ranks)
    found = load(store, state)
    saved(store, found, 2, ranks=others)

    assert_same(load(store, state), state)


def test_columns_are_read_of_what_was_saved_in_rows() -> None:
    store = MemoryStore()
    state = {"w": torch.arange(40.0).reshape(8, 5)}
    saved(store, state, 1, ranks=3)
    wide = torch.zeros(8, 10)
    # Not contiguous, and of another type: nothing can be read into its memory as it is.
    into = {"w": wide[:, ::2].double()}

    torch_dcp.load(into, storage_reader=dcp.StorageReader(store))

    assert torch.equal(into["w"], state["w"].double())


def test_only_the_blocks_are_read_that_what_is_wanted_lies_in() -> None:
    inner, size = MemoryStore(), 12 << 20
    state = {f"t{n}": torch.full((size,), n, dtype=torch.uint8) for n in range(5)}
    save(inner, 1, state, epoch=1)
    store = CountingStore(inner)
    into = {"t3": torch.zeros(size, dtype=torch.uint8)}

    torch_dcp.load(into, storage_reader=dcp.StorageReader(store))

    assert torch.equal(into["t3"], state["t3"])
    # From 36 to 48 MiB: the third block of 16 MiB, and 4 KiB of the fourth behind the header.
    assert store.bytes_got < 34 << 20


def test_a_flipped_bit_is_found_when_it_is_loaded_and_named() -> None:
    inner = MemoryStore()
    save(inner, 1, epoch=1)
    store = FaultyStore(inner, flips={body_key(1, 1, 0): 8 * 4100})

    with pytest.raises(CheckpointException) as caught:
        load(store)

    error = cause_of(caught.value)
    assert isinstance(error, ShardCorruptError)
    assert body_key(1, 1, 0) in str(error)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (np.float64(1), "numpy"),
        (Path("/x"), "PosixPath"),
        ({1, (2, torch.tensor(3))}, "Tensor"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
    ],
)
def test_what_takes_a_pickle_is_refused_and_nothing_is_committed(value: Any, named: str) -> None:
    store = MemoryStore()

    error = refusal(store, {"optim": {"odd": value}})

    assert isinstance(error, UnstorableError)
    assert named in str(error)
    assert str(error).endswith(": optim.odd")
    assert steps_of(store) == []


def test_a_planner_with_data_of_its_own_is_refused() -> None:
    class Planner(DefaultSavePlanner):
        def create_local_plan(self) -> Any:
            plan = super().create_local_plan()
            object.__setattr__(plan, "planner_data", {"t": 3})
            return plan

    writer = dcp.StorageWriter(MemoryStore(), step=1)
    with pytest.raises(CheckpointException, match="planner_data is a dict, expected a path"):
        torch_dcp.save({"t": torch.ones(2)}, storage_writer=writer, planner=Planner())


def test_a_planner_that_caches_its_plans_saves_each_step_of_its_own(tmp_path: Path) -> None:
    planner = DefaultSavePlanner(enable_plan_caching=True)
    planner._cached_plans_key = "of this test"
    for step in (1, 2):
        torch_dcp.save(
            {"t": torch.tensor(step)},
            checkpoint_id=str(step),
            storage_writer=dcp.StorageWriter(tmp_path),
            planner=planner,
        )

    assert load(tmp_path, {"t": torch.tensor(0)}, step=1)["t"] == 1
    assert load(tmp_path, {"t": torch.tensor(0)}, step=2)["t"] == 2


def test_a_process_has_one_epoch_in_a_store_above_all_that_are_there(tmp_path: Path) -> None:
    committed(LocalStore(tmp_path), 5, epoch=7)
    save(tmp_path, 8, run_id="run")
    save(tmp_path, 9, run_id="run")

    assert steps_of(LocalStore(tmp_path)) == [(9, 8), (8, 8), (5, 7)]


def test_a_writer_of_an_older_epoch_can_not_commit() -> None:
    store = MemoryStore()
    save(store, 3, epoch=2)

    error = refusal(store, STATE, 4, epoch=1)

    assert isinstance(error, StaleEpochError)
    assert steps_of(store) == [(3, 2)]


def test_a_step_is_saved_once_and_the_same_again_is_fine() -> None:
    store = MemoryStore()
    save(store, 3, epoch=1)
    save(store, 3, epoch=1)

    error = refusal(store, {"t": torch.ones(1)}, 3, epoch=1)

    assert isinstance(error, BlobExistsError)
    assert_same(load(store), STATE)


def test_ranks_that_do_not_confer_need_an_epoch_that_all_have() -> None:
    with pytest.raises(ValueError, match=r"epoch is not given.*agree_epoch"):
        torch_dcp.save(
            STATE,
            storage_writer=dcp.StorageWriter(MemoryStore(), step=1),
            use_collectives=False,
        )


@pytest.mark.parametrize("given", ["last", "step-", "x/step-1/model", str(10**17)])
def test_an_id_without_a_step_is_refused(given: str) -> None:
    assert not dcp.StorageWriter.validate_checkpoint_id(given)
    with pytest.raises(ValueError, match="expected a step, such as 1000"):
        dcp.StorageReader("/nowhere").reset(given)


def test_a_save_without_a_step_is_refused() -> None:
    with pytest.raises(CheckpointException, match="step is not given"):
        torch_dcp.save(STATE, storage_writer=dcp.StorageWriter(MemoryStore()))


def test_a_rank_that_does_not_come_is_waited_for_so_long_and_nothing_is_committed() -> None:
    store = MemoryStore()

    def stop(rank: int) -> None:
        if rank == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        saved(store, {"w": torch.ones(4, 2)}, 1, ranks=3, before=stop)
    with pytest.raises(StorageUnavailableError, match="1 of 2 shards are missing after 0 s"):
        saved_by_coordinator_alone(store)
    assert steps_of(store) == []


def saved_by_coordinator_alone(store: BlobStore) -> None:
    writer = dcp.StorageWriter(store, step=2, epoch=1, ranks=2, commit_timeout_s=0)
    torch_dcp.save({"w": torch.ones(2)}, storage_writer=writer, use_collectives=False)


def test_rows_that_no_rank_has_are_missed_at_the_commit() -> None:
    store = MemoryStore()

    writer = dcp.StorageWriter(store, step=2, epoch=1, ranks=1)

    with pytest.raises(ShardCorruptError, match="2 of 4 elements are there: w"):
        torch_dcp.save(
            {"w": torch.ones(4)},
            storage_writer=writer,
            planner=RowsPlanner(0, 2),
            use_collectives=False,
        )
    with pytest.raises(CheckpointException, match="plan has 2 of 4 elements, expected all: w"):
        torch_dcp.save(
            {"w": torch.ones(4)},
            storage_writer=dcp.StorageWriter(store, step=3, epoch=1),
            planner=RowsPlanner(0, 2),
        )
    assert steps_of(store) == []


class _Lapping(DefaultSavePlanner):
    """Has two of four rows saved twice in part: 0, 1 and 1, 2."""

    def create_local_plan(self) -> SavePlan:
        (item,) = super().create_local_plan().items
        data = item.tensor_data
        assert data is not None
        items = []
        for at in range(2):
            chunk = ChunkStorageMetadata(torch.Size([at]), torch.Size([2]))
            told = TensorWriteData(chunk, data.properties, data.size)
            index = MetadataIndex(item.index.fqn, torch.Size([at]))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=told))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        chunks = [item.tensor_data.chunk for item in all_plans[0].items if item.tensor_data]
        properties = TensorProperties(dtype=torch.float32)
        held = TensorStorageMetadata(properties, torch.Size([4]), chunks)
        return all_plans, Metadata({"w": held})

    def resolve_data(self, write_item: WriteItem) -> Any:
        return torch.ones(2)


def test_rows_that_are_there_twice_do_not_stand_for_rows_that_are_not_there() -> None:
    """There are as many elements as there should be."""
    store, state = MemoryStore(), {"w": torch.ones(4)}

    writer = dcp.StorageWriter(store, step=2, epoch=1, ranks=1)

    with pytest.raises(ShardCorruptError, match="boxes overlap, or leave a gap: w of"):
        torch_dcp.save(state, storage_writer=writer, planner=_Lapping(), use_collectives=False)
    with pytest.raises(CheckpointException, match="plan has boxes that overlap, expected each"):
        save(store, 3, state, epoch=1, planner=_Lapping())
    assert steps_of(store) == []


@pytest.mark.parametrize("other", [{"run_id": "b"}, {"model": "b"}, {"ranks": 3}])
def test_a_shard_that_another_life_left_is_not_committed(other: dict[str, Any]) -> None:
    store = MemoryStore()
    _write_half(store, 1, **{"ranks": 2} | other)

    with pytest.raises(ForeignCheckpointError, match=r"shard 1 of step 2, epoch 1 is of run"):
        _write_half(store, 0, ranks=2)
    assert steps_of(store) == []


def _write_half(store: BlobStore, rank: int, **options: Any) -> None:
    writer = dcp.StorageWriter(store, step=2, epoch=1, commit_timeout_s=0, **options)
    planner = RowsPlanner(rank, 2)
    planner.set_up_planner({"w": torch.ones(4)}, is_coordinator=rank == 0)
    writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=False)
    plans, metadata = planner.create_global_plan([planner.create_local_plan()])
    (plan,) = writer.prepare_global_plan(plans)
    writer.finish(metadata, [writer.write_data(planner.finish_plan(plan), planner).wait()])


def test_a_loading_rank_keeps_the_checkpoint_from_being_collected(tmp_path: Path) -> None:
    store, held = LocalStore(tmp_path), []
    leases = Leases(store, lambda: 1.7e9)
    save(store, 5, epoch=1)

    def look(operation: str, key: str) -> None:
        if operation == "get" and key == body_key(5, 1, 0):
            held.append(leases.held(5, 1))

    load(FaultyStore(store, before=look))

    assert held
    assert all(held)
    assert store.keys("leases/") == []


def test_a_checkpoint_that_is_being_collected_by_now_is_not_read_and_no_lease_stays(
    tmp_path: Path,
) -> None:
    store = LocalStore(tmp_path)
    save(store, 5, epoch=1)
    taken = 0

    def collect(operation: str, key: str) -> None:
        nonlocal taken
        taken += operation == "put" and key.startswith("leases/")
        if operation == "put" and key.startswith("leases/") and taken == 2:
            verdicts.add(store, 5, 1, verdicts.DELETING, "too old")

    with pytest.raises(CheckpointException, match="barred, deleting"):
        load(FaultyStore(store, before=collect))

    # The coordinator's first one ends by itself, an hour after it was taken.
    assert len(store.keys("leases/")) == 1


def test_staged_tensors_are_copies_and_their_buffers_come_free_with_the_save() -> None:
    stager = dcp.AsyncStager(slots=1, wait_s=0.0)
    state = {"a": {"w": torch.ones(3, 5)[:, ::2], "e": torch.empty(0)}, "l": [torch.ones(2), 3]}

    staged = stager.stage(state)
    state["a"]["w"].zero_()

    assert isinstance(staged, dict)
    assert torch.equal(staged["a"]["w"], torch.ones(3, 3))
    with pytest.raises(StorageUnavailableError, match="1 saves are still under way after 0 s"):
        stager.stage(state)
    # What is left of it is enough to keep its buffer.
    kept = staged["l"][0]
    del staged
    with pytest.raises(StorageUnavailableError):
        stager.stage(state)
    del kept
    again = stager.stage(state)
    assert isinstance(again, dict)
    assert not again["a"]["w"].any()


def test_training_goes_on_while_a_staged_state_is_saved(tmp_path: Path) -> None:
    stager, state = dcp.AsyncStager(), {"w": torch.ones(1000)}
    for step in range(4):
        state["w"].fill_(step)
        future = torch_dcp.async_save(
            state,
            checkpoint_id=str(step),
            storage_writer=dcp.StorageWriter(tmp_path),
            async_stager=stager,
        )
        state["w"].fill_(-1)
        future.result()
    stager.close()

    for step in range(4):
        assert (load(tmp_path, state, step=step)["w"] == step).all()


def test_what_is_copied_beside_the_next_step_is_the_state_before_its_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may_copy = threading.Event()
    copy = stager_module._copy

    def held_up(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        assert may_copy.wait(20)
        copy(pairs)

    monkeypatch.setattr(stager_module, "_copy", held_up)
    store, stager = MemoryStore(), dcp.AsyncStager(overlap=True)
    state = {"w": torch.ones(1000), "steps": [1]}
    saving = torch_dcp.async_save(
        state, checkpoint_id="1", storage_writer=dcp.StorageWriter(store), async_stager=stager
    )
    assert isinstance(saving, AsyncSaveResponse)
    state["steps"][0] = 2  # what is no tensor is copied at once
    assert not saving.staging_completion.done()
    may_copy.set()
    saving.staging_completion.result(20)
    state["w"].zero_()
    saving.upload_completion.result(20)
    stager.close()

    loaded = load(store, state, step=1)
    assert torch.equal(loaded["w"], torch.ones(1000))
    assert loaded["steps"] == [1]


def test_a_tensor_of_an_unknown_kind_is_not_staged() -> None:
    class Odd(Tensor):
        pass

    with pytest.raises(UnstorableError, match="tensor is a Odd"):
        dcp.AsyncStager().stage({"t": torch.ones(2).as_subclass(Odd)})
