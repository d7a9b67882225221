"""The benchmark of checkpoints measures what it says; how fast things are is not asked here."""

import json
import subprocess
import sys

import pytest

from tests.runs import REPOSITORY

pytestmark = pytest.mark.process
TINY = (
    *("--mib", "2", "--also", "1", "--rounds", "1", "--ranks", "20", "--generations", "2"),
    *("--checkpoints", "9", "--upload-mib", "1"),
)
RATIOS = {
    *("stall_dcp_over_ours", "stall_dcp_process_over_ours", "stall_over_memcpy"),
    *("stall_dcp_overlapped_over_ours", "stall_dcp_process_overlapped_over_ours"),
    *("compute_beside_copy", "compute_beside_copy_dcp_process_overlapped"),
    *("save_over_raw", "save_over_raw_past_the_cache", "save_dcp_over_ours"),
    *("restore_over_raw", "restore_dcp_over_ours", "restore_of_rank_over_raw"),
}
ONCE = {
    *("commit_s", "commit_record_mb", "list_s", "choose_s"),
    *("upload_dcp_over_ours", "upload_ours_over_server"),
}


def test_the_benchmark_of_checkpoints_measures_every_side_at_each_size() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.checkpoint", *TINY, "--json"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=150,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    at_each_size = RATIOS | {f"{name}@1" for name in RATIOS}
    assert {name for name in at_each_size | ONCE if not found[name] > 0} == set()
    assert found["memory_over_state"] >= 1.0
    assert set(found) >= {"digest_core_s_per_gib", "commit_memory_growth", "raw_read_s@1"}
