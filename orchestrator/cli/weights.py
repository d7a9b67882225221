"""The commands of `holdfast weights` and `holdfast tokenizer`: started as programs."""

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


tokenizers = typer.Typer(
    name="tokenizer",
    help="Learn a small tokenizer.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


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


class Computed(StrEnum):
    """Types that are computed in."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Device(StrEnum):
    """Where something is computed."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


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


Out = Annotated[Path, typer.Option(metavar="OUT", help="A folder that is not there yet.")]
To = Annotated[Layout, typer.Option("--to", help="The layout.")]
InType = Annotated[Dtype, typer.Option("--dtype", help="The type of numbers.")]
Parts = Annotated[
    int, typer.Option(min=1, max=100, help="Files of Meta's layout; published: 1 (8B) or 8.")
]


@app.command()
def convert(
    source: Source,
    out: Out,
    to: To = Layout.HUGGING_FACE,
    dtype: InType = Dtype.SAME,
    parts: Parts = 1,
) -> None:
    """Write weights in a public layout; the folder is whole or not there."""
    from orchestrator.cli import spawned

    spawned.spawn(PROGRAM, "convert", *_output(out, to, dtype, parts), "--", spawned.source(source))


@app.command()
def average(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Weights, as above; a run by itself: its checkpoints within the anneal.",
        ),
    ],
    out: Out,
    to: To = Layout.HUGGING_FACE,
    dtype: InType = Dtype.SAME,
    parts: Parts = 1,
) -> None:
    """Write the mean of several weights, such as a run's checkpoints while its rate fell to 0."""
    from orchestrator.cli import spawned

    found = [spawned.source(source) for source in sources]
    spawned.spawn(PROGRAM, "average", *_output(out, to, dtype, parts), "--", *found)


def _output(out: Path, to: Layout, dtype: Dtype, parts: int) -> list[str]:
    return [f"--out={out}", f"--to={to.value}", f"--dtype={dtype.value}", f"--parts={parts}"]


@tokenizers.callback()
def _tokenizer() -> None:
    """Keep `train` a word of its own: a group of one command would be that command."""


@tokenizers.command()
def train(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where it is written.")],
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA]...",
            help="Text: files, folders, globs or fsspec addresses; default the demo's.",
        ),
    ] = None,
    ranks: Annotated[
        int, typer.Option(min=257, max=1_000_000, help="Tokens, beside 256 special ones.")
    ] = 1024,
) -> None:
    """Learn a tokenizer from text, in the format of Llama 3's: the same text, the same file."""
    from orchestrator.cli import spawned

    spawned.spawn("trainer.vocabulary", f"--out={out}", f"--ranks={ranks}", "--", *(data or ()))
