"""Which process group a collective is of, which torch's works do not say.

Collectives are asked for in two ways. Sharding, pipelines and whoever calls `torch.distributed` go
through methods of a group in Python, and what those return is noted with the group's name. Layers
that are cut (`tp`, `cp`), and compiled ones, ask for them in C++ by a group's name, and wait there:
such a name stands for a group in between, whose works are waited for in Python.

None of that is torch's word to anybody: another version may do without. Then what is asked for here
raises, before it has changed anything, and whoever asks goes without it (`parallel.World.counts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

SUMS = (
    "allreduce",
    "allreduce_coalesced",
    "reduce_scatter",
    # As they are called up to torch 2.12, and from then on.
    "alltoall_base",
    "_reduce_scatter_base",
    "all_to_all_single",
    "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced",
    "reduce_scatter_single_coalesced",
)
"""By which gradients are added up."""
_METHODS = (
    *SUMS,
    "broadcast",
    "reduce",
    "allgather",
    "allgather_coalesced",
    "gather",
    "scatter",
    "alltoall",
    "barrier",
    "send",
    "recv",
    "recv_anysource",
    # The same.
    "_allgather_base",
    "all_gather_single",
    "allgather_into_tensor_coalesced",
    "all_gather_single_coalesced",
)
_MESSAGES = ("send", "recv")
_UNEVEN = ("gather", "scatter", "alltoall", "alltoall_base", "all_to_all_single")
"""Those of which a rank may hand over another size than others do."""
Links = Mapping[tuple[str, int], str]
"""Names of connections: by `send` or `recv`, and the other one's place in the group."""

_names: dict[str, str] = {}
"""What groups are called, by the names that torch gives them."""
_links: dict[str, Links] = {}
"""What connections within them are called."""
_of: WeakKeyDictionary[dist.Work, tuple[str, str]] = WeakKeyDictionary()
_between: list[dist.ProcessGroup] = []
"""Torch does not keep them."""


def of(work: dist.Work) -> str | None:
    """Return the name of the group whose collective it is; None if it has none."""
    told = _of.get(work)
    return None if told is None else told[0]


def asked(work: dist.Work) -> str:
    """Return what collective it is, in the words of every rank that has asked for the same one."""
    told = _of.get(work)
    return "" if told is None else told[1]


def call(group: dist.ProcessGroup, name: str, links: Links | None = None) -> None:
    """Have collectives of a group be told apart from others, as long as this world stands."""
    _names[group.group_name] = name
    if links is not None:
        _links[group.group_name] = links


def wait_in_python(group: dist.ProcessGroup) -> None:
    """Have those be counted, too, that are asked for in C++ by the name of a group on CPUs."""
    register, unregister = c10d._register_process_group, c10d._unregister_process_group  # noqa: SLF001
    between, name = _Between(group), group.group_name
    unregister(name)
    try:
        register(name, between)
    except Exception:
        register(name, group)  # or nobody finds it any more
        raise
    _between.append(between)


def forget() -> None:
    """Forget the groups of a world, once it is destroyed."""
    for known in (_names, _links, _between):
        known.clear()


def _noting(name: str) -> Callable[..., Any]:
    method = getattr(dist.ProcessGroup, name)

    def noting(self: dist.ProcessGroup, *args: Any, **named: Any) -> Any:  # noqa: ANN401 - whatever it takes
        work = method(self, *args, **named)
        group = self.group_name
        called = _names.get(group)
        if name in _MESSAGES and group in _links and len(args) > 1:
            called = _links[group].get((name, args[1]))
        if called is not None and work is not None:
            _of[work] = called, _words(name, args)
        return work

    return noting


def _words(name: str, args: tuple[Any, ...]) -> str:
    """Return what is asked for: its kind, and its size where that is the same for all ranks.

    Nothing of a message: where one rank sends, the other receives.
    """
    if name in _MESSAGES or name == "recv_anysource":
        return ""
    what = name.lstrip("_")
    if name in _UNEVEN or not args:
        return what
    # The larger of what goes in and what comes out is what all ranks have together.
    return f"{what} of {max(map(_bytes, args))} B"


def _bytes(given: Any) -> int:  # noqa: ANN401 - whatever it takes
    if isinstance(given, torch.Tensor):
        return given.numel() * given.element_size()
    return sum(map(_bytes, given)) if isinstance(given, (list, tuple)) else 0


class _Waited(dist.Work):
    """A work that is waited for in Python, whoever waits."""

    def __init__(self, work: dist.Work) -> None:
        super().__init__()
        self._work = work

    def wait(self, timeout: timedelta = timedelta()) -> bool:
        """Wait as for the work itself."""
        return dist.Work.wait(self._work, timeout)


class _Between(dist.ProcessGroup):
    """Passes everything on to a group, and is found wherever torch has noted that one."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group.rank(), group.size())  # type: ignore[call-arg]
        self._group = group
        self._set_group_name(group.group_name)

    def __eq__(self, other: object) -> bool:
        return other is self or other is self._group

    def __hash__(self) -> int:
        return hash(self._group)


def _passing(name: str) -> Callable[..., _Waited]:
    def passing(self: _Between, *args: Any) -> _Waited:  # noqa: ANN401 - whatever it takes
        return _Waited(getattr(self._group, name)(*args))

    return passing


def _install(names: Iterable[str]) -> None:
    for name in names:
        if hasattr(dist.ProcessGroup, name):
            setattr(dist.ProcessGroup, name, _noting(name))
            # All of them: what is not in Python there is taken for what was just put in its place.
            setattr(_Between, name, _passing(name))


if hasattr(dist.ProcessGroup, "group_name"):
    _install(_METHODS)
