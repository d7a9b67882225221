"""Makes the small tokenizer that ships: 1,024 tokens learnt from the standard library's sources.

    python -m trainer.assets.make_tokenizer trainer/assets/small.tiktoken

`small.tiktoken` was made by this program from the top-level modules of CPython 3.11.7, in a minute.
It is plain byte-pair encoding: pieces are cut by Llama 3's pattern, and the most frequent pair of
neighbours (the first by its bytes among equals) becomes one token, again and again.
"""

from __future__ import annotations

import base64
import sys
import sysconfig
from collections import Counter
from itertools import pairwise
from pathlib import Path

import regex  # type: ignore[import-untyped]  # comes with tiktoken

from trainer.tokenizer import SPLIT_PATTERN

RANKS = 1024
"""With 256 special tokens this is the vocabulary of the debug model, 1,280."""


def learn(pieces: Counter[bytes], ranks: int) -> list[bytes]:
    """Return the tokens in the order of their ranks: all bytes first, then merges as they came."""
    tokens = [bytes([byte]) for byte in range(256)]
    words = [([bytes([byte]) for byte in piece], count) for piece, count in pieces.items()]
    while len(tokens) < ranks:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words:
            for pair in pairwise(word):
                pairs[pair] += count
        left, right = max(pairs, key=lambda pair: (pairs[pair], [-byte for byte in b"".join(pair)]))
        tokens.append(left + right)
        for word, _ in words:
            _merge(word, left, right)
    return tokens


def _merge(word: list[bytes], left: bytes, right: bytes) -> None:
    at = 0
    while at + 1 < len(word):
        if word[at] == left and word[at + 1] == right:
            word[at : at + 2] = [left + right]
        at += 1


def main() -> None:
    """Learn from this Python's own library, and write the file that the command line names."""
    pieces: Counter[bytes] = Counter()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        pieces.update(piece.encode() for piece in regex.findall(SPLIT_PATTERN, text))
    frequent = Counter({piece: count for piece, count in pieces.items() if count > 2})
    lines = (
        f"{base64.b64encode(token).decode()} {rank}\n"
        for rank, token in enumerate(learn(frequent, RANKS))
    )
    Path(sys.argv[1]).write_text("".join(lines), encoding="ascii")


if __name__ == "__main__":
    main()
