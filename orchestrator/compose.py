"""Reads what users write, and puts a controller together from it.

A file that can not be read as what it should be is refused with what was expected, what was
found, where, and the nearest name for a misspelt one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from orchestrator import document, faults
from orchestrator.core.controller import Controller
from orchestrator.detect.corruption import Corruption
from orchestrator.detect.exits import Exits
from orchestrator.detect.hang import Hang
from orchestrator.detect.links import Links
from orchestrator.detect.preparation import Preparation
from orchestrator.detect.silence import Silence
from orchestrator.detect.straggler import Straggler
from orchestrator.document import BadFileError
from orchestrator.faults.model import FaultModel
from orchestrator.faults.plan import FaultPlan
from orchestrator.faults.record import FaultRecord
from orchestrator.faults.sections import ModelError
from orchestrator.policy import switches
from orchestrator.policy.cadence import cadence
from orchestrator.policy.planned import PlannedSwap
from orchestrator.policy.recovery import ladder
from orchestrator.policy.shrinking import GrowBack
from orchestrator.protocol.fitting import misfits
from orchestrator.protocol.runfile import TrainingRun, seconds
from orchestrator.protocol.timeouts import Timeouts, derive
from storage.address import open_store
from storage.errors import UnsupportedUriError

T = TypeVar("T", TrainingRun, FaultPlan, FaultModel, FaultRecord)
Named = TypeVar("Named")
PACKAGED = Path(faults.__file__).parent / "data"
"""Fault models and records that come with holdfast."""
RECORD_ENDING = "-record.yaml"


def read_run(path: Path) -> TrainingRun:
    """Read and check a run file.

    Raises:
        BadFileError: if it is not a run file, or its parts do not fit together.
    """
    run = parse(document.read(path), TrainingRun, str(path))
    check(run, str(path))
    return run


def read_plan(path: Path) -> FaultPlan:
    """Read a fault plan. Raises BadFileError if it is none."""
    return parse(document.read(path), FaultPlan, str(path))


def read_model(path: Path) -> FaultModel:
    """Read and check a fault model. Raises BadFileError if it is none."""
    model = parse(document.read(path), FaultModel, str(path))
    try:
        return model.checked()
    except ModelError as error:
        raise BadFileError(f"{error}: {path}", error.hint) from error


def read_record(path: Path, model: FaultModel) -> FaultRecord:
    """Read a fault record, and check it against its model. Raises BadFileError if it is none."""
    record = parse(document.read(path), FaultRecord, str(path))
    try:
        return record.checked(model)
    except ModelError as error:
        raise BadFileError(f"{error}: {path}", error.hint) from error


def named(name: str, read: Callable[[Path], Named], packaged: Callable[[str], Named]) -> Named:
    """Read what a name stands for: a file if it looks like one, else what comes with holdfast.

    Raises:
        BadFileError: as `read` and `packaged` do.
    """
    is_file = "/" in name or name.endswith((".yaml", ".yml", ".json"))
    return read(Path(name)) if is_file else packaged(name)


def packaged_model(name: str = "llama3") -> FaultModel:
    """Return a fault model that comes with holdfast. Raises BadFileError if there is no such."""
    return read_model(_packaged("model", name, ".yaml"))


def packaged_record(model: FaultModel, name: str = "llama3") -> FaultRecord:
    """Return a fault record that comes with holdfast. Raises BadFileError if there is no such."""
    return read_record(_packaged("record", name, RECORD_ENDING), model)


def _packaged(what: str, name: str, ending: str) -> Path:
    """Return the file of that name that comes with holdfast. Raises BadFileError without one."""
    records = {file for file in PACKAGED.iterdir() if file.name.endswith(RECORD_ENDING)}
    files = records if ending == RECORD_ENDING else {*PACKAGED.glob(f"*{ending}")} - records
    there = {file.name.removesuffix(ending): file for file in files}
    if name in there:
        return there[name]
    raise BadFileError(
        document.printable(f"no {what} {name!r} comes with holdfast"),
        f"there are: {', '.join(sorted(there))}; a file of your own ends in .yaml, .yml or .json, "
        "or has a / in its path",
    )


def parse(text: str, kind: type[T], where: str) -> T:
    """Read YAML text as a file of that kind. Raises BadFileError if it is none."""
    return document.shape(document.fields(text, kind.__name__, where), kind, where)


def check(run: TrainingRun, where: str) -> Timeouts:
    """Check that the parts of a run fit together; return the timeouts that follow from it.

    Raises:
        BadFileError: naming the first that do not.
    """
    timeouts = _timeouts(run, where)
    for misfit in misfits(run):
        raise BadFileError(f"{misfit.message}: {where}", misfit.hint)
    _check_uri(run.spec.checkpoint.uri, "spec.checkpoint.uri", where)
    _check_uri(run.spec.recovery.device_ledger, "spec.recovery.deviceLedger", where)
    try:
        switches.check(run.spec.recovery.disable)
    except switches.UnknownPolicyError as error:
        raise BadFileError(
            document.printable(f"spec.recovery.disable: {error}: {where}"), error.hint
        ) from error
    return timeouts


def _check_uri(uri: str | None, field: str, where: str) -> None:
    """Refuse an address that no store is there for. Nothing is touched."""
    if uri is None:
        return
    if not uri.strip():
        raise BadFileError(
            f"{field} names nothing: {where}", f"name a folder; `holdfast explain {field}`"
        )
    try:
        open_store(uri)
    except UnsupportedUriError as error:
        raise BadFileError(document.printable(f"{field}: {error}: {where}"), error.hint) from error
    except ValueError as error:
        raise BadFileError(
            f"{field} is {uri!r}, {error}: {where}", UnsupportedUriError.hint
        ) from error


def controller(run: TrainingRun) -> Controller:
    """Return a controller for a checked run, with every detector and policy that it makes use of.

    Only its timeouts are looked at again: a journal stays readable when more is checked than was
    when it was written.
    """
    disabled = run.spec.recovery.disable
    detectors = (
        Exits(),
        Silence(),
        Preparation(),
        Corruption(),
        Hang(),
        Straggler(),
        Links(),
        PlannedSwap(),
        GrowBack(),
    )
    auto = run.spec.checkpoint.every == "auto" and switches.CADENCE not in disabled
    return Controller(
        run,
        _timeouts(run, run.metadata.name),
        [each for each in detectors if each.name not in disabled],
        [each for each in ladder() if switches.name_of(each) not in disabled],
        cadence if auto else None,
    )


def _timeouts(run: TrainingRun, where: str) -> Timeouts:
    spec = run.spec
    for name, text in (
        ("detection.detectWithin", spec.detection.detect_within),
        ("detection.warmupLimit", spec.detection.warmup_limit),
        ("checkpoint.everyMin", spec.checkpoint.every_min),
        ("checkpoint.everyMax", spec.checkpoint.every_max),
        ("checkpoint.memoryEveryMin", spec.checkpoint.memory_every_min),
        ("checkpoint.memoryEveryMax", spec.checkpoint.memory_every_max),
        ("recovery.backoff", spec.recovery.backoff),
        ("recovery.backoffMax", spec.recovery.backoff_max),
        ("recovery.spareWait", spec.recovery.spare_wait),
    ):
        try:
            seconds(text)
        except ValueError as error:
            raise BadFileError(
                f"spec.{name}: {error}: {where}", "write for example `10s`"
            ) from error
    try:
        return derive(seconds(spec.detection.detect_within), seconds(spec.detection.warmup_limit))
    except ValueError as error:
        raise BadFileError(f"spec.detection: {error}: {where}", "10s suits most runs") from error
