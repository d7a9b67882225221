"""What `holdfast simulate` was asked, and its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, nan
from pathlib import Path
from typing import Any, TextIO

import msgspec
import typer

from orchestrator import document
from orchestrator.cli import experimenting, outcomes, pages, whole
from orchestrator.cli.choices import Told
from orchestrator.cli.errors import CliError, Exit
from orchestrator.simulation import experiment
from orchestrator.simulation.settings import Settings, camel
from orchestrator.simulation.summary import summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How an experiment is to be run, and what is to be written besides the answer."""

    seeds: range
    jobs: int
    journal: Path | None = None
    html: Path | None = None


def settings(*, class_rates: Sequence[str], **options: Any) -> Settings:  # noqa: ANN401 - options
    """Return the settings that options stand for. Raises CliError naming the one that is wrong."""
    rates = dict(_class_rate(each) for each in class_rates)
    given = {camel(name): value for name, value in options.items() if value is not None}
    try:
        return msgspec.convert({**given, "classRates": rates}, Settings)
    except msgspec.ValidationError as error:
        raise CliError(
            _plain(document.expected(str(error), Settings), options),
            "see `holdfast simulate --help`",
            Exit.USAGE,
        ) from error


def _class_rate(text: str) -> tuple[str, float]:
    name, sign, factor = text.partition("=")
    try:
        times = float(factor)
    except ValueError:
        times = nan
    if not 0 <= times < inf:
        found = f"a factor {factor!r}" if sign else "no `=`"
        raise CliError(
            f"--class-rate is {text!r}, expected CLASS=FACTOR, 0 or more, found {found}",
            "for example --class-rate gpu-fault=2; 0 switches a class off",
            Exit.USAGE,
        )
    return name.strip(), times


def _plain(message: str, options: Mapping[str, Any]) -> str:
    """Say it of an option instead of a field."""
    what, _, field = message.partition(" - at `$.")
    for name, value in options.items():
        if field and field.rstrip("`").partition(".")[0] == camel(name):
            return f"--{name.replace('_', '-')} is {value!r}: {what[:1].lower()}{what[1:]}"
    return f"--class-rate: {what[:1].lower()}{what[1:]}"


def answer(given: Settings, asked: Asked, form: Told, progress: TextIO) -> str:
    """Run an experiment; write what was asked for, and return the answer in the asked form."""
    read = experiment.inputs(given)
    whole.require_option("--journal", asked.journal)
    whole.require_option("--html", asked.html)
    if asked.journal is not None:
        if len(asked.seeds) != 1:
            raise CliError(
                f"--journal is of one seed, found --seeds {len(asked.seeds)}",
                "choose the seed with --first, and leave --seeds out",
                Exit.USAGE,
            )
        only = asked.seeds[0]
        found = [experimenting.journaled(read, only, asked.journal, progress=progress)]
    else:
        found = experimenting.run(given, asked.seeds, jobs=asked.jobs, progress=progress)
    told = summary(read, found)
    if asked.html is not None:
        whole.write(asked.html, pages.of_experiment(told, found).encode())
    return outcomes.shown(told, form)


def refuse_beside(context: typer.Context, option: str, others: Sequence[str]) -> None:
    """Refuse options that say nothing beside another one.

    Raises:
        CliError: if one of `others`, names of arguments, was given.
    """
    for name in others:
        if _given(context, name):
            raise CliError(
                f"--{name.replace('_', '-')} says nothing beside {option}",
                "leave one of them out",
                Exit.USAGE,
            )


def refuse_options(context: typer.Context) -> None:
    """Refuse options of an experiment in front of another command, where they would do nothing."""
    for parameter in context.command.params:
        name = parameter.name or ""
        if _given(context, name):
            raise CliError(
                f"--{name.replace('_', '-')} is of `holdfast simulate` itself, found in front of "
                f"`{context.invoked_subcommand}`",
                f"see `holdfast simulate {context.invoked_subcommand} --help`",
                Exit.USAGE,
            )


def _given(context: typer.Context, name: str) -> bool:
    """Return whether an argument was written on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
