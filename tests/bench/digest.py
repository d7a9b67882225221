"""How fast a device digests what it holds, as a share of how fast it copies that.

    python -m tests.bench.digest [--device cpu] [--words 67108864] [--rounds 15] [--json]

One tensor of each type is copied and digested in turns, on one thread or on one GPU: as a digest is
taken by default there, operation by operation as on a GPU where nothing is compiled, and in one
pass, as where the trainer compiles. A copy reads each byte and writes it, so its bandwidth is twice
what it copies; a digest only reads. Given are medians. A GPU's time is that between its own events.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from trainer import digest as digests
from trainer.digest import PIECE_WORDS, digest, fuse

TYPES = (torch.float32, torch.bfloat16)


def seconds(device: torch.device, call: Callable[[], object]) -> float:
    """Return what a call takes a device, or this thread of its processor."""
    if device.type == "cpu":
        begun = time.thread_time()
        call()
        return time.thread_time() - begun
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def eager(bits: Tensor) -> Tensor:
    """Digest in the way of a GPU, operation by operation."""
    pieces = enumerate(torch.split(bits, PIECE_WORDS))
    each = (
        digests._on_device(piece.to(torch.int32), "w", PIECE_WORDS * at) for at, piece in pieces
    )
    return torch.stack(list(each)).sum()


def as_by_default(tensor: Tensor) -> Tensor:
    """Digest as where nothing was compiled."""
    with mock.patch.object(digests, "_fused", {}):
        return digest(tensor, "w")


def measure(device: torch.device, words: int, rounds: int) -> dict[str, Any]:
    """Return GB/s by type and way, and shares of the bandwidth of a copy."""
    torch.set_num_threads(1)
    begun = time.monotonic()
    fuse(device, TYPES)
    found: dict[str, Any] = {"compiled_s": time.monotonic() - begun}
    for kind in TYPES:
        tensor = torch.randn(words, device=device).to(kind)
        other, bits = torch.empty_like(tensor), digests._bits(tensor)
        ways: dict[str, Callable[[], object]] = {
            "copy": lambda tensor=tensor, other=other: other.copy_(tensor),  # type: ignore[misc]
            "default": lambda tensor=tensor: as_by_default(tensor),  # type: ignore[misc]
            "eager": lambda bits=bits: eager(bits),  # type: ignore[misc]
            "fused": lambda tensor=tensor: digest(tensor, "w"),  # type: ignore[misc]
        }
        took: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds + 1):
            for way, call in ways.items():
                lasted = seconds(device, call)
                if number:  # the first makes keys, and pages
                    took[way].append(lasted)
        size = words * tensor.element_size()
        moved = {way: size * (2 if way == "copy" else 1) for way in ways}
        speeds = {way: 1e-9 * moved[way] / statistics.median(took[way]) for way in ways}
        shares = {way: speed / speeds["copy"] for way, speed in speeds.items() if way != "copy"}
        name = str(kind).removeprefix("torch.")
        found[name] = {"gb_s": speeds, "share_of_copy": shares}
    return found


def main() -> None:
    """Measure, and print GB/s."""
    parser = argparse.ArgumentParser(description=__doc__)
    there = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=there, help="cpu or cuda")
    parser.add_argument("--words", type=int, default=1 << 26, help="items of a tensor")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "one thread of a CPU"
    found = measure(device, arguments.words, arguments.rounds)
    found |= {"device": name, "load": os.getloadavg()[0]}
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{name}; compiled in {found['compiled_s']:.1f} s")
    for kind in (each for each in found if isinstance(found[each], dict)):
        speeds, shares = found[kind]["gb_s"], found[kind]["share_of_copy"]
        print(f"{kind}: a copy moves {speeds['copy']:.1f} GB/s")
        for way, share in shares.items():
            print(f"  digest, {way}: {speeds[way]:.2f} GB/s, {share:.2f} of a copy's bandwidth")
    print(f"load {found['load']:.1f}", file=sys.stderr)


if __name__ == "__main__":
    main()
