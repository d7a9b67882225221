"""`holdfast simulate`: the real controller in worlds that exist in virtual time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.choices import Form, Told

app = typer.Typer(
    name="simulate",
    help="Run the real controller through simulated clusters.",
    invoke_without_command=True,
    rich_markup_mode=None,
)
SPAN = "SPAN"


@app.callback()
def simulate(  # noqa: PLR0913, PLR0917 - typer: every option is an argument
    context: typer.Context,
    gpus: Annotated[int, typer.Option(help="GPUs of the job, 8 to a node.")] = 16_384,
    days: Annotated[float, typer.Option(help="Length of the run.")] = 54.0,
    record: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="What did happen, to happen again; default drawn by rates."
        ),
    ] = None,
    model: Annotated[str, typer.Option(metavar="NAME|FILE", help="The fault model.")] = "llama3",
    scale_record: Annotated[
        bool, typer.Option(help="Scale a record of another size or length to this one.")
    ] = True,
    background: Annotated[
        bool, typer.Option(help="With a record: slow nodes, congestion and full storage as well.")
    ] = True,
    clock: Annotated[str, typer.Option(help="poisson, weibull or bursty.")] = "poisson",
    rates: Annotated[float, typer.Option(help="Multiply all rates by this.")] = 1.0,
    class_rate: Annotated[
        list[str] | None,
        typer.Option(metavar="CLASS=FACTOR", help="Multiply the rate of one class; repeatable."),
    ] = None,
    repair: Annotated[float, typer.Option(help="Multiply all times of repair by this.")] = 1.0,
    profile: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="What things take.")
    ] = "measured",
    spares: Annotated[
        int | None,
        typer.Option(help="Hot spare nodes; default enough all along, in nine runs of ten."),
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(help="Replicas with a whole state each; default up to 8.")
    ] = None,
    save_every: Annotated[
        str | None, typer.Option(metavar=SPAN, help="Between saves to memory.")
    ] = None,
    durable_every: Annotated[
        str | None, typer.Option(metavar=SPAN, help="Between saves to the durable tier.")
    ] = None,
    cadence: Annotated[
        str, typer.Option(help="steps or auto: whether the run chooses how often it saves.")
    ] = "steps",
    detect_within: Annotated[
        str | None, typer.Option(metavar=SPAN, help="The run file's detection.detectWithin.")
    ] = None,
    poison_after: Annotated[
        str | None,
        typer.Option(metavar=SPAN, help="A bug: the step reached then fails wherever it runs."),
    ] = None,
    watch: Annotated[
        str | None,
        typer.Option(help="none, digests or both: what looks for silent corruption."),
    ] = None,
    false_alarms: Annotated[
        float, typer.Option(help="Of what looks for it, per step; each names a healthy node.")
    ] = 0.0,
    without: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Do without a policy, as recovery.disable does; repeatable."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many runs to draw.")] = 1,
    first: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 2,
    journal: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the journal of a single seed.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with plots as well.")
    ] = None,
    output: Annotated[Told, typer.Option("--output", "-o", help="How it is printed.")] = Told.TEXT,
) -> None:
    """Run a whole training run in virtual time, with the controller that runs real ones."""
    from orchestrator.cli import experiments

    if context.invoked_subcommand is not None:
        experiments.refuse_options(context)
        return
    settings = experiments.settings(
        gpus=gpus,
        days=days,
        record=record,
        model=model,
        scale_record=scale_record,
        background=background,
        clock=clock,
        rates=rates,
        class_rates=class_rate or [],
        repair=repair,
        profile=profile,
        spares=spares,
        replicas=replicas,
        save_every=save_every,
        durable_every=durable_every,
        cadence=cadence,
        detect_within=detect_within,
        poison_after=poison_after,
        watch=watch,
        false_alarms=false_alarms,
        off=without or [],
    )
    asked = experiments.Asked(
        seeds=range(first, first + seeds), jobs=jobs, journal=journal, html=html
    )
    typer.echo(experiments.answer(settings, asked, output, sys.stderr))


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A sweep: base, grid, seeds.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where results lie; default FILE without its ending."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 2,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with a plot as well.")
    ] = None,
    output: Annotated[Told, typer.Option("--output", "-o", help="How it is printed.")] = Told.TEXT,
) -> None:
    """Run a grid of experiments; interrupted and called again, it goes on where it was."""
    from orchestrator.cli import pages, sweeping, whole
    from orchestrator.cli.errors import CliError, Exit

    whole.require_option("--html", html)
    folder = out if out is not None else file.with_suffix("")
    if folder == file:
        raise CliError(
            f"no ending to leave out for the folder of the results: {file}",
            "say with --out where they shall lie",
            Exit.USAGE,
        )
    told = sweeping.run(file, folder, jobs=jobs, progress=sys.stderr)
    if html is not None:
        whole.write(html, pages.of_sweep(told).encode())
    typer.echo(sweeping.shown(told, output))


@app.command()
def swarm(
    context: typer.Context,
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
    from orchestrator.cli import experiments, swarming
    from orchestrator.cli.errors import CliError, Exit
    from orchestrator.simulation.swarm import tell

    if seed is not None:
        experiments.refuse_beside(context, "--seed", ("seeds", "first"))
    if story and seed is None:
        raise CliError("--story needs one --seed", "name the seed to tell of", Exit.USAGE)
    if story and output is not Form.TEXT:
        raise CliError(
            f"--story is told in text, found -o {output.value}", "leave one of them out", Exit.USAGE
        )
    if seed is not None and story:
        for line in tell(seed):
            typer.echo(line)
        return
    drawn = range(first, first + seeds) if seed is None else range(seed, seed + 1)
    result = swarming.search(drawn, jobs=jobs, progress=sys.stderr)
    typer.echo(swarming.shown(result, output))
    if result.failed:
        raise typer.Exit(Exit.ERROR)
