"""What `get devices`, `describe device`, `release` and `retire` tell, add and refuse."""

import json
from pathlib import Path

import pytest
import yaml

from orchestrator.cli import get as get_module
from orchestrator.cli.choices import Output
from orchestrator.core.events import DeviceKnown, DevicesKnown
from orchestrator.core.standing import Act, DeviceVerdict, Proof, Standing
from orchestrator.protocol.devices import Device
from orchestrator.protocol.ids import NodeId, Serial
from orchestrator.worlds.devices import DeviceLedger, address_of_all_runs, key_of
from storage.local import LocalStore
from tests.conftest import Cluster
from tests.journals import holdfast, refused, told, write

pytestmark = pytest.mark.usefixtures("home")


def convict(serial: str = "m-1", *, at: float = 1.7e9, root: Path | None = None) -> None:
    store = LocalStore(root or Path(address_of_all_runs()))
    DeviceLedger(store).add(
        DeviceVerdict(
            serial=Serial(serial),
            act=Act.CONVICTED,
            actor="controller",
            by="the controller of r",
            reason="digests differ",
            proof=Proof.VOTE,
            kind="machine",
            model="XE9680",
            run="r",
            incident="inc-1",
            node=NodeId("node-1"),
            at=at,
            id=f"r/{serial}/{at}",
        )
    )


def standing(serial: str = "m-1") -> Standing:
    ledger = DeviceLedger(LocalStore(Path(address_of_all_runs())))
    ledger.refresh()
    return ledger.records()[Serial(serial)].standing


def test_without_verdicts_there_is_a_table_with_headers() -> None:
    assert told("get", "devices").split()[:3] == ["SERIAL", "KIND", "STANDING"]


def test_devices_come_in_every_form() -> None:
    convict("m-1")
    convict("m-2")

    table = told("get", "devices").splitlines()
    as_json = json.loads(told("get", "devices", "-o", "json"))

    assert len(table) == 3
    assert table[1].split()[:5] == ["m-1", "machine", "quarantined", "node-1", "1"]
    assert "2023-11-14 22:13:20" in table[1]
    assert len(told("get", "devices", "-o", "wide").splitlines()[0].split()) > len(table[0].split())
    assert yaml.safe_load(told("get", "devices", "-o", "yaml")) == as_json
    assert told("get", "devices", "-o", "name") == "device/m-1\ndevice/m-2\n"
    assert [row["name"] for row in as_json] == ["m-1", "m-2"]


def test_a_device_is_described_with_every_verdict_and_what_its_standing_means() -> None:
    convict()
    told("release", "device", "m-1", "--reason", "new DIMM")

    text = told("describe", "device", "device/m-1")

    assert "Standing:   retest since" in text
    assert "its node gets no seat before it has computed what is known beforehand" in text
    assert (
        "2023-11-14 22:13:20  convicted by vote, says the controller of r (r, inc-1, node-1): "
        "digests differ" in text
    )
    assert "released, says" in text
    assert ": new DIMM" in text


def test_an_operator_releases_by_steps_and_retires_for_good() -> None:
    convict()

    assert told("release", "device", "m-1", "--reason", "new DIMM") == "m-1 is to be tested\n"
    assert told("retire", "device", "m-1", "--reason", "again") == "m-1 is retired\n"
    row = json.loads(
        told("release", "device", "m-1", "--reason", "sent in", "--tested", "-o", "json")
    )
    assert [(r["name"], r["standing"]) for r in row] == [("m-1", "probation")]
    assert standing() is Standing.PROBATION


def test_what_waits_for_a_test_may_be_said_to_have_been_tested() -> None:
    convict()
    told("release", "device", "m-1", "--reason", "new DIMM")

    assert told("release", "device", "m-1", "--reason", "ran for a day", "--tested") == (
        "m-1 is probation\n"
    )


def test_one_that_is_misspelt_is_refused_with_the_nearest_and_nothing_is_added() -> None:
    convict()

    message, hint = refused("retire", "device", "m-2", "--reason", "x", code=2)

    assert message.startswith("no device 'm-2': ")
    assert hint == "did you mean `m-1`?"
    assert standing("m-1") is Standing.QUARANTINED


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("release", "node", "m-1", "--reason", "x"), "no kind 'node'"),
        (("release", "device", "m-1", "--reason", " "), "--reason says nothing"),
        (("retire", "device", "m-1", "--reason", "x" * 201), "--reason has 201 characters"),
        (("retire", "device", "m-1", "--reason", "a\nb"), "in one line"),
        (("describe", "device"), "no device is named"),
        (("describe", "device", "m-9"), "no device 'm-9'"),
        (("get", "devices", "--run", "nowhere"), "no run 'nowhere'"),
    ],
)
def test_bad_input_is_refused_with_a_hint(arguments: tuple[str, ...], says: str) -> None:
    convict()

    message, hint = refused(*arguments, code=2)

    assert says in message
    assert hint
    assert standing() is Standing.QUARANTINED


