"""What a simulation says beside the closed form, for the questions of `holdfast plan`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from orchestrator.cli import experimenting
from orchestrator.cli.answers import Answer
from orchestrator.cli.errors import CliError, Exit
from orchestrator.cli.tables import Column
from orchestrator.simulation import experiment
from orchestrator.simulation.experiment import Outcome
from orchestrator.simulation.settings import Settings
from orchestrator.simulation.summary import INTERVAL, estimate

METHOD = "closed form, with a simulation beside it"
JOBS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What is simulated for a question."""

    gpus: int
    model: str
    rates: float
    seeds: int
    days: float

    def refuse_mtti(self, mtti: str | None) -> None:
        """Refuse an interruption rate without kinds: a simulation needs to know what breaks."""
        if mtti is not None:
            raise CliError(
                f"--mtti is {mtti} with --simulate {self.seeds}, expected rates by class of fault",
                "use --rates, or --model with one of your own",
                Exit.USAGE,
            )

    def outcomes(self, **changed: Any) -> list[Outcome]:  # noqa: ANN401 - settings
        """Run some seeds with other settings than the default ones."""
        settings = Settings(
            gpus=self.gpus,
            days=self.days,
            rates=self.rates,
            model=self.model,
            **changed,
        )
        self._require(settings)
        experiment.inputs(settings)
        return experimenting.run(settings, range(self.seeds), jobs=JOBS, progress=sys.stderr)

    def _require(self, settings: Settings) -> None:
        """Refuse what the closed form can say of a cluster or a time that is not simulated."""
        try:
            msgspec.convert(msgspec.to_builtins(settings), Settings)
        except msgspec.ValidationError as error:
            what, _, field = str(error).partition(" - at `$.")
            name = field.rstrip("`")
            raise CliError(
                f"--simulate {self.seeds}: {name} is {getattr(settings, name)}, "
                f"{what[:1].lower()}{what[1:]}",
                "ask for less, or leave --simulate out: the closed form alone has no such bound",
                Exit.USAGE,
            ) from error

    @property
    def words(self) -> tuple[str, ...]:
        """What the simulation rests on."""
        runs = (
            f"simulated: {self.seeds} runs of {self.days:g} days by the controller that runs real "
            "ones, faults as they show, profile 'measured'; see `holdfast simulate`"
        )
        return (
            runs,
            "--detect, --restart and --stall are of the closed form only",
            f"of several runs: {INTERVAL}",
        )


def ettr(answer: Answer, beside: Beside) -> Answer:
    """Add the simulated ETTR with its interval to the rows of an answer about ETTR."""
    found = estimate([o.ettr for o in beside.outcomes(save_every=_every(answer))])
    rows = [
        {"name": f"simulated-{what}", "share": share, "hours": share * beside.days * 24}
        for what, share in (("mean", found.mean), ("low", found.low), ("high", found.high))
        if share is not None
    ]
    return replace(
        answer,
        rows=[*answer.rows[:1], *rows, *answer.rows[1:]],
        method=METHOD,
        assumptions=(*answer.assumptions, *beside.words),
    )


def interval(answer: Answer, beside: Beside) -> Answer:
    """Add the simulated ETTR to each interval of an answer."""
    rows = []
    for row in answer.rows:
        found = beside.outcomes(save_every=f"{row['interval_s']:.3f}s")
        rows.append({**row, "simulated": estimate([o.ettr for o in found]).mean})
    column = Column("SIMULATED (%)", "simulated", lambda value: f"{value * 100:.2f}")
    return replace(
        answer,
        columns=(*answer.columns, column),
        rows=rows,
        method=METHOD,
        assumptions=(
            *answer.assumptions,
            *beside.words,
            "simulated intervals are whole steps",
        ),
    )


def spares(answer: Answer, beside: Beside) -> Answer:
    """Add to each number of spares how long a simulated run waits for a node."""
    rows, waits = [], {}
    for row in answer.rows:
        number = row["spares"]
        if number is not None and number not in waits:
            found = beside.outcomes(spares=number)
            waits[number] = sum(o.spares["waited_s"] for o in found) / len(found) / beside.days
        rows.append({**row, "waited_s_per_day": waits.get(number)})

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    return replace(
        answer,
        columns=(*answer.columns, Column("WAITED (s/day)", "waited_s_per_day", shown)),
        rows=rows,
        method=METHOD,
        assumptions=(
            *answer.assumptions,
            *beside.words,
            "waited: with that many spares and the model's repairs, whatever the row is for",
        ),
    )


def _every(answer: Answer) -> str:
    return f"{answer.given['interval_s']:.3f}s"
