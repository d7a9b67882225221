"""What a rank computes on is told in words, and compared as a number."""

from pathlib import Path

import pytest
import torch

from trainer import processors


def test_the_model_is_named_where_the_system_says_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    said = tmp_path / "cpuinfo"
    monkeypatch.setattr(processors, "CPUINFO", said)
    assert processors.kind(torch.device("cpu")) == capability

    said.write_text("processor\t: 0\nmodel name\t: Some CPU\nflags\t: x\n", encoding="utf-8")
    assert processors.kind(torch.device("cpu")) == f"{capability}, Some CPU"


def test_another_kind_has_another_number() -> None:
    one, same, other = (processors.number(kind) for kind in ("AVX2", "AVX2", "AVX512"))

    assert one.dtype == torch.int64
    assert one == same != other
