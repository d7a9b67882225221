"""What a rank computes from one update to the next, as far as it concerns a save beside it."""

from __future__ import annotations

import time

import torch

SECONDS_PER_GIB = 1.0
"""For how long it computes, of each GiB of state, on a machine where nothing else runs.

That is short for a step, so that it flatters nobody. A rank of Llama 3 405B on 16,384 GPUs has 0.32
GiB of state at 12 bytes a weight, and with 16 million tokens in a batch and 400 TFLOPS a GPU its
step takes 6 x 405e9 x 16.8e6 / (16384 x 400e12) = 6 s: 19 s a GiB. On a core that does 60 GFLOPS,
the 89 million weights of a GiB take 9 s for 1,024 tokens.
"""
SIZE = 768
PROBED_S = 0.5


class Computation:
    """Products of matrices on the main thread, always as many.

    Args:
        size: bytes of state.
        threads: of the products. A rank on CPUs has one (trainer/parallel.py); with as many as
            there are cores, none is left for a copy, which then takes what it needs from them.
    """

    def __init__(self, size: int, threads: int) -> None:
        self._threads = threads
        noise = torch.Generator().manual_seed(1)
        self._a, self._b = torch.randn(2, SIZE, SIZE, generator=noise).unbind()
        self._out = torch.empty(SIZE, SIZE)
        self._count = 1
        self.compute()
        begun, count = time.perf_counter(), 0
        while (took := time.perf_counter() - begun) < PROBED_S:
            self.compute()
            count += 1
        self._count = max(round(size / 2**30 * SECONDS_PER_GIB * count / took), 1)

    def compute(self) -> float:
        """Compute, and return the seconds that it took."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        begun = time.perf_counter()
        for _ in range(self._count):
            torch.mm(self._a, self._b, out=self._out)
        seconds = time.perf_counter() - begun
        torch.set_num_threads(before)
        return seconds
