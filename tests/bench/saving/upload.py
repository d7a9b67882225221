"""Uploads a shard to an S3 server, beside DCP's FsspecWriter, and what the server takes at all."""

from __future__ import annotations

import http.client
import os
import re
import secrets
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import quote, urlsplit

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

from storage.address import open_store
from storage.commit import write_shard
from storage.digest import Buffer
from storage.parts import CHECKSUM
from storage.shard import Chunk, ShardIndex, ShardMeta, plan, seal
from tests.bench.saving.others import State
from tests.bench.saving.ours import make_state
from tests.buckets import CREDENTIALS, Server, serve

PART_BYTES = 32 << 20
AT_ONCE = 8
TENSORS = 4


def measure(size: int, rounds: int) -> dict[str, float]:
    """Return the seconds of each, those of them that the server was busy, and their ratios.

    Medians over rounds in turn. The server is one process of Python and so has one core at most:
    nobody's upload takes less than what it makes the server do.
    """
    state = make_state(size, TENSORS)
    shard = _staged(state)
    sides: dict[str, list[float]] = {}
    for server in serve():
        bucket = server.bucket()
        store = open_store(server.uri(bucket))
        ways: dict[str, Callable[[], object]] = {
            "upload_ours": partial(write_shard, store, *shard),
            "upload_dcp": partial(_dcp, state, server, bucket),
            "upload_server": partial(_flood, server, bucket, shard[1]),
            "upload_server_parts": partial(_flood_parts, server, bucket, shard[1]),
        }
        for turn in range(rounds + 1):
            for name, way in ways.items():
                busy, begun = _core_s(server), time.perf_counter()
                way()
                took = time.perf_counter() - begun
                # The first of each pays for connections, and for the server's own first imports.
                if turn:
                    sides.setdefault(f"{name}_s", []).append(took)
                    sides.setdefault(f"{name}_busy_s", []).append(_core_s(server) - busy)
                server.client.rm(f"{bucket}/*", recursive=True)
    found = {name: statistics.median(seconds) for name, seconds in sides.items()}
    # The kernel counts in ticks: of little to upload, the server was busy for less than one.
    ours_busy_s = max(found["upload_ours_busy_s"], 1 / os.sysconf("SC_CLK_TCK"))
    return found | {
        "upload_dcp_over_ours": found["upload_dcp_s"] / found["upload_ours_s"],
        "upload_dcp_over_server_busy": found["upload_dcp_s"] / ours_busy_s,
        "upload_ours_over_server": found["upload_server_s"] / found["upload_ours_s"],
        "upload_ours_over_server_parts": found["upload_server_parts_s"] / found["upload_ours_s"],
        "upload_dcp_over_server_parts": found["upload_dcp_s"] / found["upload_server_parts_s"],
    }


def _core_s(server: Server) -> float:
    """Return the seconds that the server has used a core."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _staged(state: State) -> tuple[ShardIndex, bytearray]:
    shape = {name: tuple(tensor.shape) for name, tensor in state.items()}
    layout = plan(
        Chunk(
            fqn=name.partition(".")[2],
            state=name.partition(".")[0],
            dtype="F32",
            shape=at,
            global_shape=at,
            offset=(0,) * len(at),
        )
        for name, at in shape.items()
    )
    body = bytearray(layout.size)
    for view in layout.views(body).values():
        view[:] = os.urandom(len(view))
    meta = ShardMeta(run_id="bench", model="m", step=1, epoch=1, shard=0, shards=1)
    return seal(layout, body, meta), body


def _dcp(state: State, server: Server, bucket: str) -> None:
    writer = FsspecWriter(
        f"s3://{bucket}/{secrets.token_hex(4)}",
        client_kwargs={"endpoint_url": server.endpoint},
        key=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        secret=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
    )
    dcp.save(state, storage_writer=writer, no_dist=True)


def _flood(server: Server, bucket: str, body: bytearray) -> None:
    """Put the same bytes as objects of a part's size, with nothing to sign, hash or copy."""
    for piece in _sent(server, f"/{bucket}/{secrets.token_hex(8)}", body, "{path}-{number}"):
        assert piece


def _flood_parts(server: Server, bucket: str, body: bytearray) -> None:
    """Put them as parts of one object, in the cheapest way that there is for a client.

    Nobody who uploads in parts can take less: there is nothing to sign, sum, hash or copy, no part
    is looked at before it is sent, and there is not even a mark that says whose object it is.
    """
    path = f"/{bucket}/{secrets.token_hex(8)}"
    # Else this server sums all of it by an algorithm of its own choice once it is complete.
    begun = _ask(server, "POST", f"{path}?uploads", sums=CHECKSUM).decode()
    (upload,) = re.findall("<UploadId>(.+)</UploadId>", begun)
    tags = _sent(server, path, body, f"{{path}}?partNumber={{number}}&uploadId={quote(upload)}")
    parts = "".join(
        f"<Part><PartNumber>{number}</PartNumber><ETag>{tag}</ETag></Part>"
        for number, tag in enumerate(tags, 1)
    )
    whole = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()
    _ask(server, "POST", f"{path}?uploadId={quote(upload)}", whole)


def _sent(server: Server, path: str, body: bytearray, name: str) -> list[str]:
    """Put pieces of a part's size, several at a time; return what the server calls each."""
    view, tags = memoryview(body), {}

    def put(start: int) -> None:
        number = start // PART_BYTES + 1
        to = name.format(path=path, number=number)
        piece = view[start : start + PART_BYTES]
        tags[number] = _ask(server, "PUT", to, piece, header="ETag").decode()

    with ThreadPoolExecutor(AT_ONCE) as threads:
        list(threads.map(put, range(0, len(view), PART_BYTES)))
    return [tags[number] for number in sorted(tags)]


def _ask(
    server: Server,
    method: str,
    path: str,
    body: Buffer | None = None,
    *,
    header: str = "",
    sums: str = "",
) -> bytes:
    """Make a request on a connection of its own; return the answer, or one of its headers."""
    where = urlsplit(server.endpoint)
    connection = http.client.HTTPConnection(where.hostname or "", where.port)
    try:
        headers = {"x-amz-checksum-algorithm": sums} if sums else {}
        connection.request(method, path, body=body, headers=headers)
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == http.HTTPStatus.OK, (answer.status, content)
        return (answer.getheader(header) or "").encode() if header else content
    finally:
        connection.close()