def test_to_release_what_nothing_is_held_against_is_refused() -> None:
    convict()
    told("release", "device", "m-1", "--reason", "new DIMM", "--tested")
    assert told("release", "device", "m-1", "--reason", "a month of work") == "m-1 is healthy\n"

    message, hint = refused("release", "device", "m-1", "--reason", "x", code=2)

    allowed = "`suspect`, `quarantined`, `probation`, `retired`"
    assert f"m-1 is healthy, expected one of {allowed}" in message
    assert hint == "look with `holdfast describe device m-1`"


def test_no_verdict_is_added_if_one_of_several_can_not_be() -> None:
    convict("m-1")
    convict("m-2")
    told("retire", "device", "m-2", "--reason", "x")

    refused("retire", "device", "m-1", "m-2", "--reason", "x", code=2)

    assert standing("m-1") is Standing.QUARANTINED


def test_a_reason_has_to_be_given() -> None:
    convict()
    assert holdfast("retire", "device", "m-1").exit_code == 2


def test_what_is_damaged_is_named_after_all_that_can_be_told() -> None:
    convict("m-1")
    convict("m-2")
    path = Path(address_of_all_runs()) / key_of(0)
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-5])

    result = holdfast("get", "devices")

    assert result.exit_code == 6
    assert "m-2" in result.stdout
    assert "m-1" not in result.stdout
    assert f"the device ledger is damaged: {key_of(0)}: checksum is" in result.stderr
    assert "\nhint: " in result.stderr
    assert key_of(0) in told("describe", "device", "m-2")


def test_watching_reads_what_was_added_since(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class _OverError(Exception):
        pass

    def look_again(_s: float) -> None:
        if standing() is Standing.RETIRED:
            raise _OverError
        told("retire", "device", "m-1", "--reason", "x")

    convict()
    monkeypatch.setattr("orchestrator.cli.get.time.sleep", look_again)

    with pytest.raises(_OverError):
        get_module.get("devices", None, Output.TABLE, watch=True, tail=0, periodic=False)

    shown = capsys.readouterr().out
    assert shown.index("quarantined") < shown.index("retired")


def machines(home: Path, *, plan: bool) -> Path:
    """A run of two nodes whose machines are known; with a fault plan it has its own ledger."""
    cluster = Cluster()
    known = DeviceKnown(Serial("m-1"), Standing.QUARANTINED, "digests differ")
    cluster.tell(DevicesKnown(at=cluster.at(), devices=(known,)))
    for number in (0, 1):
        device = Device(Serial(f"m-{number}"), "machine", "machine-id", "XE9680")
        cluster.join(f"node-{number}", devices=(device,))
    cluster.join("node-2")
    folder = write(cluster, home / "demo")
    if plan:
        folder.plan_file.touch()
    return folder.devices


def test_of_a_run_its_devices_are_listed_too_with_their_nodes(home: Path) -> None:
    machines(home, plan=False)
    convict("m-1")
    convict("m-7")

    rows = json.loads(told("get", "devices", "--run", "demo", "-o", "json"))

    assert [(r["name"], r["standing"], r["node"], r["source"]) for r in rows] == [
        ("m-0", "healthy", "node-0", "machine-id"),
        ("m-1", "quarantined", "node-1", "machine-id"),
        ("m-7", "quarantined", "node-1", ""),
    ]
    assert "nothing is held against it" in told("describe", "device", "m-0", "--run", "demo")


def test_of_a_run_with_a_fault_plan_it_is_its_own_ledger(home: Path) -> None:
    own = machines(home, plan=True)
    convict("m-1", root=own)

    assert told("release", "device", "m-1", "--run", "demo", "--reason", "it was us") == (
        "m-1 is to be tested\n"
    )
    assert told("get", "devices", "-o", "name").strip() == ""


def test_a_node_says_what_it_is_made_of_and_why_it_is_kept_out(home: Path) -> None:
    machines(home, plan=False)

    text = told("describe", "node", "node-1", "--run", "demo")

    assert "Devices:\n  machine m-1 (XE9680): quarantined" in text
    assert "for its machine m-1, which is quarantined: digests differ" in text
    row = next(r for r in json.loads(told("get", "nodes", "-o", "json")) if r["name"] == "node-1")
    assert row["condition"] == "Quarantined"
