"""The `holdfast` command. What it prints comes from journals; what it starts is `supervise`.

Commands import what they need when they are called: `holdfast --help` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.errors import CliError, Commands, Exit

app = typer.Typer(
    cls=Commands,
    name="holdfast",
    help="Keeps large training runs running.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def run(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.")],
    faults: Annotated[
        Path | None, typer.Option(metavar="PLAN.yaml", help="A fault plan to let loose on it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; default $HOLDFAST_HOME/NAME.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write the report here as well.")
    ] = None,
    timeout: Annotated[
        str | None, typer.Option(help="Give up after this long, for example 10m.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Run a training job on this machine, and keep it running until it is done."""
    from orchestrator.cli import intake, progress, supervise

    training, plan = intake.read(run_file, faults)
    code = supervise.supervise(
        training,
        plan,
        out=out,
        report=report,
        timeout_s=intake.timeout_s(timeout),
        progress=progress.progress_on(sys.stdout, quiet=quiet),
    )
    raise typer.Exit(code)


@app.command()
def validate(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.")],
    faults: Annotated[
        Path | None, typer.Option(metavar="PLAN.yaml", help="A fault plan for it.")
    ] = None,
) -> None:
    """Check a run file, and a fault plan against it, without starting anything."""
    from orchestrator.cli import intake

    training, plan = intake.read(run_file, faults)
    typer.echo(intake.words(training, plan))


def main() -> None:
    """Run the command line."""
    app()


__all__ = ["CliError", "Exit", "app", "main"]
