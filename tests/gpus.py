"""Stands for NVIDIA's library: answers of GPUs as they were recorded, behind its own functions.

A case is a list of rounds, of which each has what is different from the one before: by number of
the GPU and by call, an answer, or the error that is raised instead. `*` is every call of a GPU,
`driver` what concerns all of them. What no record names is not supported.
"""

import json
from functools import partial
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pynvml

from orchestrator.agent.devices import Gpu

RECORDED = Path(__file__).parent / "recorded" / "nvml"
ADDRESSES = ("0000:3b:00", "0000:86:00")
UUIDS = ("GPU-6e1a0000-0000-0000-0000-000000000001", "GPU-6e1a0000-0000-0000-0000-000000000002")
NUMBERS = ("1650000000001", "1650000000002")
OWN = tuple(Gpu(address, uuid, "x") for address, uuid in zip(ADDRESSES, UUIDS, strict=True))


class Recorded:
    """NVIDIA's library with two GPUs. A round begins when the GPUs are counted.

    Attributes:
        hung: while it is clear, every call of a GPU waits.
        calls: what was called, in order.
    """

    NVMLError = pynvml.NVMLError

    def __init__(self, case: str) -> None:
        known = json.loads((RECORDED / "cases.json").read_text())[case]
        kind = json.loads((RECORDED / f"kind-{known['kind']}.json").read_text())
        self.rounds: list[dict[str, Any]] = list(known["rounds"])
        self._answers = [
            {
                "nvmlDeviceGetHandleByIndex()": index,
                "nvmlDeviceGetUUID()": UUIDS[index],
                "nvmlDeviceGetSerial()": NUMBERS[index],
                "nvmlDeviceGetPciInfo()": ADDRESSES[index],
                **kind["answers"],
            }
            for index in range(len(ADDRESSES))
        ]
        self._driver: dict[str, int] | None = None
        self._events: list[tuple[int, int]] = []
        self.hung = Event()
        self.hung.set()
        self.calls: list[str] = []

    def nvmlInit(self) -> None:  # noqa: N802 - the library's names
        self.calls.append("nvmlInit")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        if self.rounds:
            news = self.rounds.pop(0)
            self._driver = news.get("driver", self._driver)
            self._events += [tuple(event) for event in news.get("events", ())]
            for index, known in enumerate(self._answers):
                known.update(news.get(str(index), {}))
        if self._driver:
            raise pynvml.NVMLError(self._driver["error"])
        return len(self._answers)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        self._told(index, "nvmlDeviceGetHandleByIndex()")
        return index

    def nvmlEventSetCreate(self) -> str:  # noqa: N802
        return "events"

    def nvmlDeviceRegisterEvents(self, handle: int, kinds: int, events: str) -> None:  # noqa: N802
        assert (kinds, events) == (pynvml.nvmlEventTypeXidCriticalError, "events")

    def nvmlEventSetWait_v2(self, events: str, timeout_ms: int) -> Any:  # noqa: N802
        if not self._events:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT)
        device, code = self._events.pop(0)
        return SimpleNamespace(
            device=device, eventType=pynvml.nvmlEventTypeXidCriticalError, eventData=code
        )

    def c_nvmlEccSramErrorStatus_v1_t(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(version=pynvml.nvmlEccSramErrorStatus_v1)

    def nvmlDeviceGetSramEccErrorStatus(self, handle: int, status: Any) -> None:  # noqa: N802
        answer = self._told(handle, "nvmlDeviceGetSramEccErrorStatus()")
        status.bThresholdExceeded = answer["bThresholdExceeded"]

    def nvmlDeviceGetFieldValues(self, handle: int, fields: list[int]) -> list[Any]:  # noqa: N802
        try:
            answer = self._told(handle, f"nvmlDeviceGetFieldValues({fields[0]})")
        except pynvml.NVMLError_NotSupported as error:  # told of each field by itself
            return [SimpleNamespace(nvmlReturn=error.value, value=None)]
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=answer))]

    def __getattr__(self, name: str) -> Any:
        getattr(pynvml, name)  # only what the library has
        return partial(self._answer, name)

    def _answer(self, name: str, handle: int, *arguments: int) -> Any:
        call = f"{name}({', '.join(map(str, arguments))})"
        answer = self._told(handle, call)
        if name == "nvmlDeviceGetPciInfo":
            domain, bus, device = (int(part, 16) for part in answer.split(":"))
            return SimpleNamespace(domain=domain, bus=bus, device=device)
        return tuple(answer) if name == "nvmlDeviceGetRemappedRows" else answer

    def _told(self, index: int, call: str) -> Any:
        self.calls.append(call)
        assert self.hung.wait(60.0)
        answers = self._answers[index]
        answer = answers.get("*", answers.get(call, {"error": pynvml.NVML_ERROR_NOT_SUPPORTED}))
        if isinstance(answer, dict) and "error" in answer:
            raise pynvml.NVMLError(answer["error"])
        return answer
