"""Errors between agents: each arrives as what it was."""

import msgspec
import pytest

from orchestrator.agent import frames
from orchestrator.agent.shards import ERRORS, KeeperError


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_crosses_as_itself_and_cut_to_a_frame(kind: type[KeeperError]) -> None:
    sent = frames.frame(frames.failed(kind("why: " + "ä" * 10_000)))
    assert frames.length_of(sent[:4]) == len(sent) - 4
    with pytest.raises(kind, match=r"^node-1: why: ä{900,1000}$") as caught:
        frames.heard(sent[4:], "node-1", (frames.Done,))
    assert type(caught.value) is kind
    assert set(KeeperError.__subclasses__()) >= set(ERRORS)


def test_an_error_of_no_known_class_is_an_error_all_the_same() -> None:
    body = msgspec.msgpack.encode({"type": "Failed", "kind": "SystemExit", "reason": "why"})
    with pytest.raises(KeeperError, match="node-1: why"):
        frames.heard(body, "node-1", (frames.Done,))
