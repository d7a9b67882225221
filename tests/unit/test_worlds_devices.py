"""The device ledger on disk: one order, whoever adds, whatever breaks."""

import threading
import time
from pathlib import Path

import msgspec
import pytest
import xxhash

from orchestrator import compose
from orchestrator.cli import drill
from orchestrator.cli.prepare import ledger_problem
from orchestrator.core.standing import Act, DeviceVerdict, Proof, Standing
from orchestrator.protocol.ids import Serial
from orchestrator.protocol.runfile import TrainingRun
from orchestrator.worlds.devices import PROBES, DeviceLedger, address, key_of, read, written
from orchestrator.worlds.folder import HOME_VARIABLE, RunFolder
from storage.errors import StorageUnavailableError
from storage.faulty import FaultyStore
from storage.local import LocalStore
from storage.memory import MemoryStore
from tests import runfiles


def verdict(name: str = "a", serial: str = "m-1", act: Act = Act.CONVICTED) -> DeviceVerdict:
    return DeviceVerdict(
        serial=Serial(serial),
        act=act,
        actor="controller" if act is Act.CONVICTED else "operator",
        by="r",
        reason="digests differ",
        proof=Proof.VOTE if act is Act.CONVICTED else Proof.NONE,
        at=1e9,
        id=name,
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "devices"


def ledger(root: Path) -> DeviceLedger:
    found = DeviceLedger(LocalStore(root))
    found.refresh()
    return found


def test_what_was_added_is_read_by_others_in_the_order_in_which_it_came(root: Path) -> None:
    one, other = ledger(root), ledger(root)
    one.add(verdict("a"))
    other.add(verdict("b", "m-2"))
    one.add(verdict("c", act=Act.RELEASED))

    assert [v.id for v in ledger(root).verdicts] == ["a", "b", "c"]
    assert {s: r.standing for s, r in ledger(root).records().items()} == {
        "m-1": Standing.RETEST,
        "m-2": Standing.QUARANTINED,
    }


def test_a_verdict_that_is_added_again_under_its_name_is_there_once(root: Path) -> None:
    ledger(root).add(verdict("a"))
    ledger(root).add(verdict("a"))

    assert len(ledger(root).verdicts) == 1


def test_who_may_not_say_so_adds_nothing(root: Path) -> None:
    hearsay = DeviceVerdict(
        serial=Serial("m-1"),
        act=Act.CONVICTED,
        actor="controller",
        by="r",
        reason="a loss stood out",
        at=0.0,
        id="a",
    )

    with pytest.raises(ValueError, match="without a proof"):
        ledger(root).add(hearsay)
    assert ledger(root).verdicts == []


def test_many_who_add_at_once_lose_nothing(root: Path) -> None:
    def add(writer: int) -> None:
        mine = ledger(root)
        for number in range(5):
            mine.add(verdict(f"{writer}/{number}", f"m-{writer}", Act.RETIRED))

    threads = [threading.Thread(target=add, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    ids = [v.id for v in ledger(root).verdicts]
    assert sorted(ids) == sorted(f"{w}/{n}" for w in range(4) for n in range(5))
    for writer in range(4):
        mine = [name for name in ids if name.startswith(f"{writer}/")]
        assert mine == sorted(mine), "each one's own are in the order in which it added them"


class _KilledError(Exception):
    pass


def test_a_writer_that_is_killed_anywhere_leaves_a_verdict_or_none(root: Path) -> None:
    steps: list[str] = []
    ledger(root / "dry").add(verdict("a"))
    DeviceLedger(LocalStore(root / "dry", before=steps.append)).add(verdict("b", "m-2"))
    assert "link" in steps
    for place in range(len(steps)):
        where = root / str(place)
        ledger(where).add(verdict("a"))
        done: list[str] = []

        def kill(step: str, done: list[str] = done, place: int = place) -> None:
            if len(done) == place:
                raise _KilledError(step)
            done.append(step)

        with pytest.raises(_KilledError):
            DeviceLedger(LocalStore(where, before=kill)).add(verdict("b", "m-2"))

        left = ledger(where)
        assert left.damages == []
        assert [v.id for v in left.verdicts] in (["a"], ["a", "b"])
        left.add(verdict("b", "m-2"))
        assert [v.id for v in ledger(where).verdicts] == ["a", "b"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda _: b"",
        lambda data: data.replace(b"differ", b"digger"),
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda _: b"\xff" * 10,
        lambda data: data * 2000,
    ],
    ids=["no end", "half", "empty", "a word", "a bit", "noise", "long"],
)
def test_a_damaged_verdict_is_named_and_the_others_count(root: Path, damage: object) -> None:
    one = ledger(root)
    one.add(verdict("a"))
    one.add(verdict("b", "m-2"))
    path = root / key_of(0)
    data = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(damage(data))  # type: ignore[operator]

    found = ledger(root)

    assert [v.id for v in found.verdicts] == ["b"]
    assert found.damages[0].key == key_of(0)
    assert key_of(0) in found.problem()
    found.add(verdict("c"))
    assert [v.id for v in ledger(root).verdicts] == ["b", "c"]


def test_a_verdict_of_another_version_is_named_as_such() -> None:
    data = written(verdict()).replace(b'"act":"convicted"', b'"act":"pardoned"')
    body = data.partition(b" ")[2].rstrip(b"\n")

    with pytest.raises(ValueError, match="of another version"):
        read(b"%s %s\n" % (xxhash.xxh3_64_hexdigest(body).encode(), body))


def test_a_put_whose_answer_was_lost_is_not_added_twice() -> None:
    store = FaultyStore(MemoryStore(), lose_confirmation=True)
    one = DeviceLedger(store)
    with pytest.raises(StorageUnavailableError):
        one.add(verdict("a"))

    one.add(verdict("a"))

    assert store.keys("verdicts/") == [key_of(0)]
    assert [v.id for v in one.verdicts] == ["a"]


def test_a_verdict_that_may_not_be_read_keeps_no_other_from_counting() -> None:
    store = FaultyStore(MemoryStore())
    for name in ("a", "b"):
        DeviceLedger(store).add(verdict(name, f"m-{name}"))
    store.refused = {key_of(0)}
    one = DeviceLedger(store)

    one.add(verdict("c", "m-c"))

    assert [v.id for v in one.verdicts] == ["b", "c"]
    assert store.keys("verdicts/")[-1] == key_of(2)
    assert f"can not be read as a whole: {key_of(0)}: Permission denied" in one.problem()
    store.refused = set()
    one.refresh()
    assert [v.id for v in one.verdicts] == ["a", "b", "c"], "in their order"
    assert one.problem() == ""


def test_the_ledger_of_a_large_fleet_is_read_before_a_start_gives_it_up() -> None:
    store, count = MemoryStore(), 20_000
    for number in range(count):
        store.put(key_of(number), written(verdict(f"v-{number}", f"m-{number}")))
    known = DeviceLedger(store)

    begun = time.process_time()
    known.refresh()

    assert len(known.verdicts) == count
    # 0.3 s; comparing each verdict with all before it took 7 s.
    assert time.process_time() - begun < 3.0


def test_a_verdict_that_was_added_twice_since_it_could_not_be_read_counts_once() -> None:
    store = FaultyStore(MemoryStore())
    DeviceLedger(store).add(verdict("a"))
    store.refused = {key_of(0)}
    DeviceLedger(store).add(verdict("a"))
    store.refused = set()
    one = DeviceLedger(store)

    one.refresh()

    assert [v.id for v in one.verdicts] == ["a"]


def stated(uri: str) -> TrainingRun:
    text = runfiles.text(recovery={"deviceLedger": uri})
    return compose.parse(text, TrainingRun, "run.yaml")


def test_a_ledger_that_takes_no_verdicts_is_said_at_the_start_and_stops_no_run(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path / "run")
    (tmp_path / "file").touch()

    found = ledger_problem(stated(f"{tmp_path}/file/devices"), folder)

    assert "warning: spec.recovery.deviceLedger takes no verdicts: " in found
    assert ledger_problem(stated(str(tmp_path / "devices")), folder) == ""
    assert ledger(tmp_path / "devices").problem() == ""


def test_who_looks_while_somebody_else_sees_whether_it_takes_verdicts_finds_no_damage() -> None:
    store = MemoryStore()
    store.put(f"{PROBES}1", b"")
    one = DeviceLedger(store)

    one.add(verdict("a"))

    assert (one.problem(), store.keys("verdicts/")[0]) == ("", key_of(0))


def test_a_run_with_a_fault_plan_has_a_ledger_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    run = compose.parse(runfiles.text(), TrainingRun, "run.yaml")
    assert address(run, folder) == str(tmp_path / "home" / "@devices")

    shared = stated("s3://fleet/devices")
    assert address(shared, folder) == "s3://fleet/devices"

    twin = drill.twin_of(shared, tmp_path / "drill")
    own = tmp_path / "drill" / "twin"
    assert address(twin, RunFolder(own)) == str(own / "devices")
    campaign = msgspec.structs.replace(
        shared, spec=msgspec.structs.replace(shared.spec, campaign=True)
    )
    assert address(campaign, folder) == str(tmp_path / "run" / "devices")

    folder.plan_file.touch()
    assert address(run, folder) == str(tmp_path / "run" / "devices")
    assert address(shared, folder) == str(tmp_path / "run" / "devices")
