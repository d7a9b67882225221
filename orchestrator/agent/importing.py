"""Whose matter it is that a trainer can not be imported: of the job as it is, or of one node."""

from __future__ import annotations

import re

from orchestrator.agent.warm import Answer

TRAIN_EXTRA = frozenset({"aiohttp", "fsspec", "pyarrow", "tiktoken", "torch"})
"""Modules that come with `holdfast[train]` and not with the base."""
_MISSING = re.compile(r"No module named '([^'.]+)")


def misconfigured(answer: Answer, entrypoint: str) -> bool:
    """Whether the job can not run as it is written and installed, wherever it is put.

    So it is if a module is not installed, or the entrypoint's has no such function. Any other
    failure (a library that can not be loaded, a file system that hung) may be one node's alone.
    """
    if answer.kind == "ModuleNotFoundError":
        return True
    module, _, function = entrypoint.partition(":")
    return (
        answer.kind == "AttributeError"
        and answer.message.startswith(f"module '{module}'")
        and f"'{function}'" in answer.message
    )


def advice(answer: Answer) -> str:
    """Return what to install if that is what is missing, else ""."""
    missing = _MISSING.match(answer.message) if answer.kind == "ModuleNotFoundError" else None
    if missing is None or missing[1] not in TRAIN_EXTRA:
        return ""
    return "Install what the trainer needs on every node: pip install 'holdfast[train]'."
