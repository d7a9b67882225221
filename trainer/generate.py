"""`python -m trainer.generate`: a quick look at what a model has learnt, one text at a time.

`holdfast generate` starts it. Keys and values of the tokens so far are kept, so that each further
token costs one pass through the model for itself alone.

Letters in array names: L tokens of this pass, S tokens so far, D model width, H query heads,
K key-value heads, E head width, V vocabulary.
"""

from __future__ import annotations

import argparse
import codecs
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.worker import MisconfiguredError
from trainer.model import Attention, Block, Llama, rope_table, rotate
from trainer.parallel import device_of
from trainer.tokenizer import Tokenizer, open_tokenizer
from trainer.weights import run
from trainer.weights.convert import TYPES
from trainer.weights.sources import open_weights
from trainer.weights.stored import Weights

TOKENS_MAX = 131_072
"""Of prompt and answer together: as far as any Llama 3 was trained."""


class Sampling(NamedTuple):
    """How the next token is chosen.

    Attributes:
        temperature: 0 for the most likely one; 1 as the model has it; more is more even.
        top_p: only the most likely tokens that have this share of the probability between them.
        seed: of chance.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Decoder:
    """A model that has read some tokens, and reads more."""

    def __init__(self, model: Llama, length: int) -> None:
        """Make room for `length` tokens."""
        self._model, self._done = model, 0
        config = model.config
        head = model.head.weight
        cos, sin = rope_table(length, config.head_dim, config.rope_theta, config.rope_scaling)
        self._cos_SE, self._sin_SE = cos.to(head.device), sin.to(head.device)
        shape = (config.layers, 2, 1, config.kv_heads, length, config.head_dim)
        self._kept = torch.zeros(shape, dtype=head.dtype, device=head.device)

    @torch.no_grad()
    def read(self, tokens_L: Tensor) -> Tensor:
        """Return the logits of the token that follows these, float32, shape [V].

        Raises:
            ValueError: if there is no room for them.
        """
        first, end = self._done, self._done + len(tokens_L)
        if end > self._kept.shape[-2]:
            raise ValueError(f"{end} tokens, room is for {self._kept.shape[-2]}")
        rope = self._cos_SE[first:end], self._sin_SE[first:end]
        x_BLD = self._model.embedding(tokens_L[None])
        for layer, kept in zip(self._model.layers, self._kept, strict=True):
            assert isinstance(layer, Block)
            mixed = _attend(layer.attention, layer.attention_norm(x_BLD), rope, kept, first)
            x_BLD = x_BLD + mixed
            x_BLD = x_BLD + layer.ffn(layer.ffn_norm(x_BLD))
        self._done = end
        logits_V: Tensor = self._model.head(self._model.norm(x_BLD[:, -1]))[0]
        return logits_V.float()


def _attend(
    attention: Attention, x_BLD: Tensor, rope: tuple[Tensor, Tensor], kept: Tensor, first: int
) -> Tensor:
    """Return the mixed vectors, and add keys and values of these tokens to the kept ones."""
    heads = (attention.heads, attention.head_dim), (attention.kv_heads, attention.head_dim)
    q = rotate(attention.wq(x_BLD).reshape(*x_BLD.shape[:-1], *heads[0]), *rope).transpose(1, 2)
    k = rotate(attention.wk(x_BLD).reshape(*x_BLD.shape[:-1], *heads[1]), *rope).transpose(1, 2)
    v = attention.wv(x_BLD).reshape(*x_BLD.shape[:-1], *heads[1]).transpose(1, 2)
    end = first + x_BLD.shape[1]
    kept[0, :, :, first:end], kept[1, :, :, first:end] = k, v
    mask = None
    if first and end - first > 1:
        at = torch.arange(end, device=x_BLD.device)
        mask = at[None, :] <= at[first:, None]
    keys, values = kept[0, :, :, :end], kept[1, :, :, :end]
    mixed = F.scaled_dot_product_attention(
        q, keys, values, attn_mask=mask, is_causal=not first, enable_gqa=True
    )
    return attention.wo(mixed.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


def continued(
    model: Llama, tokens: list[int], count: int, sampling: Sampling, until: int | None = None
) -> Iterator[int]:
    """Yield the tokens that follow, as many as asked for or up to `until`, that one left out."""
    decoder = Decoder(model, len(tokens) + count)
    chance = torch.Generator().manual_seed(sampling.seed)
    device = model.head.weight.device
    for _ in range(count):
        logits_V = decoder.read(torch.tensor(tokens, device=device))
        token = chosen(logits_V.cpu(), sampling, chance)
        if token == until:
            return
        yield token
        tokens = [token]


def chosen(logits_V: Tensor, sampling: Sampling, chance: torch.Generator) -> int:
    """Return the next token; of equally likely ones, the first."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # Below the greatest, so that a temperature near 0 leaves that one and makes no infinity of it.
    below_V = logits_V.double() - logits_V.max()
    likely_V, order_V = (
        (below_V / sampling.temperature).softmax(0).sort(descending=True, stable=True)
    )
    before_V = likely_V.cumsum(0) - likely_V
    likely_V = likely_V.where(before_V < sampling.top_p, 0.0)
    return int(order_V[torch.multinomial(likely_V, 1, generator=chance)])


