"""Folders of runs that commands look at."""

from pathlib import Path

import pytest

from orchestrator.worlds.folder import HOME_VARIABLE, RunFolder
from tests.journals import killed_rank, text


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands of this test look for runs: a new folder."""
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def demo(home: Path) -> RunFolder:
    """The folder of a run in which a rank was killed, in `home`."""
    folder = RunFolder(home / "demo")
    folder.logs.mkdir(parents=True)
    folder.journal.write_bytes(text(killed_rank()))
    return folder
