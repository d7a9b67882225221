"""A source that is away stops nobody who has its tokens."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from orchestrator.protocol import runfile
from tests import texts
from tests.serving import Server
from trainer import retrying
from trainer.data import open_data
from trainer.retrying import SourceUnavailableError
from trainer.tokenizer import open_tokenizer
from trainer.tokens import Tokens

TOKENIZER = open_tokenizer(None, 1280)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 0.01)
    server = Server()
    for name, seed in (("a", 1), ("b", 2)):
        lines = [b'{"text": "%s"}\n' % text.encode() for text in texts.documents(30, seed=seed)]
        server.files[f"/{name}.jsonl"] = b"".join(lines)
    yield server
    server.close()


def opened(server: Server, cache: Path, name: str = "a", **settings: object) -> Tokens:
    source = runfile.DataSource(uri=server.address(f"/{name}.jsonl"))
    data = runfile.Data(sources=(source,), **settings)  # type: ignore[arg-type]
    (tokens,) = open_data(data, TOKENIZER, str(cache), lambda: None)
    return tokens


def test_a_node_that_has_the_tokens_goes_on_with_them_and_says_so(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = opened(server, tmp_path, validation=0.1)
    server.answer_always = 503

    after = opened(server, tmp_path, validation=0.1)

    assert np.array_equal(after.ids[0:], before.ids[0:])
    assert np.array_equal(after.held[0:], before.held[0:])
    assert (after.digest, after.name, after.account) == (before.digest, before.name, before.account)
    told = capfd.readouterr().err
    assert "data: going on with the tokens that this node has: " in told
    assert "a.jsonl" in told
    assert "attempt 1 of 2" in told


@pytest.mark.parametrize(
    "changes", [{"name": "b"}, {"validation": 0.2}, {"on_bad_record": "skip"}, {"cache": "other"}]
)
def test_tokens_of_something_else_are_not_taken_for_those_of_a_source_that_is_away(
    server: Server, tmp_path: Path, changes: dict[str, object]
) -> None:
    opened(server, tmp_path)
    server.answer_always = 503
    cache = tmp_path / str(changes.pop("cache", ""))

    with pytest.raises(SourceUnavailableError, match="no answer in 6 attempts"):
        opened(server, cache, **changes)  # type: ignore[arg-type]


def test_what_is_remembered_is_the_newest_and_is_nothing_without_its_file(
    server: Server, tmp_path: Path
) -> None:
    first = opened(server, tmp_path)
    server.files["/a.jsonl"] += b'{"text": "one more"}\n'
    second = opened(server, tmp_path)
    server.answer_always = 503

    assert opened(server, tmp_path).digest == second.digest != first.digest
    for path in tmp_path.glob("tokens-" + "?" * 32):
        path.unlink()
    with pytest.raises(SourceUnavailableError):
        opened(server, tmp_path)
