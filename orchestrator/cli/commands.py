"""The commands of `holdfast`. What it prints comes from journals; what it starts is `supervise`.

Commands import what they need when they are called: `holdfast --help` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli import campaign as campaigning
from orchestrator.cli import checkpoint as checkpoints
from orchestrator.cli import plan as planning
from orchestrator.cli import simulate as simulating
from orchestrator.cli import weights
from orchestrator.cli.choices import Form, Output
from orchestrator.cli.errors import CliError, Commands, Exit

app = typer.Typer(
    cls=Commands,
    name="holdfast",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(checkpoints.app)
app.add_typer(planning.app)
app.add_typer(simulating.app)
app.add_typer(weights.app)
app.add_typer(weights.tokenizers)
app.command()(campaigning.campaign)


def _say_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"holdfast {version('holdfast')}")
        raise typer.Exit


@app.callback()
def holdfast(
    _: Annotated[
        bool,
        typer.Option(
            "--version", help="Say which holdfast this is.", callback=_say_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Keeps large training runs running."""


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
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of the controller, on loopback; 0: any.")
    ] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Run a training job on this machine, and keep it running until it is done."""
    from orchestrator.cli import intake, progress, spawned, supervise

    training, plan = intake.read(run_file, faults)
    training = spawned.pin_weights(training, out)
    ended = supervise.supervise(
        training,
        plan,
        out=out,
        report=report,
        timeout_s=None if timeout is None else intake.span_s("--timeout", timeout),
        progress=progress.progress_on(sys.stdout, quiet=quiet),
        port=port,
    )
    if ended.code is not Exit.OK:
        raise CliError(ended.message, ended.hint, ended.code)


@app.command()
def drill(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.")],
    faults: Annotated[
        Path, typer.Option(metavar="PLAN.yaml", help="What is let loose on the first of the two.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for both runs.")],
    timeout: Annotated[
        str | None, typer.Option(help="Give up either of them after this long.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Run a job with faults and once more without, and compare the results bit by bit."""
    from orchestrator.cli import drill, intake, progress, reporting, spawned

    training, plan = intake.read(run_file, faults)
    training = spawned.pin_weights(training, out / "disturbed")
    assert plan is not None
    verdict = drill.drill(
        training,
        plan,
        out=out,
        timeout_s=None if timeout is None else intake.span_s("--timeout", timeout),
        progress=progress.progress_on(sys.stdout, quiet=quiet),
        twin_progress=progress.progress_on(sys.stdout, quiet=quiet),
    )
    typer.echo(reporting.verdict_words(verdict.disturbed, verdict.differences))
    if not verdict.identical or verdict.disturbed.state != "Succeeded":
        raise typer.Exit(Exit.ERROR)


@app.command()
def validate(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.")],
    faults: Annotated[
        Path | None, typer.Option(metavar="PLAN.yaml", help="A fault plan for it.")
    ] = None,
) -> None:
    """Check a run file, and a fault plan against it, without starting anything."""
    from orchestrator.cli import intake, spawned

    training, plan = intake.read(run_file, faults)
    spawned.pin_weights(training)
    typer.echo(intake.words(training, plan))


RunOption = Annotated[
    str | None,
    typer.Option("--run", metavar="RUN", help="Name or folder of a run; default the newest."),
]
RunArgument = Annotated[
    str | None, typer.Argument(metavar="[RUN]", help="Name or folder; default the newest.")
]


@app.command()
def get(
    what: Annotated[
        str,
        typer.Argument(
            metavar="KIND", help="runs, nodes, ranks, incidents, checkpoints, devices, events"
        ),
    ],
    run: RunOption = None,
    output: Annotated[
        Output, typer.Option("--output", "-o", help="How it is printed.")
    ] = Output.TABLE,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Print it again whenever it changes.")
    ] = False,
    tail: Annotated[int, typer.Option(min=0, help="Events: the newest so many; 0 for all.")] = 200,
    periodic: Annotated[
        bool, typer.Option("--all", help="Events: telemetry and ticks as well.")
    ] = False,
) -> None:
    """List what there is, live or after the fact."""
    from orchestrator.cli import get

    get.get(what, run, output, watch=watch, tail=tail, periodic=periodic)


