"""Compiled kernels are kept by the node, and those that are torn are made again."""

import _ctypes
import os
from pathlib import Path

import pytest
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir
from torch.utils._filelock import FileLock

from trainer.kernels import VARIABLE, clear_torn, keep_in

WHOLE = Path(_ctypes.__file__).read_bytes()


def kept(folder: Path, key: str, content: bytes) -> Path:
    path = folder / key[:2] / f"{key}.main.so"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def test_a_library_that_lacks_bytes_is_removed_and_a_whole_one_stays(tmp_path: Path) -> None:
    whole = kept(tmp_path, "whole", WHOLE)
    torn = [
        kept(tmp_path, f"{at}-torn", content)
        for at, content in enumerate([b"", WHOLE[:20], WHOLE[:-1], bytes(len(WHOLE))])
    ]

    assert clear_torn(tmp_path) == torn

    assert list(tmp_path.rglob("*.so")) == [whole]


def test_a_library_that_somebody_is_making_stays(tmp_path: Path) -> None:
    begun = kept(tmp_path, "begun", b"")
    (tmp_path / "locks").mkdir()

    with FileLock(tmp_path / "locks" / "begun.lock"):
        assert clear_torn(tmp_path) == []
        assert begun.exists()

    assert clear_torn(tmp_path) == [begun]


def test_kernels_are_kept_by_the_node_unless_the_user_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for before, after in (
        (default_cache_dir(), tmp_path / "node" / "kernels"),
        (str(tmp_path / "own"), tmp_path / "own"),
    ):
        monkeypatch.setenv(VARIABLE, before)
        torn = kept(after, "torn", b"")

        keep_in(str(tmp_path / "node"))

        assert cache_dir() == os.environ[VARIABLE] == str(after)
        assert not torn.exists()
