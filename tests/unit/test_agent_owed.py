"""What a node owes the durable tier, and when it has paid."""

from orchestrator.agent.impressions import Written
from orchestrator.agent.owed import Owed
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.messages import Begin, Impression, Receipt

NODE = NodeId("node-0")


def owed(*seats: str, writers: tuple[int, ...] | None = None) -> Owed:
    owed = Owed()
    ranks = tuple(Rank(rank) for rank in range(len(seats)))
    order = Begin(
        order="b",
        generation=Generation(4),
        world_size=len(seats),
        ranks=ranks,
        seats=tuple(map(NodeId, seats)),
        shard_of=ranks,
        writers=ranks if writers is None else tuple(map(Rank, writers)),
    )
    owed.begin(order, NODE)
    return owed


def receipt(shard: int) -> Receipt:
    return Receipt(shard, 10, "d")


def seen(shard: int) -> Impression:
    return Impression(shard=shard, boxes="b", content=f"c{shard}", moving="", extra="e")


def written(shard: int) -> Written:
    return Written(receipt(shard), seen(shard))


def test_a_step_is_paid_with_the_last_of_its_shards() -> None:
    node = owed("node-0", "node-0", "node-1")

    assert node.written(Rank(1), Step(20), written(1), "m") is None
    fact = node.written(Rank(0), Step(20), written(0), "m")

    assert fact is not None
    assert (fact.generation, fact.step, fact.model) == (4, 20, "m")
    assert fact.receipts == (receipt(0), receipt(1))
    assert fact.impressions == (seen(0), seen(1))


def test_what_other_replicas_write_is_told_once_all_ranks_here_have_staged_it() -> None:
    node = owed("node-0", "node-0", "node-0", "node-1", writers=(0, 3))

    assert node.staged(Rank(2), Step(20), seen(2)) is None
    fact = node.staged(Rank(1), Step(20), seen(1))

    assert fact is not None
    assert (fact.generation, fact.step, fact.impressions) == (4, 20, (seen(1), seen(2)))


def test_a_node_owes_the_shards_of_those_of_its_ranks_that_are_to_write() -> None:
    node = owed("node-1", "node-0", "node-0", "node-0", writers=(0, 1))

    assert [node.owes(Rank(rank)) for rank in range(4)] == [False, True, False, False]


def test_a_failed_write_is_news_once_and_costs_nothing_that_was_written() -> None:
    node = owed("node-0", "node-0")
    node.written(Rank(0), Step(20), written(0), "m")

    assert node.failed(Step(20))
    assert not node.failed(Step(20))
    fact = node.written(Rank(1), Step(20), written(1), "m")

    assert fact is not None
    assert fact.receipts == (receipt(0), receipt(1))


def test_steps_that_never_get_whole_are_forgotten_in_time() -> None:
    node = owed("node-0", "node-0")
    for step in range(1, 40):
        node.written(Rank(0), Step(step), written(0), "m")

    assert node.written(Rank(1), Step(39), written(1), "m") is not None
    assert node.written(Rank(1), Step(1), written(1), "m") is None
