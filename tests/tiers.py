"""Durable tiers of four checkpoints, and what `holdfast checkpoint` says of them."""

import json
from pathlib import Path
from typing import Any

from storage.local import LocalStore
from tests.checkpoints import committed
from tests.journals import holdfast


def four(root: Path) -> LocalStore:
    """Return a store with checkpoints of steps 10, 20, 30 and 40."""
    store = LocalStore(root)
    for step in (10, 20, 30, 40):
        committed(store, step)
    return store


def told(store: LocalStore, command: str, *arguments: str, code: int = 0) -> str:
    result = holdfast("checkpoint", command, str(store.root), *arguments)
    assert result.exit_code == code, result.output
    return str(result.stdout)


def data(store: LocalStore, command: str, *arguments: str, code: int = 0) -> Any:
    return json.loads(told(store, command, *arguments, "-o", "json", code=code))


def refused(command: str, *arguments: str, code: int = 2) -> str:
    result = holdfast("checkpoint", command, *arguments)
    assert result.exit_code == code, result.output
    return str(result.stderr)


def damage(store: LocalStore, key: str, at: int) -> None:
    path = store.root / key
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def moved(command: str, *arguments: object, code: int = 0) -> Any:
    """Call it for a store and a folder; return what it answers, or refuses them with."""
    result = holdfast("checkpoint", command, *map(str, arguments), "-o", "json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if code == 0 else str(result.stderr)
