"""Whatever a rank or an agent sends is a message, or is refused as none."""

from collections.abc import Callable

import pytest

from orchestrator.protocol.rank import ProtocolError, read_from_rank, read_to_rank


@pytest.mark.parametrize("read", [read_from_rank, read_to_rank])
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"{}", b'{"type": "Died", "reason": "\xff"}', b'{"type": "\xff"}', b"[" * 100_000],
)
def test_what_is_no_message_is_refused_as_none(
    read: Callable[[bytes], object], body: bytes
) -> None:
    with pytest.raises(ProtocolError):
        read(body)
