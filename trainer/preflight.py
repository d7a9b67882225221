"""`python -m trainer.preflight UUID SECONDS`: whether a GPU gets right what is known beforehand.

UUID is that of a GPU, which is then the only one that this process sees, or `cpu`. The answer is a
line of JSON (protocol.preflight.Came), the last one on standard output.
"""

from __future__ import annotations

import os
import sys
import time

import msgspec
import numpy as np
import numpy.typing as npt

from orchestrator.protocol.preflight import Came
from orchestrator.worker.golden import GPU_CASES, Case, wrong_answers

EXIT_USAGE = 2


def main(arguments: list[str]) -> int:
    """Test a device, and say what came of it; return the exit code."""
    try:
        name, within_s = arguments[0], float(arguments[1])
    except (IndexError, ValueError):
        sys.stderr.write(f"arguments are {arguments}, expected UUID SECONDS\n")
        return EXIT_USAGE
    if name != "cpu":
        # Before torch is imported, which looks at it once.
        os.environ["CUDA_VISIBLE_DEVICES"] = name
    try:
        came = compute("cpu" if name == "cpu" else "cuda", within_s)
    except RuntimeError as error:  # of torch: out of memory, no such device, a device that failed
        came = Came(problem=f"it can not compute: {str(error).partition(chr(10))[0]}")
    sys.stdout.write(msgspec.json.encode(came).decode() + "\n")
    return 0


def compute(device: str, within_s: float) -> Came:
    """Compute every case at every scale, again and again, until time is up or one is wrong."""
    import torch  # noqa: PLC0415 - not before it is said which GPU it sees

    if device == "cuda" and not torch.cuda.is_available():
        return Came(problem="torch sees no such GPU")

    def product(case: Case, scale: int) -> npt.NDArray[np.floating]:
        dtype = getattr(torch, case.name)
        left, right = (torch.from_numpy(factor).to(device, dtype) for factor in case.factors())
        found = (left * 2.0**scale) @ right
        wide = found.float() if dtype is torch.bfloat16 else found
        on_host: npt.NDArray[np.floating] = wide.cpu().numpy()
        return on_host

    deadline = time.monotonic() + within_s
    compared = 0
    while True:
        for wrong in wrong_answers(GPU_CASES, product):
            compared += 1
            if wrong:
                return Came(compared=compared, wrong=wrong)
        if time.monotonic() >= deadline:
            return Came(compared=compared)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
