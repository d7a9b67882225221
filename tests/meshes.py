"""Worlds cut in several dimensions, run until nobody moves any more: who waits in what by then."""

from collections.abc import Iterable, Sequence

from orchestrator.protocol.groups import ALL, connection, name_of
from orchestrator.protocol.ids import Rank
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.messages import GroupCounts

DIMENSIONS = ("dp_replicate", "pp", "dp_shard", "cp", "tp")
Do = tuple[str, str]
"""What a rank does next: `meet` in a group, or `send` or `recv` over a connection."""


class Mesh:
    """The groups of a world."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.size = layout, layout.world_size
        self.members: dict[str, list[int]] = {ALL: list(range(self.size))}
        for rank in range(self.size):
            for kind in DIMENSIONS:
                self.members.setdefault(self.group(kind, rank), self._along(kind, rank))

    def _along(self, kind: str, rank: int) -> list[int]:
        at = self.layout.position(rank)
        return [
            other
            for other in range(self.size)
            if self.layout.position(other)._replace(**{kind: 0}) == at._replace(**{kind: 0})
        ]

    def group(self, kind: str, rank: int) -> str:
        """Return the group of a rank along a dimension, or that of all."""
        return ALL if kind == ALL else name_of(kind, self._along(kind, rank))

    def schedule(self, rank: int, kinds: Iterable[str], micro_batches: int) -> list[Do]:
        """Return what a rank does in a step: `kinds` in each micro-batch, and all meet in the end.

        Stages of a pipeline send each micro-batch on, and its gradient back, all forward first.
        """
        pipe, at = self._along("pp", rank), self.layout.position(rank).pp
        before = pipe[at - 1] if at > 0 else None
        behind = pipe[at + 1] if at + 1 < len(pipe) else None
        done: list[Do] = []
        for come, go in ((before, behind), (behind, before)):
            for _ in range(micro_batches):
                if come is not None:
                    done.append(("recv", connection("pp", come, rank)))
                done += [("meet", self.group(kind, rank)) for kind in kinds]
                if go is not None:
                    done.append(("send", connection("pp", rank, go)))
        return [*done, ("meet", ALL)]


class Run:
    """Ranks that do what they have to, one after the other, until nobody can go on.

    Args:
        programs: what each rank does.
        stops: before which of that a rank does nothing any more.
    """

    def __init__(self, mesh: Mesh, programs: Sequence[Sequence[Do]], stops: dict[int, int]) -> None:
        self.mesh, self._programs, self._stops = mesh, programs, stops
        self._place = [0] * mesh.size
        self.entered: dict[tuple[str, int], int] = {}
        self.left: dict[tuple[str, int], int] = {}
        for rank, program in enumerate(programs):
            for _, group in program:
                self.entered[group, rank] = self.left[group, rank] = 0
        while any(self._go_on(rank) for rank in range(mesh.size)):
            pass

    def done(self) -> bool:
        """Whether every rank came to the end."""
        return all(p == len(q) for p, q in zip(self._place, self._programs, strict=True))

    def _go_on(self, rank: int) -> bool:
        place = self._place[rank]
        if place == len(self._programs[rank]) or self._stops.get(rank, -1) == place:
            return False
        do, group = self._programs[rank][place]
        key = group, rank
        came = self.entered[key] == self.left[key]
        if came:
            self.entered[key] += 1
        if do == "meet":
            over = all(
                self.entered[group, m] >= self.entered[key] for m in self.mesh.members[group]
            )
        else:
            # What is sent is on its way at once, as a small message is.
            sender, receiver = (int(end) for end in group.split()[1].split(">"))
            over = rank == sender or self.entered[group, sender] >= self.entered[group, receiver]
        if over:
            self.left[key] += 1
            self._place[rank] += 1
        return came or over

    def told(self, per_node: int = 2) -> tuple[GroupCounts, ...]:
        """Return what nodes say of it."""
        rows = []
        for node in range(0, self.mesh.size, per_node):
            here = range(node, node + per_node)
            for group in dict.fromkeys(group for group, rank in self.entered if rank in here):
                ranks = [rank for rank in here if (group, rank) in self.entered]
                entered = tuple(self.entered[group, rank] for rank in ranks)
                left = tuple(self.left[group, rank] for rank in ranks)
                rows.append(GroupCounts(group, tuple(map(Rank, ranks)), entered, left))
        return tuple(rows)
