"""How a question of planning is answered: rows of a table, and everything that they assume."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.cli.blocks import section
from orchestrator.cli.choices import Output
from orchestrator.cli.tables import Column, Row, in_json, in_yaml, rendered

METHOD = "closed form"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One question answered."""

    question: str
    """In a word; `-o name` prints it before each row's name."""
    headline: str
    """What was asked about, in a line."""
    given: dict[str, float]
    """What went in, with units in the names."""
    columns: tuple[Column, ...]
    rows: list[Row]
    assumptions: tuple[str, ...]
    method: str = METHOD


def shown(answer: Answer, output: Output) -> str:
    """Return an answer in the asked form."""
    told = {
        "question": answer.question,
        "method": answer.method,
        **answer.given,
        "rows": answer.rows,
        "assumptions": list(answer.assumptions),
    }
    match output:
        case Output.JSON:
            return in_json(told)
        case Output.YAML:
            return in_yaml(told)
        case Output.NAME:
            return rendered(answer.question, answer.columns, answer.rows, output)
        case Output.TABLE | Output.WIDE:
            table = rendered(answer.question, answer.columns, answer.rows, output)
            simulated = ", not simulated" if answer.method == METHOD else ""
            head = f"{answer.headline}; {answer.method}{simulated}"
            return "\n".join([head, "", table, *section("Assumes", answer.assumptions)])
