"""At whose door an incident is laid, when it is known what was let loose."""

from typing import Any

import pytest

from orchestrator.core.incident import UNRESTORABLE, Cause, Finding, Incident
from orchestrator.protocol.ids import Generation, IncidentId, NodeId, Seconds
from orchestrator.simulation.accounts import causes
from orchestrator.simulation.struck import Struck

SWAPPED = NodeId("node-1")


def incident(number: int, kind: str, at_s: float, resumed_s: float, *nodes: NodeId) -> Incident:
    at = Seconds(at_s)
    return Incident(
        id=IncidentId(f"inc-{number}"),
        kind=kind,
        cause=Cause.STORAGE,
        generation=Generation(number),
        since=at,
        detected_at=at,
        resumed_at=Seconds(resumed_s),
        findings=[
            Finding(at=at, since=at, kind=kind, cause=Cause.STORAGE, evidence="", nodes=nodes)
        ],
    )


@pytest.mark.parametrize(("found_s", "whose"), [(5001.0, "slow-node"), (5200.0, None)])
def test_what_a_recovery_could_not_go_on_from_is_laid_at_the_door_of_what_it_recovered_from(
    cluster: Any, found_s: float, whose: str | None
) -> None:
    cluster.state.incidents += [
        incident(1, "planned", 5000.0, 5100.0, SWAPPED),
        incident(2, UNRESTORABLE, found_s, 5300.0),
        incident(3, UNRESTORABLE, found_s + 1.0, 5300.0),
    ]
    slow = Struck(at=Seconds(10.0), name="slow-node", sort="slow", nodes=(SWAPPED,))

    found = causes(cluster.state, [slow])

    assert found[IncidentId("inc-1")] is slow
    for number in ("inc-2", "inc-3"):
        struck = found[IncidentId(number)]
        assert (struck.name if struck else None) == whose
