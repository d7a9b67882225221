"""The commands of `holdfast simulate`: the real controller in worlds that exist in virtual time."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from orchestrator.cli.choices import Form

app = typer.Typer(
    name="simulate",
    help="Run the real controller through simulated clusters.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def swarm(
    seeds: Annotated[int, typer.Option(min=1, help="How many worlds to draw.")] = 1000,
    first: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Only this one; with --story, all that happens.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 2,
    story: Annotated[bool, typer.Option("--story", help="Tell events and decisions.")] = False,
    output: Annotated[Form, typer.Option("--output", "-o", help="How it is printed.")] = Form.TEXT,
) -> None:
    """Draw worlds, faults and timings by seed, and check every event; name the seeds that fail."""
    from orchestrator.cli import swarming
    from orchestrator.cli.errors import CliError, Exit
    from orchestrator.simulation.swarm import tell

    if story and seed is None:
        raise CliError("--story needs one --seed", "name the seed to tell of", Exit.USAGE)
    if seed is not None and story:
        for line in tell(seed):
            typer.echo(line)
        return
    drawn = range(first, first + seeds) if seed is None else range(seed, seed + 1)
    result = swarming.search(drawn, jobs=jobs, progress=sys.stderr)
    typer.echo(swarming.shown(result, output))
    if result.failed:
        raise typer.Exit(Exit.ERROR)
