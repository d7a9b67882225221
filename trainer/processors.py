"""What kind of processor a rank computes on: another kind may come to other bits."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")


def kind(device: torch.device) -> str:
    """Return the kind in words: what torch makes use of, and the model's name if it is known.

    Libraries choose their kernels by both.
    """
    if device.type == "cuda":
        libraries = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]
        return f"{torch.cuda.get_device_name(device)}, {libraries}"
    capability = torch.backends.cpu.get_cpu_capability()
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return capability
    model = re.search(r"^model name\s*: *(.+)$", text, re.MULTILINE)
    return f"{capability}, {model[1].strip()}" if model else capability


def number(of: str) -> torch.Tensor:
    """Return a number that is the same for the same kind, and no other as a rule; int64."""
    digest = hashlib.sha256(of.encode()).digest()
    return torch.tensor(int.from_bytes(digest[:8], "little", signed=True))


def known_to_repeat(device: torch.device) -> bool:
    """Return whether two of a kind get the same bits, which GPUs were seen not to do.

    Of those, a test says whether they seem to.
    """
    return device.type == "cpu"
