"""A real agent says who it is, and computes what is known beforehand when it is told to."""

import math
import time
from collections.abc import Callable

import msgspec
import pytest

from orchestrator.protocol.ids import Serial
from orchestrator.protocol.messages import Beat, Joined, Preflight, Preflighted
from orchestrator.worker.golden import CASES, SCALES
from tests.programs.played import Agent, Controller

pytestmark = pytest.mark.process


def test_an_agent_says_who_it_is_and_is_heard_while_it_computes_what_is_known_beforehand(
    controller: Controller, start: Callable[..., Agent]
) -> None:
    start(serial="rack7-u12")
    _, joined = controller.hear(Joined)
    machine = joined.devices[0]
    assert (machine.serial, machine.kind, machine.source) == ("rack7-u12", "machine", "stated")

    order = Preflight(order="p", serials=(Serial("rack7-u12"),), within_s=0.1)
    controller.send("node-0", order)
    _, came = controller.hear(Preflighted)

    assert (came.serials, came.wrong, came.problem) == (("rack7-u12",), "", "")
    assert came.compared % (len(CASES) * len(SCALES)) == 0
    assert came.compared > 0

    # It computes for as long as the test lasts; a beat may be under way before it hears that.
    at = time.monotonic()
    controller.send("node-0", msgspec.structs.replace(order, order="q", within_s=3600.0))
    for _ in range(3):
        at = math.nextafter(controller.hear(Beat, since=at)[0], math.inf)
    assert len(controller.messages(Preflighted)) == 1
