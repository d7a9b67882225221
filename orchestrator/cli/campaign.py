"""`holdfast campaign`: lets faults loose that raise no error, and counts what is noticed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.choices import Form

SEED_MOST = (1 << 63) - 1
"""That a generator of random numbers takes."""


def campaign(  # noqa: PLR0913, PLR0917 - typer: every option is an argument
    run_file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN.yaml]",
            help="The run to strike, marked with `spec.campaign: true`; default a tiny Llama.",
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, max=100_000, help="How many faults.")] = 300,
    classes: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="What to let loose: corruption, hang, straggler; as many trials of each.",
        ),
    ] = "corruption",
    groups: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Which corruption, and no whole runs then: state, persistent, intermittent, "
            "rare, oneshot, sum, data, detector; default all.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=SEED_MOST, help="Of everything that chance decides.")
    ] = 0,
    clean_steps: Annotated[
        int, typer.Option(min=0, help="Steps without a fault besides twins, for false alarms.")
    ] = 1000,
    resizes: Annotated[
        int, typer.Option(min=0, help="Whole runs without a fault that shrink and grow back.")
    ] = 2,
    pairs: Annotated[
        int,
        typer.Option(min=0, help="Stretches with and without detectors, for overhead."),
    ] = 20,
    whole_runs: Annotated[
        bool, typer.Option(help="Some trials of corruption are whole runs with the controller.")
    ] = True,
    harm: Annotated[
        bool, typer.Option(help="Follow each fault unwatched as well: does it do harm?")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where results lie; default campaign-SEED."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with a plot as well.")
    ] = None,
    output: Annotated[Form, typer.Option("--output", "-o", help="How it is printed.")] = Form.TEXT,
) -> None:
    """Let silent faults loose on a small run; count what is noticed, how soon, and who is named.

    Interrupted and called again, it goes on where it was.
    """
    from orchestrator.cli import campaigning, campaigns, whole

    whole.require_option("--html", html)
    kinds = campaigning.classes_of(classes)
    asked = campaigning.Asked(
        trials=trials,
        seed=seed,
        clean_steps=clean_steps,
        pairs=pairs,
        whole_runs=whole_runs,
        resizes=resizes if whole_runs else 0,
        harm=harm,
        classes=kinds,
        groups=campaigning.groups_of(groups, kinds),
    )
    folder = out if out is not None else Path(f"campaign-{seed}")
    told = campaigning.run(run_file, asked, folder, progress=sys.stderr)
    if html is not None:
        whole.write(html, campaigns.page(told).encode())
    typer.echo(campaigns.shown(told, output))
