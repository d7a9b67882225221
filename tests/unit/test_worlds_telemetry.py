"""Beats of nodes become columns of the whole world."""

from orchestrator.core.fleet import Fleet
from orchestrator.protocol.digests import Digests, Taken
from orchestrator.protocol.ids import Generation, NodeId, Rank, Seconds, Step
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.messages import Beat, DetectorFailed, GroupCounts, StepReport
from orchestrator.worlds.telemetry import Columns


def beat(ranks: tuple[int, ...], generation: int = 1, **changes: object) -> Beat:
    columns = {
        "phases": (6,) * len(ranks),
        "steps": (3,) * len(ranks),
        "progress": (10,) * len(ranks),
        "states": "S" * len(ranks),
        "cpu_s": (1.0,) * len(ranks),
        "stall_s": (0.0,) * len(ranks),
    }
    return Beat(
        generation=Generation(generation),
        ranks=tuple(Rank(rank) for rank in ranks),
        **columns | changes,  # type: ignore[arg-type]
    )


def report(step: int) -> StepReport:
    return StepReport(Step(step), 2.5, 1.0, 1024, 0.1)


def started(restored: int = 0) -> Columns:
    columns = Columns(4)
    columns.begin(Generation(1), Step(restored), 4)
    return columns


def test_two_nodes_fill_their_own_ranks_and_the_rest_stays_unknown() -> None:
    columns = started()

    columns.take(NodeId("n0"), beat((0, 1), steps=(7, 8)))
    event = columns.telemetry(Seconds(1.0))

    assert event is not None
    assert event.steps == (7, 8, -1, -1)
    assert event.states == "SS??"
    assert event.heard == ("n0",)


def test_what_ranks_computed_and_what_that_took_of_their_processors_is_in_columns() -> None:
    columns = started()

    columns.take(NodeId("n0"), beat((0, 1), compute_s=(0.5, 0.6), busy_s=(0.4, 0.3), work=(1, 1)))
    columns.take(NodeId("n1"), beat((2, 3), compute_s=(0.7, 0.8), busy_s=(0.2, 0.1), work=(1, 1)))
    event = columns.telemetry(Seconds(1.0))

    assert event is not None
    assert (event.compute_s, event.busy_s) == ((0.5, 0.6, 0.7, 0.8), (0.4, 0.3, 0.2, 0.1))
    assert event.work == (1,)


def test_a_replay_is_told_once_and_not_of_an_older_generation() -> None:
    columns = started()
    columns.ballots.begin(Generation(1), Layout(dp_replicate=4), (NodeId("n0"),) * 4)
    passed = Digests(Taken(step=Step(9), shift=1), tuple(map(Rank, range(4))), ("",) * 7)

    def told() -> list[int]:
        columns.take(NodeId("n0"), beat((0, 1, 2, 3)))
        assert list(columns.compared(Seconds(1.0))) == []
        return [event.replayed for event in [columns.telemetry(Seconds(1.0))] if event]

    columns.take(NodeId("n0"), beat((0, 1, 2, 3), digests=(passed,)))
    assert told() == [9]
    assert told() == [0]
    columns.take(NodeId("n0"), beat((0, 1, 2, 3), digests=(passed,)))
    columns.begin(Generation(2), Step(0), 4)
    columns.ballots.begin(Generation(2), Layout(dp_replicate=4), (NodeId("n0"),) * 4)
    columns.take(NodeId("n0"), beat((0, 1, 2, 3), digests=(passed,)))
    assert told() == [0]


def test_counts_of_groups_are_passed_on_once_and_nonsense_is_not() -> None:
    columns = started()
    sound = GroupCounts("tp@0", (Rank(0), Rank(1)), (7, 6), (6, 6))
    beyond = GroupCounts("tp@0", (Rank(3), Rank(4)), (7, 6), (6, 6))
    short = GroupCounts("tp@0", (Rank(0), Rank(1)), (7,), (6, 6))
    silent = GroupCounts("tp@0", (Rank(0), Rank(1)), (7, 6), (6, 6), ("barrier",))

    columns.take(NodeId("n0"), beat((0, 1), groups=(beyond, sound, short, silent)))
    event = columns.telemetry(Seconds(1.0))
    columns.take(NodeId("n0"), beat((0, 1)))
    later = columns.telemetry(Seconds(2.0))

    assert event is not None
    assert later is not None
    assert (event.groups, later.groups) == ((sound,), ())


def test_ranks_that_are_not_in_a_row_have_their_own_places_as_well() -> None:
    columns = started()

    columns.take(NodeId("n0"), beat((3, 1), steps=(7, 8), cpu_s=(0.5, 0.25), states="RD"))
    event = columns.telemetry(Seconds(1.0))

    assert event is not None
    assert event.steps == (-1, 8, -1, 7)
    assert event.cpu_s == (0.0, 0.25, 0.0, 0.5)
    assert event.states == "?D?R"


def test_a_rank_out_of_the_world_is_passed_over_and_the_others_are_not() -> None:
    columns = started()

    columns.take(NodeId("n0"), beat((3, 4), steps=(7, 8)))
    event = columns.telemetry(Seconds(1.0))

    assert event is not None
    assert event.steps == (-1, -1, -1, 7)


