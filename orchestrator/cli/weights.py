"""The commands of `holdfast weights`: look at weights, and write them in a public layout."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.choices import Form

app = typer.Typer(
    name="weights",
    help="Look at Llama 3 weights, and write them in a public layout.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
PROGRAM = "trainer.weights"


class Layout(StrEnum):
    """Public layouts."""

    HUGGING_FACE = "hf"
    META = "meta"


class Dtype(StrEnum):
    """Types that weights are written in."""

    SAME = "same"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Folder of Hugging Face's or Meta's layout, or a run: its name or folder, with @STEP "
        "for another checkpoint than the newest.",
    ),
]


@app.command()
def show(
    source: Source,
    check: Annotated[
        bool, typer.Option("--check", help="Read all of it: is every number finite?")
    ] = False,
    output: Annotated[Form, typer.Option("--output", "-o", help="How it is printed.")] = Form.TEXT,
) -> None:
    """Say what is there: layout, sizes, types, digest."""
    from orchestrator.cli import spawned

    more = ["--check"] if check else []
    spawned.spawn(PROGRAM, "show", "-o", output.value, *more, "--", spawned.source(source))


@app.command()
def convert(
    source: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that is not there yet.")],
    to: Annotated[Layout, typer.Option("--to", help="The layout.")] = Layout.HUGGING_FACE,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="The type of numbers.")] = Dtype.SAME,
    parts: Annotated[
        int, typer.Option(min=1, max=100, help="Files of Meta's layout; published: 1 (8B) or 8.")
    ] = 1,
) -> None:
    """Write weights in a public layout; the folder is whole or not there."""
    from orchestrator.cli import spawned

    where = [spawned.source(source), str(out)]
    more = ["--to", to.value, "--dtype", dtype.value, "--parts", str(parts)]
    spawned.spawn(PROGRAM, "convert", *more, "--", *where)
