"""`python -m trainer.vocabulary`: learns a tokenizer from text, for tests, demos and small models.

`holdfast tokenizer train` starts it. The file has the format of Llama 3's release, see
trainer.tokenizer; the same text gives the same bytes. Learning is the `tokenizers` library's.
"""

from __future__ import annotations

import argparse
import base64
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from orchestrator.worker import MisconfiguredError
from trainer.outputs import placing, require_folder
from trainer.retrying import SourceUnavailableError
from trainer.text import Text
from trainer.tokenizer import FILE_BYTES_MAX, SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

BYTES = 256
RANKS_MAX = 1_000_000


def learn(documents: Iterable[str], ranks: int) -> bytes:
    """Return a file in tiktoken format: every byte is a token, and pairs that are frequent.

    Args:
        documents: the text.
        ranks: tokens, the 256 special ones not among them.

    Raises:
        MisconfiguredError: if the text has not as many pairs, or `tokenizers` is not installed.
    """
    try:
        from tokenizers import (  # noqa: PLC0415 - of an extra that only this needs
            Regex,
            models,
            pre_tokenizers,
            trainers,
        )
        from tokenizers import Tokenizer as Learner  # noqa: PLC0415 - the same
    except ImportError as error:
        raise MisconfiguredError(
            f"learning a tokenizer needs the library tokenizers: {error}",
            hint="pip install 'holdfast[tokenizer]'",
        ) from error
    learner = Learner(models.BPE())
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"), as_bytes]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=ranks,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(documents, trainer)
    vocabulary = learner.get_vocab()
    if len(vocabulary) < ranks:
        raise MisconfiguredError(
            f"the text is worth {len(vocabulary)} tokens, expected {ranks}",
            hint="more text, or fewer --ranks",
        )
    return b"".join(
        base64.b64encode(_bytes_of(token)) + b" %d\n" % rank
        for token, rank in sorted(vocabulary.items(), key=lambda item: item[1])
    )


def _bytes_of(token: str) -> bytes:
    """Return the bytes that the library shows as printable characters, one for each.

    Source: the byte-level encoding of GPT-2.
    """
    return bytes(_SHOWN[character] for character in token)


def _shown() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(BYTES) if byte not in printable]
    shown = {chr(byte): byte for byte in printable}
    return shown | {chr(BYTES + i): byte for i, byte in enumerate(others)}


_SHOWN = _shown()


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; return the exit code."""
    asked = _parser().parse_args(arguments)
    try:
        _require_place(asked.out)
        content = learn(Text(tuple(asked.data) or None).documents(), asked.ranks)
        assert len(content) <= FILE_BYTES_MAX
        _write(asked.out, content)
    except (MisconfiguredError, SourceUnavailableError, OSError) as error:
        hint = getattr(error, "hint", "") or "choose a file in a folder that can be written"
        print(f"{error}\nhint: {hint}", file=sys.stderr)  # noqa: T201 - it is a program
        return 2 if isinstance(error, MisconfiguredError) else 1
    tokenizer = Tokenizer(content)
    print(  # noqa: T201 - it is a program
        f"{asked.ranks} tokens and {len(SPECIAL_TOKENS)} special ones, BOS {tokenizer.bos}, "
        f"EOS {tokenizer.eos}: {asked.out}; the model's `vocab: {tokenizer.size}`"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="holdfast tokenizer train", description=__doc__)
    parser.add_argument(
        "data", nargs="*", help="files, folders, globs or fsspec addresses; none: the demo's text"
    )
    parser.add_argument("--ranks", type=_ranks, default=1024, help="tokens beside special ones")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    return parser


def _ranks(text: str) -> int:
    number = int(text)
    if not BYTES < number <= RANKS_MAX:
        raise argparse.ArgumentTypeError(f"{number}, expected {BYTES + 1} to {RANKS_MAX}")
    return number


def _require_place(path: Path) -> None:
    """Refuse a place where nothing can be written, before there is anything to write."""
    require_folder(path)
    with placing(path):
        there = path.is_dir()
    if there:
        raise MisconfiguredError(f"a folder is there: {path}", hint="name a file to write")


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with placing(path):
        try:
            unfinished.write_bytes(content)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