@app.command()
def describe(
    what: Annotated[
        str, typer.Argument(metavar="KIND", help="run, incident, node, checkpoint or device")
    ],
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Which; default the newest.")
    ] = None,
    run: RunOption = None,
) -> None:
    """Tell everything about one thing: evidence, decision, cost, time line."""
    from orchestrator.cli import describe, runs

    text, damage = describe.describe(what, name, run)
    typer.echo(text)
    runs.require_whole(damage)


@app.command()
def report(
    run: RunArgument = None,
    output: Annotated[Form, typer.Option("--output", "-o", help="How it is printed.")] = Form.TEXT,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE.json", help="Write it here as JSON.")
    ] = None,
) -> None:
    """Tell what became of a run: digests, ledger, incidents."""
    from orchestrator.cli import reporting, runs

    shown = reporting.show(run, output)
    if file is not None:
        reporting.write(shown.told, file)
    typer.echo(shown.text)
    runs.require_whole(shown.damage)


@app.command()
def replay(run: RunArgument = None) -> None:
    """Decide everything again from the journal, and compare byte for byte."""
    from orchestrator.cli import reporting

    came = reporting.replay(run)
    typer.echo(came.text)
    if not came.same:
        raise typer.Exit(Exit.ERROR)


@app.command()
def bisect(
    run: RunArgument = None,
    since: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="CHECKPOINT",
            help="STEP or STEP@EPOCH that is good, or `seed`; default the newest that is compute "
            "verified.",
        ),
    ] = None,
    output: Annotated[Form, typer.Option("--output", "-o", help="How it is printed.")] = Form.TEXT,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Compute steps once more on this machine; say which first had other digests in the run.

    Needs torch. Exit code 6 if one had.
    """
    from orchestrator.cli import bisect

    found = bisect.bisect(run, since, quiet=quiet)
    typer.echo(bisect.told(found, output))
    if found.step is not None:
        raise typer.Exit(Exit.DAMAGED)


@app.command()
def logs(
    run: RunArgument = None,
    rank: Annotated[int, typer.Option(help="Whose output.")] = 0,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the run is over.")
    ] = False,
    tail: Annotated[int | None, typer.Option(min=0, help="Only the last so many lines.")] = None,
) -> None:
    """Print what a rank printed."""
    from orchestrator.cli import logs

    logs.logs(run, rank, follow=follow, tail=tail)


@app.command()
def stop(
    run: RunArgument = None,
    wait: Annotated[str, typer.Option(help="Wait this long for it to end.")] = "60s",
) -> None:
    """Stop a run, keeping everything."""
    from orchestrator.cli import intake, stop

    wait_s = intake.span_s("--wait", wait)
    typer.echo(stop.stop(run, wait_s))


NodeKind = Annotated[str, typer.Argument(metavar="node", help="What is named: nodes.")]
NodeNames = Annotated[list[str], typer.Argument(metavar="NAME...", help="Which nodes.")]


@app.command()
def drain(
    what: NodeKind,
    names: NodeNames,
    run: RunOption = None,
    within: Annotated[
        str | None, typer.Option(help="They are taken after this long, whatever runs there.")
    ] = None,
    reason: Annotated[str, typer.Option(help="Why, for whoever reads of it.")] = "",
    wait: Annotated[str, typer.Option(help="Wait this long for them to be free.")] = "10m",
    output: Annotated[Form, typer.Option("--output", "-o", help="How it is printed.")] = Form.TEXT,
) -> None:
    """Have nodes be free of a run, at the moment that costs it least; they stay cordoned."""
    from orchestrator.cli import draining, intake

    told = draining.drain(
        what,
        names,
        run,
        reason=reason,
        within_s=None if within is None else intake.span_s("--within", within),
        wait_s=intake.span_s("--wait", wait),
        output=output,
    )
    typer.echo(told)


@app.command()
def uncordon(
    what: NodeKind,
    names: NodeNames,
    run: RunOption = None,
    wait: Annotated[str, typer.Option(help="Wait this long for it to be on record.")] = "10s",
    output: Annotated[Form, typer.Option("--output", "-o", help="How it is printed.")] = Form.TEXT,
) -> None:
    """Have nodes be used again: drained ones become spares, others stay."""
    from orchestrator.cli import draining, intake

    wait_s = intake.span_s("--wait", wait)
    typer.echo(draining.uncordon(what, names, run, wait_s=wait_s, output=output))


DeviceKind = Annotated[str, typer.Argument(metavar="device", help="What is named: devices.")]
Serials = Annotated[
    list[str], typer.Argument(metavar="SERIAL...", help="Which, as `get devices` has them.")
]
LedgerOption = Annotated[
    str | None,
    typer.Option(
        "--run", metavar="RUN", help="A run whose ledger it is; default the one of all runs."
    ),
]
WhyOption = Annotated[str, typer.Option("--reason", help="Why, for whoever reads of it.")]


@app.command()
def release(
    what: DeviceKind,
    serials: Serials,
    reason: WhyOption,
    run: LedgerOption = None,
    tested: Annotated[
        bool, typer.Option("--tested", help="It was tested elsewhere: next is probation.")
    ] = False,
    output: Annotated[Form, typer.Option("--output", "-o", help="How it is printed.")] = Form.TEXT,
) -> None:
    """Have quarantined or retired devices come back: a test, then probation."""
    from orchestrator.cli import devices

    told = devices.release(what, serials, run, reason=reason, tested=tested, output=output)
    typer.echo(told)


@app.command()
def retire(
    what: DeviceKind,
    serials: Serials,
    reason: WhyOption,
    run: LedgerOption = None,
    output: Annotated[Form, typer.Option("--output", "-o", help="How it is printed.")] = Form.TEXT,
) -> None:
    """Have devices get no seat any more, in any run."""
    from orchestrator.cli import devices

    typer.echo(devices.retire(what, serials, run, reason=reason, output=output))


@app.command()
def measure(
    run_file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN.yaml]", help="A run of your own; default a small Llama on two nodes."
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="PROFILE", help="Write the profile here: .json or .yaml."),
    ] = None,
    output: Annotated[
        Form, typer.Option("--output", "-o", help="How it is printed; json is the profile.")
    ] = Form.TEXT,
    steps: Annotated[
        int | None,
        typer.Option(min=60, max=10_000, help="Of each run, without a run file; default 90."),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, max=100, help="How many runs.")] = 2,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The profile to fill; default the one that comes with holdfast."
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Measure in small live runs what restarts, saves and detectors take, for simulations."""
    from orchestrator.cli import measure, progress

    measured = measure.measure(
        run_file=run_file,
        steps=steps,
        base=base,
        file=file,
        repeat=repeat,
        progress=lambda: progress.progress_on(sys.stderr, quiet=quiet),
    )
    typer.echo(measured.told(output))


