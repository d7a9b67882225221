"""The commands of `holdfast checkpoint`: what is in a store, whether it is whole, what may go.

They ask the store and nothing else: no run, no journal. Only the format of torch needs torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.choices import Form, Output

app = typer.Typer(
    name="checkpoint",
    help="Look at, verify, judge and collect the checkpoints of any store.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

UriArgument = Annotated[
    str, typer.Argument(metavar="URI", help="A folder, file:///folder or s3://bucket/prefix.")
]
NewestArgument = Annotated[
    str | None,
    typer.Argument(metavar="[CHECKPOINT]", help="STEP or STEP@EPOCH; default the newest."),
]
NameArgument = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="STEP or STEP@EPOCH.")]
ReasonOption = Annotated[str, typer.Option(help="Why, for whoever reads of it.")]
FormOption = Annotated[Form, typer.Option("--output", "-o", help="How it is printed.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


@app.command()
def ls(
    uri: UriArgument,
    output: Annotated[
        Output, typer.Option("--output", "-o", help="How it is printed.")
    ] = Output.TABLE,
) -> None:
    """List the checkpoints, newest first, with how far each is trusted."""
    from orchestrator.cli import stored

    typer.echo(stored.listed(stored.opened(uri), output))


@app.command()
def show(
    uri: UriArgument, checkpoint: NewestArgument = None, output: FormOption = Form.TEXT
) -> None:
    """Tell everything about one checkpoint but its tensors."""
    from orchestrator.cli import stored

    typer.echo(stored.shown(stored.opened(uri), checkpoint, output))


@app.command()
def verify(
    uri: UriArgument,
    checkpoint: NewestArgument = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every checkpoint, not only one.")
    ] = False,
    output: FormOption = Form.TEXT,
    quiet: QuietOption = False,
) -> None:
    """Read every byte and compare; puts no verdict on record. Exit code 6 for damage."""
    from orchestrator.cli import verifying

    store = verifying.opened(uri)
    with verifying.gauge(quiet=quiet) as gauge:
        told = verifying.verify(store, checkpoint, everything=everything, gauge=gauge)
    verifying.tell(told, output)


@app.command()
def scrub(
    uri: UriArgument,
    rate: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Read at most so much a second: 200MiB, 1GiB."),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Also those that were verified before.")
    ] = False,
    output: FormOption = Form.TEXT,
    quiet: QuietOption = False,
) -> None:
    """Verify what is not yet, and put on record what came of it. Exit code 6 for damage."""
    from orchestrator.cli import verifying

    store = verifying.opened(uri)
    with verifying.gauge(quiet=quiet) as gauge:
        told = verifying.scrub(store, rate=rate, again=again, gauge=gauge)
    verifying.tell(told, output)


@app.command()
def diff(
    uri: UriArgument,
    one: NameArgument,
    other: NameArgument,
    output: FormOption = Form.TEXT,
) -> None:
    """Compare two checkpoints by their digests, tensor by tensor. Exit code 1 if they differ."""
    from orchestrator.cli import comparing, stored
    from orchestrator.cli.errors import Exit

    came = comparing.compare(stored.opened(uri), one, other)
    typer.echo(comparing.told(came, output))
    if not came.same:
        raise typer.Exit(Exit.ERROR)


@app.command()
def gc(
    uri: UriArgument,
    keep_last: Annotated[int, typer.Option(min=1, help="Keep so many of the newest.")] = 3,
    keep_every: Annotated[
        int, typer.Option(min=0, metavar="STEPS", help="Keep every multiple of so many steps.")
    ] = 0,
    anchors: Annotated[
        bool, typer.Option(help="Keep verified ones at distances that double.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would go, and why the rest stays.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
    output: FormOption = Form.TEXT,
) -> None:
    """Delete the checkpoints that need not be kept, and what killed writers left behind.

    Nothing goes if no checkpoint is whole: exit code 6 if one is damaged, 1 if all are barred.
    """
    from orchestrator.cli import collecting
    from orchestrator.cli.errors import CliError, Exit

    if dry_run and yes:
        raise CliError(
            "--dry-run and --yes, expected one of them: with --dry-run nothing is deleted",
            "look with --dry-run first, then agree with --yes",
            Exit.USAGE,
        )
    store = collecting.opened(uri)
    ladder = collecting.Ladder(last=keep_last, every_steps=keep_every, anchors=anchors)
    with collecting.gauge(quiet=False) as gauge:
        planned = collecting.plan(store, ladder, gauge)
    if dry_run or planned.whole is None:
        typer.echo(collecting.told(planned, output))
        collecting.require_whole(planned)
        return
    if not yes:
        typer.echo(collecting.told(planned, Form.TEXT), err=True)
        collecting.require_consent(planned, uri)
    typer.echo(collecting.told(collecting.collect(store, ladder, planned), output))


def _judging(name: str, kind: str, about: str) -> None:
    """Add a command that gives a verdict of this kind, one of `storage.verdicts.KINDS`."""

    @app.command(name=name, help=about)
    def judge(
        uri: UriArgument,
        checkpoint: NameArgument,
        reason: ReasonOption = "by hand",
        output: FormOption = Form.TEXT,
    ) -> None:
        from orchestrator.cli import stored

        typer.echo(stored.judged(stored.opened(uri), checkpoint, kind, reason, output))


_judging(
    "quarantine", "quarantined", "Have nobody resume from a checkpoint; its bytes stay for now."
)
_judging("release", "released", "Take back a quarantine or a suspicion.")


@app.command(name="rollback-plan")
def rollback_plan(
    uri: UriArgument,
    onset: Annotated[
        int, typer.Option(min=0, metavar="STEP", help="The first step that may be corrupt.")
    ],
    trust: Annotated[
        str,
        typer.Option(help="At least: written, bytes-verified, state-verified or compute-verified."),
    ] = "bytes-verified",
    output: FormOption = Form.TEXT,
) -> None:
    """Say what to resume from if everything since a step may be corrupt. Changes nothing.

    Exit code 1 if there is nothing with that much trust from before it.
    """
    from orchestrator.cli import rollback, stored
    from orchestrator.cli.errors import Exit

    planned = rollback.plan(stored.opened(uri), onset, trust)
    typer.echo(rollback.told(planned, uri, output))
    if planned.resume is None:
        raise typer.Exit(Exit.ERROR)


@app.command()
def export(
    uri: UriArgument,
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="A folder that is not there yet.")],
    step: Annotated[
        str | None,
        typer.Option(
            metavar="STEP", help="STEP or STEP@EPOCH; default the newest that is not barred."
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option("--format", help="safetensors, or dcp: torch.distributed.checkpoint's own."),
    ] = "safetensors",
    max_file: Annotated[
        str, typer.Option(metavar="BYTES", help="Of each safetensors file.")
    ] = "5GiB",
    output: FormOption = Form.TEXT,
    quiet: QuietOption = False,
) -> None:
    """Write a checkpoint's whole tensors to a folder, verified. Exit code 6 for damage.

    The format dcp needs torch; safetensors does not.
    """
    from orchestrator.cli import moving

    store, file_bytes = moving.opened(uri), int(moving.bytes_of(max_file, "--max-file"))
    with moving.gauge(quiet=quiet) as gauge:
        came = moving.take_out(store, step, to, form, file_bytes, gauge)
    typer.echo(moving.told(came, output))


@app.command(name="import")
def import_(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="Of torch.distributed.checkpoint, or of safetensors."
        ),
    ],
    uri: UriArgument,
    step: Annotated[int, typer.Option(help="Of the checkpoint that it becomes.")],
    run: Annotated[str, typer.Option(help="Name of the run that the store belongs to.")] = "dcp",
    max_shard: Annotated[str, typer.Option(metavar="BYTES", help="Of each shard.")] = "1GiB",
    output: FormOption = Form.TEXT,
    quiet: QuietOption = False,
) -> None:
    """Make a checkpoint of a folder, for torch.distributed.checkpoint to load.

    Nothing in the folder is run: metadata that asks for anything is refused. Exit code 6 if the
    folder is not whole.
    """
    from orchestrator.cli import moving

    store, shard_bytes = (
        moving.opened(uri, new=True),
        int(moving.bytes_of(max_shard, "--max-shard")),
    )
    with moving.gauge(quiet=quiet) as gauge:
        came = moving.bring_in(store, folder, step, run, shard_bytes, gauge)
    typer.echo(moving.told(came, output))
