"""A real run begins without the node of a device that another one convicted, and says why."""

from pathlib import Path

import pytest

from orchestrator.agent.devices import Gpus
from orchestrator.agent.identity import MACHINE_ID, identity
from orchestrator.core.standing import Act, DeviceVerdict, Proof
from orchestrator.protocol.agent import AgentConfig
from orchestrator.protocol.ids import NodeId, Serial
from orchestrator.worlds.devices import OF_ALL_RUNS, DeviceLedger
from storage.local import LocalStore
from tests.runs import Job, steps_job

pytestmark = pytest.mark.process


def serial_of(node: str) -> Serial:
    """Return who a node of a local run on this machine is."""
    paths = dict.fromkeys(("run", "token", "controller_file", "entrypoint", "memory", "work"), "")
    config = AgentConfig(
        node=NodeId(node), incarnation=1, ranks=2, logs="", kernel_shared=True, **paths
    )
    return identity(config, Gpus()).devices[0].serial


@pytest.mark.skipif(not MACHINE_ID.exists(), reason="this machine has no id of its own")
def test_a_run_begins_without_a_node_that_another_run_convicted(tmp_path: Path) -> None:
    options = {"steps": 20, "step_s": 0.02, "save_every": 5, "durable_every": 10}
    one = Job(tmp_path, steps_job(trainer__steps=20, trainer__options=options))
    DeviceLedger(LocalStore(tmp_path / "home" / OF_ALL_RUNS)).add(
        DeviceVerdict(
            serial=serial_of("node-1"),
            act=Act.CONVICTED,
            actor="controller",
            by="the controller of another",
            reason="digests differ",
            proof=Proof.VOTE,
            at=1.7e9,
            id="another/1",
        )
    )
    try:
        code, report = one.conduct("--quiet")
    finally:
        one.close()

    assert (code, report.state) == (0, "Succeeded"), report.reason
    assert report.incidents == []
    told = one.holdfast("get", "nodes", "-o", "wide")
    (row,) = [line for line in told.stdout.splitlines() if line.startswith("node-1 ")]
    assert f"for its machine {serial_of('node-1')}, which is quarantined: digests differ" in row
    assert " - " in row, "it had no rank"
