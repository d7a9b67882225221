"""Who is told where others can be called, and when."""

from orchestrator.core.decisions import RestoreFrom, StartGeneration
from orchestrator.protocol.ids import Generation, NodeId, Step
from orchestrator.worlds.addresses import Addresses

A, B, C, D = (NodeId(name) for name in "abcd")


def began() -> Addresses:
    """a and b copy to each other, rank 1 on b restores from c; all but c, and then c, joined."""
    addresses = Addresses()
    addresses.begin(
        StartGeneration(
            generation=Generation(1),
            reason="x",
            seats=(A, B),
            dismiss=(),
            restore=RestoreFrom(step=Step(5), sources=(A, C)),
            buddies={A: B, B: A},
        )
    )
    for node in (A, B, D):
        addresses.joined(node, f"{node}:1")
    return addresses


def test_a_source_without_a_seat_that_joins_last_is_told_to_who_restores_from_it() -> None:
    addresses = began()
    assert addresses.news(B, [A, B, D]) == {A: "a:1"}, "b calls neither itself nor d"
    assert addresses.news(A, [A, B, D]) is not None

    addresses.joined(C, "c:1")

    assert addresses.waiting(C) == [B]
    assert addresses.news(A, [A, B, C, D]) is None
    assert addresses.news(B, [A, B, C, D]) == {A: "a:1", C: "c:1"}
    assert addresses.waiting(C) == []


def test_an_address_is_not_taken_back_while_its_node_is_not_connected() -> None:
    addresses = began()
    addresses.news(B, [A, B, D])
    addresses.joined(C, "c:1")

    assert addresses.news(B, [B, C]) == {A: "a:1", C: "c:1"}


def test_who_connects_again_is_told_everything_again_and_nothing_twice_on_one_connection() -> None:
    addresses = began()
    assert addresses.news(A, [A, B]) == {B: "b:1"}
    assert addresses.news(A, [A, B, D]) is None

    addresses.joined(A, "a:1")

    assert addresses.news(A, [A, B, D]) == {B: "b:1"}
