from pathlib import Path

import pytest

from orchestrator.cli import whole
from orchestrator.cli.errors import CliError


def test_a_file_whose_writing_is_interrupted_is_what_it_was_and_nothing_is_left(
    tmp_path: Path,
) -> None:
    file = tmp_path / "result"
    whole.write(file, b"before")

    def interrupted() -> None:
        with whole.writing(file) as out:
            out.write(b"after")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_is_no_file_to_write(tmp_path: Path) -> None:
    with pytest.raises(CliError, match=r"--html .*: a folder, expected a file"):
        whole.require_option("--html", tmp_path)

    assert list(tmp_path.iterdir()) == []
