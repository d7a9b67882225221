"""What the documents promise is there."""

import ast
import functools
import re
from pathlib import Path

import pytest

from orchestrator.cli.commands import app
from orchestrator.cli.incident import RUNBOOK, RUNGS
from orchestrator.core.incident import (
    BY_RANKS,
    CORRUPTION,
    GROWTH,
    REPAIR,
    SLOW_LINK,
    UNRESTORABLE,
)
from orchestrator.core.report import INFERRED, WITNESSED

ROOT = Path(__file__).parents[2]
KINDS = WITNESSED | INFERRED
NO_KINDS = {"corruption", "proven", "exits", "preparation", "silence", "unknown", "g"}
NO_KINDS |= {"gradient", "links", "processor", "rank", "s", "wall", "x"}
"""Words in the detectors that are no kinds of incident: their own names, formats, and evidence."""
WORD = re.compile(r"[a-z]+(-[a-z]+)*")


def words_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and WORD.fullmatch(str(node.value))
    } - {None}


def kinds_named_in(path: Path) -> set[str]:
    """Values of `kind=` arguments, written there or named as a constant of the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {
        target.id: statement.value.value
        for statement in tree.body
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    values = [
        keyword.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "kind"
    ]
    named = {constants[v.id] for v in values if isinstance(v, ast.Name) and v.id in constants}
    return named | {value.value for value in values if isinstance(value, ast.Constant)}


def test_every_kind_that_a_detector_can_emit_is_known() -> None:
    emitted = set().union(*map(words_in, (ROOT / "orchestrator/detect").glob("*.py")))
    emitted |= kinds_named_in(ROOT / "orchestrator/core/casebook.py")
    emitted |= kinds_named_in(ROOT / "orchestrator/policy/planned.py")
    emitted |= {CORRUPTION, GROWTH, REPAIR, SLOW_LINK, UNRESTORABLE}

    assert emitted - NO_KINDS == KINDS


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_runbook_has_a_section_for_every_kind_of_incident(kind: str) -> None:
    sections = (ROOT / RUNBOOK).read_text(encoding="utf-8").split("\n## ")
    (section,) = [text for text in sections if text.splitlines()[0] == kind]

    for part in ("**You see**", "**Holdfast does**", "**Look at**", "**Do**"):
        assert part in section, part


def test_every_rung_that_a_policy_can_take_is_explained_to_who_reads_an_incident() -> None:
    source = (ROOT / "orchestrator/policy/recovery.py").read_text(encoding="utf-8")
    function = source.split("def _rung(")[1].split("\ndef ")[0]
    rungs = set(re.findall(r'"([a-z -]{5,})"', function)) - {"start"}

    assert rungs
    assert rungs | {"none", "stop", *BY_RANKS} == set(RUNGS)


@pytest.mark.parametrize("document", ["docs/runbook.md", "docs/glossary.md", "README.md"])
def test_a_command_in_a_document_exists(document: str) -> None:
    from typer.main import get_command  # noqa: PLC0415 - only this test looks inside

    commands = get_command(app).commands  # type: ignore[attr-defined]
    text = (ROOT / document).read_text(encoding="utf-8")

    assert set(re.findall(r"`?holdfast ([a-z]+)", text)) - _PROSE <= set(commands)


_PROSE = {"does", "keeps"}


def test_links_between_the_documents_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        links = re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", document.read_text("utf-8"))
        for target, section in links:
            there = document.parent / target if target else document
            assert there.exists(), f"{document}: {target}"
            if section and there.suffix == ".md":
                assert section in _sections(there), f"{document}: {target}#{section}"


@functools.cache
def _sections(document: Path) -> set[str]:
    """Return what the headings of a document are called in links."""
    headings = re.findall(r"(?m)^#+ (.*)$", document.read_text("utf-8"))
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def test_every_word_of_the_glossary_is_defined_once() -> None:
    text = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    words = [
        word.strip()
        for line in text.splitlines()
        if line.startswith("| ")
        for word in line.split("|")[1].split(",")
        if word.strip() not in ("word", "---")
    ]

    assert len(words) == len(set(words))
    assert {"generation", "beacon", "incident", "ETTR", "commit", "buddy", "replay"} <= set(words)


def test_every_decision_record_has_its_five_parts() -> None:
    records = sorted((ROOT / "docs/adr").glob("*.md"))

    assert [record.name[:4] for record in records] == [f"{n + 1:04}" for n in range(len(records))]
    for record in records:
        text = record.read_text(encoding="utf-8")
        for part in ("Context", "Decision", "Rejected", "Consequence", "Evidence"):
            assert f"\n## {part}" in text, f"{record.name}: {part}"
        assert len(text.splitlines()) <= 60
