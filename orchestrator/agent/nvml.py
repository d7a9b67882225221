"""Reads what NVIDIA's library (NVML) counts and measures of the GPUs of this machine.

What to ask is a table: function, arguments, what its answer is called here. What a device or a
driver does not know is left out with the reason, as is what can not be true. Of a GPU that is gone,
that it is gone is the reading.

Source of functions, fields and numbers: NVIDIA, NVML API reference; their names in Python are those
of the package nvidia-ml-py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

from orchestrator.agent.devices import Gpu
from orchestrator.agent.signals import OFTEN_S, Look, NoDevicesError, Reading

log = logging.getLogger(__name__)

# Numbers of nvmlReturn_t.
NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND = 3, 4, 13
INVALID_ARGUMENT, UNINITIALIZED, TIMEOUT = 2, 1, 10
DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND, NOT_FOUND = 9, 12, 6
IS_LOST, RESET_REQUIRED = 15, 16
NEVER = frozenset({NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND})
"""It will not be otherwise the next time."""

CORRECTED, UNCORRECTED = 0, 1
"""nvmlMemoryErrorType_t."""
VOLATILE = 0
"""nvmlEccCounterType_t: since the driver was loaded."""
SRAM = 7
"""nvmlMemoryLocation_t: caches, registers and the like, as against the DRAM."""
SINGLE_BITS, DOUBLE_BIT = 0, 1
"""nvmlPageRetirementCause_t."""
GPU_SENSOR, SLOWDOWN = 0, 1
"""nvmlTemperatureSensors_t, nvmlTemperatureThresholds_t."""
HW_SLOWDOWN, SW_THERMAL, HW_THERMAL, POWER_BRAKE = 0x8, 0x20, 0x40, 0x80
"""nvmlClocksEventReasons."""
LINK_ERRORS = (("nvlink_replays", 0), ("nvlink_recoveries", 1), ("nvlink_crc_errors", 2))
"""nvmlNvLinkErrorCounter_t: of the data link layer."""
LINKS_MAX = 36
RECOVERY_ACTION = 230
"""Field NVML_FI_DEV_GET_GPU_RECOVERY_ACTION, a nvmlDeviceGpuRecoveryAction_t."""
XID = 0x8
"""nvmlEventTypeXidCriticalError."""
EVENTS_MAX = 64
"""Of one look; the others wait for the next."""
COUNT_MAX = 2.0**63


class Question(NamedTuple):
    """What is asked of a GPU."""

    functions: tuple[str, ...]
    """The first that the library and the driver have."""
    arguments: tuple[int, ...]
    names: tuple[str, ...]
    """Of the gauges in its answer, in order."""
    most: float = COUNT_MAX
    """An answer beyond this can not be true."""


QUESTIONS = (
    Question(("nvmlDeviceGetTotalEccErrors",), (UNCORRECTED, VOLATILE), ("ecc_uncorrected",)),
    Question(("nvmlDeviceGetTotalEccErrors",), (CORRECTED, VOLATILE), ("ecc_corrected",)),
    Question(
        ("nvmlDeviceGetMemoryErrorCounter",),
        (UNCORRECTED, VOLATILE, SRAM),
        ("ecc_sram_uncorrected",),
    ),
    Question(
        ("nvmlDeviceGetRemappedRows",),
        (),
        ("rows_remapped_corrected", "rows_remapped_uncorrected", "remap_pending", "remap_failed"),
        2.0**32 - 2,
    ),
    Question(("nvmlDeviceGetRetiredPagesPendingStatus",), (), ("pages_pending",), 1),
    Question(("nvmlDeviceGetRetiredPages",), (SINGLE_BITS,), ("pages_retired_single",)),
    Question(("nvmlDeviceGetRetiredPages",), (DOUBLE_BIT,), ("pages_retired_double",)),
    Question(
        (
            "nvmlDeviceGetCurrentClocksEventReasons",
            "nvmlDeviceGetCurrentClocksThrottleReasons",
        ),
        (),
        ("clocks_event_reasons",),
    ),
    Question(("nvmlDeviceGetTemperature",), (GPU_SENSOR,), ("temperature_c",), 200),
    Question(("nvmlDeviceGetTemperatureThreshold",), (SLOWDOWN,), ("slowdown_c",), 200),
    Question(("nvmlDeviceGetCurrPcieLinkWidth",), (), ("pcie_lanes",), 32),
    Question(("nvmlDeviceGetMaxPcieLinkWidth",), (), ("pcie_lanes_most",), 32),
    Question(("nvmlDeviceGetPcieReplayCounter",), (), ("pcie_replays",)),
)


@dataclass(slots=True)
class _Gpu:
    handle: object
    board: Gpu
    never: dict[str, str] = field(default_factory=dict)
    """Gauges that it does not have, or nobody may read, and why."""
    links: set[int] = field(default_factory=set)
    """NVLinks that were seen up."""
    links_most: int = LINKS_MAX


class _GoneError(Exception):
    """A GPU does not answer any more."""


class Nvml:
    """The GPUs of this machine. What it does may hang with the driver: it belongs in a thread.

    Args:
        library: with the functions of nvidia-ml-py; None to import that.
        events: whether to listen for Xids, too, which the kernel's log has as well.
        expected: how many GPUs there are as far as is known: to read none of them is a problem.
    """

    name = "nvml"
    every_s = OFTEN_S

    def __init__(
        self, library: object | None = None, *, events: bool = False, expected: int = 0
    ) -> None:
        self._library: Any = library
        self._listens, self._expected = events, expected
        self._begun = False
        self._gpus: dict[int, _Gpu] = {}
        self._events: object | None = None

    def boards(self) -> tuple[Gpu, ...]:
        """Return who the GPUs are that answer, in the order of the library.

        Raises:
            NoDevicesError: if there are none.
            Exception: of the library (NVMLError), if the driver does not say it.
        """
        self._begin()
        self._find()
        return tuple(gpu.board for _, gpu in sorted(self._gpus.items()))

    def look(self) -> Look:
        """See `Probe.look`."""
        try:
            self._begin()
            problems = self._find()
        except NoDevicesError:
            raise
        except self._library.NVMLError as error:
            # The driver may be about to be replaced: what is known of devices is of the old one.
            self._begun, self._gpus, self._events = False, {}, None
            return Look(problem=f"the driver does not say which GPUs there are: {error}")
        codes = self._xids()
        readings = []
        for _, gpu in sorted(self._gpus.items()):
            values, missing = self._ask(gpu)
            xids = tuple(("xid", code) for address, code in codes if address == gpu.board.address)
            readings.append(Reading("gpu", gpu.board.address, values, missing, xids))
            if (why := missing.get("lost")) is not None:
                problems.append(f"GPU {gpu.board.address} does not answer: {why}")
        return Look(tuple(readings), "; ".join(problems))

    # Which there are ----------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._begun:
            return
        try:
            if self._library is None:
                self._library = import_module("pynvml")
        except ImportError:
            raise self._absent("nvidia-ml-py is not installed", "holdfast[nvidia]") from None
        try:
            self._library.nvmlInit()
        except self._library.NVMLError as error:
            if error.value in (LIBRARY_NOT_FOUND, DRIVER_NOT_LOADED):
                raise self._absent(f"{error}", "") from None
            raise
        self._begun = True

    def _absent(self, why: str, extra: str) -> Exception:
        hint = f"; hint: pip install '{extra}'" if extra and self._expected else ""
        of = f"none of {self._expected} NVIDIA devices is read:"
        words = f"{of if self._expected else 'no NVIDIA devices, because'} {why}{hint}"
        return NoDevicesError(words, missed=self._expected > 0)

    def _find(self) -> list[str]:
        """Get to know the GPUs that are not known yet; return what is wrong with others."""
        problems = []
        for index in range(self._library.nvmlDeviceGetCount()):
            if index in self._gpus:
                continue
            try:
                handle = self._library.nvmlDeviceGetHandleByIndex(index)
                self._gpus[index] = _Gpu(handle, self._board(handle))
            except self._library.NVMLError as error:
                problems.append(f"GPU number {index} can not be read: {error}")
        return problems

    def _board(self, handle: object) -> Gpu:
        def text(function: str) -> str:
            try:
                found = getattr(self._library, function)(handle)
            except self._library.NVMLError as error:
                if error.value in (IS_LOST, RESET_REQUIRED):
                    raise
                return ""
            return found.decode("ascii", "replace") if isinstance(found, bytes) else str(found)

        return Gpu(
            self._address(handle),
            text("nvmlDeviceGetUUID"),
            text("nvmlDeviceGetName"),
            text("nvmlDeviceGetSerial"),
        )

    def _address(self, handle: object) -> str:
        pci = self._library.nvmlDeviceGetPciInfo(handle)
        return f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}"

    # What they say ------------------------------------------------------------------------------

    def _ask(self, gpu: _Gpu) -> tuple[dict[str, float], dict[str, str]]:
        """Return what a GPU says, and of what it does not say why."""
        values: dict[str, float] = {}
        missing: dict[str, str] = {}
        asked: list[tuple[tuple[str, ...], Callable[[], dict[str, float]]]] = [
            (question.names, partial(self._answer, gpu, question)) for question in QUESTIONS
        ]
        asked += [
            (("sram_worn",), partial(self._sram, gpu)),
            (("recovery_action",), partial(self._recovery, gpu)),
            (("nvlinks_down", *(name for name, _ in LINK_ERRORS)), partial(self._links, gpu)),
        ]
        for names, read in asked:
            if names[0] in gpu.never:
                missing.update(dict.fromkeys(names, gpu.never[names[0]]))
                continue
            try:
                values |= read()
            except ValueError as error:
                missing.update(dict.fromkeys(names, str(error)))
            except self._library.NVMLError as error:
                if error.value == IS_LOST:
                    return {"lost": 1.0}, {"lost": str(error)}
                if error.value == RESET_REQUIRED:
                    values["reset_required"] = 1.0
                missing.update(dict.fromkeys(names, str(error)))
                if error.value in NEVER:
                    gpu.never[names[0]] = str(error)
                    log.info("GPU %s: no %s: %s", gpu.board.address, ", ".join(names), error)
        return values | {"lost": 0.0} | _derived(values), missing

    def _call(self, functions: Sequence[str], *arguments: object) -> Any:  # noqa: ANN401 - whatever they return
        """Call the first of some functions that this library and this driver have."""
        for function in functions[:-1]:
            try:
                if (known := getattr(self._library, function, None)) is not None:
                    return known(*arguments)
            except self._library.NVMLError as error:
                if error.value != FUNCTION_NOT_FOUND:
                    raise
        known = getattr(self._library, functions[-1], None)
        if known is None:
            raise self._library.NVMLError(FUNCTION_NOT_FOUND)
        return known(*arguments)

    def _answer(self, gpu: _Gpu, question: Question) -> dict[str, float]:
        found = self._call(question.functions, gpu.handle, *question.arguments)
        if isinstance(found, list):
            found = len(found)
        answers = found if isinstance(found, tuple) else (found,)
        if len(answers) != len(question.names):
            raise ValueError(f"{len(answers)} answers, expected {len(question.names)}")
        named = zip(question.names, answers, strict=True)
        return {name: _number(value, question.most) for name, value in named}

    def _sram(self, gpu: _Gpu) -> dict[str, float]:
        """Ask whether errors of the SRAM are more than the maker finds acceptable; root only."""
        status = self._call(("c_nvmlEccSramErrorStatus_v1_t",))
        self._call(("nvmlDeviceGetSramEccErrorStatus",), gpu.handle, status)
        return {"sram_worn": _number(status.bThresholdExceeded, 1)}

    def _recovery(self, gpu: _Gpu) -> dict[str, float]:
        (found,) = self._call(("nvmlDeviceGetFieldValues",), gpu.handle, [RECOVERY_ACTION])
        if found.nvmlReturn:
            raise self._library.NVMLError(found.nvmlReturn)
        return {"recovery_action": _number(found.value.uiVal, 255)}

    def _links(self, gpu: _Gpu) -> dict[str, float]:
        """Ask for the links that are up, and what they have counted in sum."""
        sums = dict.fromkeys((name for name, _ in LINK_ERRORS), 0.0)
        up = set()
        for link in range(gpu.links_most):
            try:
                active = self._call(("nvmlDeviceGetNvLinkState",), gpu.handle, link)
            except self._library.NVMLError as error:
                if error.value != INVALID_ARGUMENT or not link:
                    raise
                gpu.links_most = link  # it has no more of them
                break
            if active:
                up.add(link)
                for name, counter in self._counters(gpu, link):
                    sums[name] += counter
        gpu.links |= up
        return {"nvlinks_down": float(len(gpu.links - up)), **sums}

    def _counters(self, gpu: _Gpu, link: int) -> Iterator[tuple[str, float]]:
        for name, counter in LINK_ERRORS:
            if name in gpu.never:
                continue
            try:
                found = self._call(("nvmlDeviceGetNvLinkErrorCounter",), gpu.handle, link, counter)
                yield name, _number(found, COUNT_MAX)
            except self._library.NVMLError as error:
                if error.value not in NEVER:
                    raise
                # Whether links are up is worth knowing even where their errors are not counted.
                gpu.never[name] = str(error)

    # What they report -----------------------------------------------------------------------------

    def _xids(self) -> list[tuple[str, int]]:
        """Return the Xids since the last look, each with the address of its GPU."""
        if not self._listens:
            return []
        found: list[tuple[str, int]] = []
        try:
            if self._events is None:
                self._events = self._library.nvmlEventSetCreate()
                for gpu in self._gpus.values():
                    self._library.nvmlDeviceRegisterEvents(gpu.handle, XID, self._events)
            for _ in range(EVENTS_MAX):
                event = self._library.nvmlEventSetWait_v2(self._events, 0)
                if event.eventType == XID:
                    found.append((self._address(event.device), int(event.eventData)))
        except self._library.NVMLError as error:
            if error.value in NEVER:
                self._listens = False
                log.warning("the driver tells no Xids: %s", error)
            elif error.value != TIMEOUT:
                log.info("listening for Xids: %s", error)
        return found


def _number(value: object, most: float) -> float:
    """Return an answer as a number. Raises ValueError if it can not be true."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"the answer is {value!r:.60}, no number")  # noqa: TRY004 - like the others
    if not math.isfinite(value) or not 0 <= value <= most:
        raise ValueError(f"the answer is {value:g}, expected 0 to {most:g}")
    return float(value)


def _derived(values: dict[str, float]) -> dict[str, float]:
    """Return gauges that follow from others."""
    found = {}
    if "clocks_event_reasons" in values:
        reasons = int(values["clocks_event_reasons"])
        found["throttled_by_heat"] = float(bool(reasons & (SW_THERMAL | HW_THERMAL)))
        found["throttled_by_power_brake"] = float(bool(reasons & POWER_BRAKE))
        found["throttled_by_hardware"] = float(bool(reasons & HW_SLOWDOWN))
    if values.keys() >= {"temperature_c", "slowdown_c"}:
        found["over_slowdown_c"] = values["temperature_c"] - values["slowdown_c"]
    if values.keys() >= {"pcie_lanes", "pcie_lanes_most"}:
        found["pcie_lanes_missing"] = values["pcie_lanes_most"] - values["pcie_lanes"]
    return found
