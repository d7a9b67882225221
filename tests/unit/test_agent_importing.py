"""What a failed import says: that the job can not run anywhere, or perhaps only here."""

import re
import tomllib
from pathlib import Path

import pytest

from orchestrator.agent import importing
from orchestrator.agent.warm import Answer

MISSING = "ModuleNotFoundError"


@pytest.mark.parametrize(
    ("kind", "message", "misconfigured", "train"),
    [
        (MISSING, "No module named 'torch'", True, True),
        (MISSING, "No module named 'torch.distributed'", True, True),
        (MISSING, "No module named 'torchlike'", True, False),
        (MISSING, "No module named 'my'", True, False),
        ("AttributeError", "module 'my.trainer' has no attribute 'main'", True, False),
        ("AttributeError", "module 'my.trainer' has no attribute 'remains'", False, False),
        ("AttributeError", "module 'torch' has no attribute 'main'", False, False),
        ("ImportError", "libcudart.so: cannot open shared object file", False, False),
        ("OSError", "No module named 'torch'", False, False),
    ],
)
def test_what_is_not_installed_is_missing_wherever_the_job_is_put(
    kind: str, message: str, *, misconfigured: bool, train: bool
) -> None:
    answer = Answer(pid=1, kind=kind, message=message)

    assert importing.misconfigured(answer, "my.trainer:main") is misconfigured
    assert ("pip install 'holdfast[train]'" in importing.advice(answer)) is train


def test_the_modules_of_the_extra_are_those_that_the_project_declares() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))

    extra = project["project"]["optional-dependencies"]["train"]

    assert {re.split(r"[<>=]", one)[0] for one in extra} == importing.TRAIN_EXTRA
