"""What a model says is what its logits say, token by token."""

import base64
from importlib import resources
from pathlib import Path

import msgspec
import pytest
import torch

from tests.weights import STRETCHED, TINY, model_of, run_folder, written
from trainer.generate import Decoder, Sampling, chosen, continued, main
from trainer.model import Llama

torch.set_num_threads(1)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
SMALL = msgspec.structs.replace(TINY, vocab=1280)


def plainly(model: Llama, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0]


@pytest.mark.parametrize("parts", [[8], [1] * 8, [3, 1, 4], [2, 6]])
def test_reading_in_parts_gives_the_logits_of_reading_at_once(parts: list[int]) -> None:
    model = model_of(STRETCHED)
    expected = plainly(model, PROMPT)
    decoder = Decoder(model, 8)

    at = 0
    for part in parts:
        logits = decoder.read(torch.tensor(PROMPT[at : at + part]))
        at += part
        torch.testing.assert_close(logits, expected[at - 1], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="9 tokens, room is for 8"):
        decoder.read(torch.tensor([0]))


def test_without_temperature_the_most_likely_token_follows() -> None:
    model = model_of()

    said = list(continued(model, PROMPT, 5, Sampling()))

    tokens = list(PROMPT)
    for _ in range(5):
        tokens.append(int(plainly(model, tokens)[-1].argmax()))
    assert said == tokens[8:]
    until = list(continued(model, PROMPT, 5, Sampling(), until=said[2]))
    assert until == said[: said.index(said[2])]


def test_chance_is_the_seed_s() -> None:
    model = model_of()

    one, same, other = (
        list(continued(model, PROMPT, 12, Sampling(1.0, 0.9, seed))) for seed in (1, 1, 2)
    )

    assert one == same != other


def test_tokens_are_drawn_as_often_as_they_are_likely_and_only_the_likeliest() -> None:
    logits = torch.tensor([0.1, 0.5, 0.0, 0.2, 0.2]).log()
    chance = torch.Generator().manual_seed(0)

    def often(temperature: float, top_p: float) -> list[float]:
        drawn = [chosen(logits, Sampling(temperature, top_p), chance) for _ in range(1000)]
        return [drawn.count(token) / 1000 for token in range(5)]

    assert often(1.0, 1.0) == pytest.approx([0.1, 0.5, 0.0, 0.2, 0.2], abs=0.05)
    assert often(1.0, 0.5) == [0, 1, 0, 0, 0]
    assert often(1.0, 0.6) == pytest.approx([0, 5 / 7, 0, 2 / 7, 0], abs=0.05)
    assert often(0.5, 1.0) == pytest.approx([1 / 34, 25 / 34, 0, 4 / 34, 4 / 34], abs=0.05)
    assert often(0.01, 1.0) == [0, 1, 0, 0, 0]


def test_the_command_continues_a_text_with_a_run_s_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(run_folder(tmp_path / "run", model_of(SMALL)))
    said = []

    for more in ([], [], ["--temperature", "1", "--seed", "3"]):
        assert main([folder, "def f(", "--tokens", "9", *more]) == 0
        said.append(capsys.readouterr().out)

    assert said[0] == said[1] != said[2]
    assert all(text.startswith("def f(") and text.endswith("\n") for text in said)
    assert len(said[0]) > len("def f(\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{here}/nowhere"], "no such folder"),
        (["{here}/hf"], "no tokenizer.model beside the weights"),
        (["{here}/hf", "--tokenizer", "{here}/x"], "--tokenizer is '{here}/x', expected a file in"),
        (
            ["{here}/hf", "--tokenizer", "{here}/large"],
            "--tokenizer has 1300 ids, the model's vocabulary 1280",
        ),
        (["{here}/hf", "--tokenizer", "{here}/torn"], "--tokenizer: line 1024 is b'"),
        (["{here}/hf", "a b " * 70_000, "--tokenizer", "{here}/fits"], "at most 131072 together"),
    ],
)
def test_what_can_not_be_continued_is_refused_with_code_2(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "hf", config=SMALL)
    fits = (resources.files("trainer.assets") / "small.tiktoken").read_bytes()
    (tmp_path / "fits").write_bytes(fits)
    more = [b"%s %d\n" % (base64.b64encode(b"\0%d" % n), 1024 + n) for n in range(20)]
    (tmp_path / "torn").write_bytes(fits[:-9])
    (tmp_path / "large").write_bytes(fits + b"".join(more))

    assert main([argument.format(here=tmp_path) for argument in arguments]) == 2

    message, hint = capsys.readouterr().err.splitlines()
    assert says.format(here=tmp_path) in message
    assert hint.startswith("hint: ")


def test_a_temperature_next_to_nothing_leaves_the_most_likely_token() -> None:
    logits = torch.tensor([1.0, 3.0, -2.0])

    assert chosen(logits, Sampling(temperature=1e-308), torch.Generator().manual_seed(0)) == 1