def load(weights: Weights, device: torch.device, dtype: torch.dtype) -> Llama:
    """Return a model with these weights: no more of it is in memory at any time."""
    with torch.device("meta"):
        model = Llama(weights.config).to(dtype)
    model.to_empty(device=device)
    weights.fill((name, weight, weight.data) for name, weight in model.named_parameters())
    return model.eval()


def tokenizer_of(source: str, address: str | None, vocab: int) -> Tokenizer:
    """Return the tokenizer that belongs to weights, or the one at an address.

    Raises:
        MisconfiguredError: if none is known, or it has tokens that the model does not have.
    """
    if address is not None:
        try:
            tokenizer = open_tokenizer(address, vocab)
            tokenizer.encode(" ")  # what is wrong with a line of it comes out by using it
        except MisconfiguredError as error:
            # Said of the run file, which nobody has written here.
            message = str(error).replace("spec.trainer.tokenizer", "--tokenizer", 1)
            hint = "name the file that belongs to the weights; in releases it is tokenizer.model"
            raise MisconfiguredError(message, hint=hint) from error
        return tokenizer
    if (found := run.find(source)) is not None:
        return open_tokenizer(run.read(found).spec.trainer.tokenizer, vocab)
    for place in ("tokenizer.model", "original/tokenizer.model"):
        if (path := Path(source, place)).is_file():
            return open_tokenizer(str(path), vocab)
    raise MisconfiguredError(
        f"no tokenizer.model beside the weights: {source}",
        hint="name the file with --tokenizer; it is part of Meta's release",
    )


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; return the exit code."""
    asked = _parser().parse_args(arguments)
    try:
        _generate(asked, _say)
    except MisconfiguredError as error:
        print(f"{error}\nhint: {error.hint}", file=sys.stderr)  # noqa: T201 - it is a program
        return 2
    return 0


def _generate(asked: argparse.Namespace, say: Callable[[str], None]) -> None:
    weights = open_weights(asked.source)
    tokenizer = tokenizer_of(asked.source, asked.tokenizer, weights.config.vocab)
    # A command line may hold bytes that are no text.
    asked_for = asked.prompt.encode("utf-8", "surrogateescape")
    prompt = [tokenizer.bos, *map(int, tokenizer.encode_bytes(asked_for))]
    if len(prompt) + asked.tokens > TOKENS_MAX:
        raise MisconfiguredError(
            f"{len(prompt)} tokens of prompt and {asked.tokens} more, expected at most "
            f"{TOKENS_MAX} together",
            hint="a shorter prompt, or fewer --tokens",
        )
    model = load(weights, device_of(asked.device, 0), TYPES[asked.dtype])
    sampling = Sampling(asked.temperature, asked.top_p, asked.seed)
    say(asked.prompt)
    # A character may be cut between tokens.
    text = codecs.getincrementaldecoder("utf-8")("replace")
    for token in continued(model, prompt, asked.tokens, sampling, until=tokenizer.eos):
        say(text.decode(tokenizer.decode_bytes(np.array([token], np.uint32))))
    say(text.decode(b"", final=True) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="holdfast generate", description=__doc__)
    parser.add_argument("source", help="weights, as `holdfast weights show` takes them")
    parser.add_argument("prompt", nargs="?", default="", help="the text to continue")
    parser.add_argument("--tokens", type=_number(1, TOKENS_MAX, int), default=100)
    parser.add_argument("--temperature", type=_number(0.0, 100.0, float), default=0.0)
    parser.add_argument("--top-p", type=_number(1e-6, 1.0, float), default=1.0)
    parser.add_argument("--seed", type=_number(0, (1 << 63) - 1, int), default=0)
    parser.add_argument("--tokenizer", help="file in tiktoken format; default the weights' own")
    parser.add_argument("--dtype", choices=sorted(TYPES), default="float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


def _number(least: float, most: float, kind: Callable[[str], float]) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text}, expected {least} to {most}")
        return value

    return number


def _say(text: str) -> None:
    # What a model says is shown on a terminal, which must not take it for commands.
    safe = "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    print(safe, end="", flush=True)  # noqa: T201 - it is what this program is for


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
