"""The tables of storage/FORMAT.md are what is seen when writers are killed and stores fail.

`pytest --rewrite` writes them anew; review the diff.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import crashes, faulted, putting
from tests.buckets import Server

FORMAT = Path(__file__).parents[2] / "storage" / "FORMAT.md"
MIB = 1 << 20


@pytest.fixture
def tables(tmp_path: Path, s3: Server) -> dict[str, Callable[[], str]]:
    return {
        "crashes": crashes.crash_table,
        "faults": faulted.fault_table,
        "folder": lambda: putting.local_table(tmp_path),
        "bucket": lambda: putting.bucket_table(lambda: s3.store(part_bytes=5 * MIB), 11 * MIB),
    }


def test_somebody_is_killed_wherever_a_store_is_changed() -> None:
    """Whoever adds a put or a delete adds the story in which it is the last thing done."""
    assert crashes.killed_at() == crashes.changing()


@pytest.mark.parametrize("name", ["crashes", "faults", "folder", "bucket"])
def test_what_is_left_after_each_operation_is_as_the_format_says(
    name: str, tables: dict[str, Callable[[], str]], request: pytest.FixtureRequest
) -> None:
    seen = tables[name]()

    text = FORMAT.read_text(encoding="utf-8")
    place = re.compile(rf"(<!-- {name}: .*? -->\n).*?(\n<!-- end -->)", re.DOTALL)
    assert place.search(text), f"no place for the table of {name} in {FORMAT}"
    written = place.sub(lambda match: f"{match[1]}{seen}{match[2]}", text)
    if request.config.getoption("--rewrite"):
        FORMAT.write_text(written, encoding="utf-8")
    assert written == text
