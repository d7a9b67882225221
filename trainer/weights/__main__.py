"""`python -m trainer.weights`: looks at weights, and writes them in a public layout.

`holdfast weights` starts it: commands do not load torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import msgspec

from orchestrator.worker import MisconfiguredError
from trainer.config import PRESETS, ModelConfig, model_config
from trainer.weights import run
from trainer.weights.continuing import open_state
from trainer.weights.convert import LAYOUTS, TYPES, convert
from trainer.weights.sources import open_weights
from trainer.weights.stored import Weights, describe, mean

EXIT_MISUSE = 2


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; return the exit code."""
    asked = _parser().parse_args(arguments)
    try:
        if asked.command == "fit":
            pinned = run.pin(asked.source)
            _require(pinned, asked.field, _model(asked.model), asked.steps)
            _say(json.dumps(pinned))
            return 0
        weights = _opened(asked)
        if asked.command == "show":
            told = _checked(weights) if asked.check else _told(weights)
            _say(_in_json(told) if asked.output == "json" else _in_words(told))
        else:
            dtype = TYPES.get(asked.dtype)
            convert(weights, asked.out, asked.to, dtype=dtype, parts=asked.parts)
            _say(f"{weights.layout}: {weights.parameters} parameters written: {asked.out}")
    except MisconfiguredError as error:
        where = f"spec.trainer.{asked.field}: " if asked.command == "fit" else ""
        _complain(f"{where}{error}", error.hint)
        return EXIT_MISUSE
    except OSError as error:
        _complain(str(error), "check the path, its permissions, and the room there")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="holdfast weights", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    source = "folder of Hugging Face's or Meta's layout, or of a run (with @STEP for that step)"
    show = commands.add_parser("show", help="say what is there")
    show.add_argument("source", help=source)
    show.add_argument("--check", action="store_true", help="read everything: is it all finite?")
    show.add_argument("--output", "-o", choices=("text", "json"), default="text")
    fit = commands.add_parser("fit", help="pin its address, if a run's model can begin from it")
    fit.add_argument("source", help=source)
    fit.add_argument("--model", required=True, help="spec.trainer.model, as JSON")
    fit.add_argument("--steps", type=int, required=True, help="spec.trainer.steps")
    fit.add_argument("--field", choices=("initFrom", "continueFrom"), required=True)
    once = commands.add_parser("convert", help="write it in a public layout")
    once.add_argument("source", help=source)
    several = commands.add_parser("average", help="write the mean of several in a public layout")
    several.add_argument(
        "sources", nargs="+", help="each as above; a run by itself: its checkpoints in the anneal"
    )
    for written in (once, several):
        _add_output(written)
    return parser


def _add_output(written: argparse.ArgumentParser) -> None:
    written.add_argument("--out", type=Path, required=True, help="a new folder")
    written.add_argument("--to", choices=LAYOUTS, default="hf")
    written.add_argument("--dtype", choices=("same", *TYPES), default="same")
    written.add_argument("--parts", type=_count, default=1, help="files of Meta's layout")


def _opened(asked: argparse.Namespace) -> Weights:
    if asked.command != "average":
        return open_weights(asked.source)
    sources: list[str] = asked.sources
    if len(sources) == 1:
        sources = run.annealed(sources[0])
    return mean([open_weights(source) for source in sources])


def _require(source: str, field: str, config: ModelConfig, steps: int) -> None:
    """Refuse what a run can not begin from, or not go on from."""
    if field == "initFrom":
        open_weights(source).require(config)
    else:
        open_state(source).require(config, steps)


def _model(text: str) -> ModelConfig:
    return model_config(msgspec.json.decode(text))


def _count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 100:
        raise ValueError(text)
    return number


def _told(weights: Weights) -> dict[str, object]:
    stored = {id(s): s for s in weights.stored.values()}.values()
    types = Counter(str(s.dtype).removeprefix("torch.") for s in stored)
    known = [name for name, config in PRESETS.items() if config == weights.config]
    sizes = msgspec.to_builtins(weights.config)
    del sizes["maxLength"]  # of a run, not of weights
    return {
        "where": weights.where,
        "layout": weights.layout,
        "model": known[0] if known else None,
        "sizes": sizes,
        "parameters": weights.parameters,
        "types": dict(sorted(types.items())),
        "tied": weights.tied,
        "digest": weights.digest,
    }


def _checked(weights: Weights) -> dict[str, object]:
    for name in weights.stored:
        weights.read(name)
    return {**_told(weights), "finite": True}


def _in_json(told: dict[str, object]) -> str:
    return msgspec.json.format(msgspec.json.encode(told), indent=2).decode()


def _in_words(told: dict[str, object]) -> str:
    types = told["types"]
    assert isinstance(types, dict)
    sizes = msgspec.convert(told["sizes"], type(PRESETS["8B"]))
    lines = [
        f"{told['where']}: {told['layout']}",
        f"model {told['model'] or 'of its own sizes'}: {describe(sizes)}",
        f"{told['parameters']} parameters, tensors: "
        + ", ".join(f"{count} {kind}" for kind, count in types.items()),
    ]
    if told["tied"]:
        lines.append("head and embedding are one here; training gives each its own")
    if told.get("finite"):
        lines.append("all of it was read, and is finite")
    lines.append(f"digest {told['digest']}")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text)  # noqa: T201 - it is what this program is for


def _complain(message: str, hint: str) -> None:
    print(f"{message}\nhint: {hint}", file=sys.stderr)  # noqa: T201 - the same


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