def test_a_tick_in_which_nobody_was_heard_is_no_telemetry() -> None:
    columns = started()
    columns.take(NodeId("n0"), beat((0, 1)))
    columns.telemetry(Seconds(1.0))

    assert columns.telemetry(Seconds(2.0)) is None


def test_a_beat_of_an_older_generation_only_says_that_the_node_lives() -> None:
    columns = started()

    columns.take(NodeId("n0"), beat((0, 1), generation=0, reports=(report(9),)))
    event = columns.telemetry(Seconds(1.0))

    assert event is not None
    assert (event.heard, event.steps, event.reports) == (("n0",), (-1,), ())


def test_a_column_that_says_the_same_of_every_rank_says_it_once() -> None:
    columns = started()

    columns.take(NodeId("n0"), beat((0, 1), progress=(8, 9)))
    columns.take(NodeId("n1"), beat((2, 3)))
    event = columns.telemetry(Seconds(1.0))

    assert event is not None
    assert (event.phases, event.steps, event.states, event.cpu_s) == ((6,), (3,), "S", (1.0,))
    assert event.progress == (8, 9, 10, 10)


def test_ranks_that_moved_as_far_and_differ_in_anything_else_are_told_of_one_by_one() -> None:
    columns = started()

    columns.take(NodeId("n0"), beat((0, 1), states="ST"))
    columns.take(NodeId("n1"), beat((2, 3)))
    event = columns.telemetry(Seconds(1.0))

    assert event is not None
    fleet = Fleet(4, Seconds(0.0))
    fleet.observe(
        event.at,
        phases=event.phases,
        steps=event.steps,
        progress=event.progress,
        states=event.states,
        cpu_s=event.cpu_s,
    )
    assert fleet.states == "STSS"
    assert fleet.progress_R.tolist() == [10] * 4


def test_a_step_that_several_nodes_report_is_passed_on_once_and_in_order() -> None:
    columns = started(restored=4)

    columns.take(NodeId("n0"), beat((0, 1), reports=(report(4), report(5), report(6))))
    columns.take(NodeId("n1"), beat((2, 3), reports=(report(5), report(6), report(7))))
    event = columns.telemetry(Seconds(1.0))

    assert event is not None
    assert [r.step for r in event.reports] == [5, 6, 7]


def test_steps_go_ahead_of_the_tick_when_a_fact_follows_them() -> None:
    columns = started()
    columns.take(NodeId("n0"), beat((0, 1)))
    assert list(columns.flush(Seconds(1.0))) == []

    columns.take(NodeId("n0"), beat((0, 1), reports=(report(1),)))

    assert [r.step for e in columns.flush(Seconds(1.0)) for r in e.reports] == [1]


def test_the_longest_new_stall_counts_and_what_was_stalled_before_does_not() -> None:
    columns = started()
    columns.take(NodeId("n0"), beat((0, 1), stall_s=(5.0, 5.0)))
    columns.telemetry(Seconds(1.0))

    columns.take(NodeId("n0"), beat((0, 1), stall_s=(5.25, 5.5)))
    event = columns.telemetry(Seconds(2.0))

    assert event is not None
    assert event.stall_s == 0.5


def test_a_rank_that_the_world_does_not_have_is_left_out() -> None:
    columns = started()

    columns.take(NodeId("n0"), beat((3, 4)))
    event = columns.telemetry(Seconds(1.0))

    assert event is not None
    assert event.steps == (-1, -1, -1, 3)


def test_digests_that_can_not_be_compared_are_said_to_be_so_once_and_beats_count_on() -> None:
    columns = started()
    # Of a world that is not cut as it should be, nothing can be compared.
    columns.ballots.begin(Generation(1), Layout(dp_replicate=4), (NodeId("n0"),) * 2)
    taken = Taken(step=Step(3))
    torn = Digests(taken, (Rank(0), Rank(1)), ("0123456789abcdef" * 2, "", "", "", "", "", ""))

    columns.take(NodeId("n0"), beat((0, 1), digests=(torn,)))
    columns.take(NodeId("n0"), beat((0, 1), steps=(4, 4), digests=(torn,)))
    (said,) = columns.compared(Seconds(1.0))

    assert isinstance(said.fact, DetectorFailed)
    assert (said.fact.detector, said.fact.ranks) == ("comparison", ())
    assert said.fact.reason.startswith("ValueError: ")
    assert list(columns.compared(Seconds(2.0))) == []
    event = columns.telemetry(Seconds(2.0))
    assert event is not None
    assert event.steps == (4, 4, -1, -1)

    columns.begin(Generation(2), Step(3), 4)
    columns.ballots.begin(Generation(2), Layout(dp_replicate=4), (NodeId("n0"),) * 2)
    columns.take(NodeId("n0"), beat((0, 1), generation=2, digests=(torn,)))
    assert len(list(columns.compared(Seconds(3.0)))) == 1, "the next generation looks again"
