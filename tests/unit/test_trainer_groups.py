"""What is torch's own business may be missing in another torch: ranks go without it, and say so."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch._C._distributed_c10d import HashStore

from orchestrator.protocol.layout import Layout
from trainer import groups, parallel

WITHOUT = """
import torch.distributed
from torch._C import _distributed_c10d as c10d
del c10d._register_process_group, c10d._unregister_process_group
import trainer.parallel
print(trainer.parallel.groups.of)
"""


@pytest.fixture
def world() -> Iterator[parallel.World]:
    world = parallel.World(0, Layout(), torch.device("cpu"))
    yield world
    world.leave()


class Told:
    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def detector_failed(self, detector: str, reason: str) -> None:
        self.said.append((detector, reason))


def test_the_trainer_can_be_imported_where_torch_has_no_such_names() -> None:
    said = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False
    )

    assert said.returncode == 0, said.stderr
    assert "function of" in said.stdout


@pytest.mark.parametrize("gone", ["_register_process_group", "_unregister_process_group"])
def test_a_group_is_as_it_was_where_torch_does_not_let_one_take_its_place(
    world: parallel.World, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    world.join(HashStore(), 10.0)
    group = dist.group.WORLD
    assert group is not None
    monkeypatch.delattr(c10d, gone)

    with pytest.raises(AttributeError, match=gone):
        groups.wait_in_python(group)

    assert c10d._resolve_process_group(group.group_name) is group


def test_a_group_is_put_back_where_torch_refuses_what_is_to_take_its_place(
    world: parallel.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.join(HashStore(), 10.0)
    group, register = dist.group.WORLD, c10d._register_process_group
    assert group is not None

    def refusing(name: str, known: dist.ProcessGroup) -> None:
        if known is not group:
            raise TypeError("no such group")
        register(name, known)

    monkeypatch.setattr(c10d, "_register_process_group", refusing)

    with pytest.raises(TypeError, match="no such group"):
        groups.wait_in_python(group)

    assert c10d._resolve_process_group(group.group_name) is group


def test_a_world_forms_where_groups_can_not_be_told_apart_and_says_why(
    world: parallel.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*_: object) -> None:
        raise AttributeError("'ProcessGroup' object has no attribute 'group_name'")

    monkeypatch.setattr(groups, "call", call)
    told = Told()

    world.join(HashStore(), 10.0)
    world.counts.tell(told)

    assert world.groups == []
    reason = "AttributeError: 'ProcessGroup' object has no attribute 'group_name'"
    assert told.said == [("groups", reason)]


def test_where_torch_has_it_all_there_is_nothing_to_tell(world: parallel.World) -> None:
    told = Told()

    world.join(HashStore(), 10.0)
    world.counts.tell(told)

    assert told.said == []


def test_a_collective_is_called_by_its_kind_and_size_the_same_on_all_its_ranks(
    world: parallel.World,
) -> None:
    world.join(HashStore(), 10.0)
    group = dist.group.WORLD
    assert group is not None
    groups.call(group, "all")
    own = torch.ones(6)

    works = [
        dist.all_reduce(own, async_op=True),
        dist.all_gather([torch.empty(6)], own, async_op=True),
        dist.all_to_all_single(torch.empty(6), own, async_op=True),
        dist.barrier(async_op=True),
    ]

    told = [groups.asked(work) for work in works if work is not None]
    assert told[:2] == ["allreduce of 24 B", "allgather of 24 B"]
    assert all(" of " not in each for each in told[2:])
    assert [groups.of(work) for work in works if work is not None] == ["all"] * 4
