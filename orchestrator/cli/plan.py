"""The commands of `holdfast plan`: four questions to ask before a run, answered at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from orchestrator.cli.choices import Output


class _Questions(TyperGroup):
    """Takes a run file for the one question that is asked of it: what its layout holds."""

    def resolve_command(
        self,
        ctx: Any,  # noqa: ANN401 - of click, which newer versions of typer have inside
        args: list[str],
    ) -> tuple[str | None, Any, list[str]]:
        """Return which command is meant, and its arguments."""
        if args and Path(args[0]).suffix in {".yaml", ".yml", ".json"}:
            args = ["layout", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="plan",
    cls=_Questions,
    help="Answer what a run needs before it starts: spares, checkpoint interval, ETTR, memory. "
    "`plan RUN.yaml` is `plan layout RUN.yaml`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

GpusOption = Annotated[int, typer.Option(min=1, help="GPUs of the job, 8 to a node.")]
ModelOption = Annotated[str, typer.Option("--model", metavar="NAME|FILE", help="The fault model.")]
MttiOption = Annotated[
    str | None,
    typer.Option(metavar="SPAN", help="Time between interruptions, instead of the model's."),
]
RatesOption = Annotated[float, typer.Option(min=0, help="Multiply all rates of the model by this.")]
DetectOption = Annotated[
    str | None,
    typer.Option(metavar="SPAN", help="From a fault to its detection; default the model's mean."),
]
RestartOption = Annotated[
    str | None,
    typer.Option(metavar="SPAN", help="From detection to the first step; default 45s."),
]
StallOption = Annotated[
    str | None,
    typer.Option(metavar="SPAN", help="What one checkpoint stalls training; default 50ms."),
]
SimulateOption = Annotated[
    int,
    typer.Option(
        "--simulate", min=0, metavar="SEEDS", help="Simulate so many runs beside the closed form."
    ),
]
SimulatedDaysOption = Annotated[
    float, typer.Option("--simulated-days", min=0.001, help="Length of each simulated run.")
]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="How it is printed.")]


@app.command()
def spares(  # noqa: PLR0913, PLR0917 - typer: every option is an argument
    gpus: GpusOption = 16_384,
    model: ModelOption = "llama3",
    mtti: MttiOption = None,
    rates: RatesOption = 1.0,
    repair: Annotated[
        str | None,
        typer.Option(metavar="SPAN", help="Mean time that a node is away; default several."),
    ] = None,
    refill: Annotated[
        str, typer.Option(metavar="SPAN", help="Until a used hot spare is replaced.")
    ] = "6h",
    quantile: Annotated[float, typer.Option(help="Enough for this share of the time.")] = 0.99,
    run_days: Annotated[
        float, typer.Option("--days", min=0.001, help="Length of the run, to be enough all along.")
    ] = 54.0,
    simulate: SimulateOption = 0,
    days: SimulatedDaysOption = 7.0,
    output: OutputOption = Output.TABLE,
) -> None:
    """How many spare nodes: for as long as repairs take, and hot ones until they are refilled."""
    from orchestrator.cli import answers, planning

    site = planning.site(gpus=gpus, model=planning.faults(model), mtti=mtti, rates=rates)
    answer = planning.spares(site, repair=repair, refill=refill, quantile=quantile, days=run_days)
    if simulate:
        from orchestrator.cli import beside

        runs = beside.Beside(gpus=gpus, model=model, rates=rates, seeds=simulate, days=days)
        runs.refuse_mtti(mtti)
        answer = beside.spares(answer, runs)
    typer.echo(answers.shown(answer, output))


@app.command()
def interval(  # noqa: PLR0913, PLR0917 - typer: every option is an argument
    gpus: GpusOption = 16_384,
    model: ModelOption = "llama3",
    mtti: MttiOption = None,
    rates: RatesOption = 1.0,
    detect: DetectOption = None,
    restart: RestartOption = None,
    stall: StallOption = None,
    simulate: SimulateOption = 0,
    days: SimulatedDaysOption = 7.0,
    output: OutputOption = Output.TABLE,
) -> None:
    """How often to save: the best interval, and what another one costs."""
    from orchestrator.cli import answers, planning

    site = planning.site(gpus=gpus, model=planning.faults(model), mtti=mtti, rates=rates)
    outage = planning.outage(site, detect=detect, restart=restart, stall=stall)
    answer = planning.interval(site, outage)
    if simulate:
        from orchestrator.cli import beside

        runs = beside.Beside(gpus=gpus, model=model, rates=rates, seeds=simulate, days=days)
        runs.refuse_mtti(mtti)
        answer = beside.interval(answer, runs)
    typer.echo(answers.shown(answer, output))


@app.command()
def ettr(  # noqa: PLR0913, PLR0917 - typer: every option is an argument
    gpus: GpusOption = 16_384,
    model: ModelOption = "llama3",
    mtti: MttiOption = None,
    rates: RatesOption = 1.0,
    detect: DetectOption = None,
    restart: RestartOption = None,
    stall: StallOption = None,
    interval: Annotated[
        str | None,
        typer.Option(metavar="SPAN", help="Between two checkpoints; default the best."),
    ] = None,
    days: Annotated[float, typer.Option(min=0.001, help="Length of the run.")] = 54.0,
    simulate: SimulateOption = 0,
    output: OutputOption = Output.TABLE,
) -> None:
    """Which effective training time to expect, and what the rest is lost to."""
    from orchestrator.cli import answers, planning

    site = planning.site(gpus=gpus, model=planning.faults(model), mtti=mtti, rates=rates)
    outage = planning.outage(site, detect=detect, restart=restart, stall=stall)
    answer = planning.ettr(site, outage, interval=interval, days=days)
    if simulate:
        from orchestrator.cli import beside

        runs = beside.Beside(gpus=gpus, model=model, rates=rates, seeds=simulate, days=days)
        runs.refuse_mtti(mtti)
        answer = beside.ettr(answer, runs)
    typer.echo(answers.shown(answer, output))


@app.command()
def layout(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """What a rank holds, in bytes, and whether it fits a GPU; for published models as well."""
    from orchestrator import compose
    from orchestrator.cli import answers, laying

    typer.echo(answers.shown(laying.layout(compose.read_run(run_file)), output))