@app.command()
def generate(  # noqa: PLR0913, PLR0917 - typer: every option is an argument
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Weights, as `holdfast weights show` takes them."),
    ],
    prompt: Annotated[str, typer.Argument(metavar="[TEXT]", help="The text to continue.")] = "",
    tokens: Annotated[int, typer.Option(min=1, max=131_072, help="At most so many.")] = 100,
    temperature: Annotated[
        float, typer.Option(min=0, max=100, help="0: always the most likely token.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(min=1e-6, max=1, help="Only the likeliest tokens with this share together."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of chance, if there is any.")] = 0,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="In tiktoken format; default the weights' own."),
    ] = None,
    dtype: Annotated[
        weights.Computed, typer.Option("--dtype", help="The type that is computed in.")
    ] = weights.Computed.FLOAT32,
    device: Annotated[
        weights.Device, typer.Option("--device", help="Where.")
    ] = weights.Device.AUTO,
) -> None:
    """Continue a text with a run's newest checkpoint, or with public weights."""
    from orchestrator.cli import spawned

    options = {
        "--tokens": tokens,
        "--temperature": temperature,
        "--top-p": top_p,
        "--seed": seed,
        "--tokenizer": tokenizer,
        "--dtype": dtype.value,
        "--device": device.value,
    }
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    spawned.spawn("trainer.generate", *given, "--", spawned.source(source), prompt)


@app.command()
def explain(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="[FIELD.PATH]",
            help="For example spec.checkpoint, plan.faults, model.classes, profile.habits.",
        ),
    ] = None,
) -> None:
    """Explain the fields of run files, fault plans, models and records, and profiles."""
    from orchestrator.cli import explain

    typer.echo(explain.explain(path))
