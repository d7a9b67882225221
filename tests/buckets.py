"""Buckets of a real S3 server, which the tests start; and of any other one, if one is named."""

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import pytest
import s3fs

from storage.address import open_store
from storage.blob import BlobStore
from storage.remote import S3Store

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test-access",
    "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
ANOTHER = "HOLDFAST_TEST_S3"
"""Variable with the address of a bucket, s3://bucket/prefix?endpoint=..., for the contract."""


class Server:
    """An S3 server of the tests.

    Attributes:
        endpoint: where it listens.
    """

    def __init__(self, process: "subprocess.Popen[str]", endpoint: str) -> None:
        self.process, self.endpoint = process, endpoint

    @cached_property
    def client(self) -> Any:
        """A client of its own kind, for what a store does not do."""
        return s3fs.S3FileSystem(
            endpoint_url=self.endpoint, use_listings_cache=False, skip_instance_cache=True
        )

    def bucket(self) -> str:
        """Make a bucket; return its name."""
        name = f"b{secrets.token_hex(8)}"
        self.client.call_s3("create_bucket", Bucket=name)
        return name

    def uri(self, bucket: str, prefix: str = "run", **options: object) -> str:
        """Return the address of a bucket."""
        options = {"endpoint": self.endpoint, **options}
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"s3://{bucket}/{prefix}?{query}"

    @cached_property
    def _opened(self) -> S3Store:
        store = open_store(self.uri(self.bucket()))
        assert isinstance(store, S3Store)
        return store

    def store(self, part_bytes: int = 5 << 20) -> S3Store:
        """Return an empty store; all have one client, since making one takes long."""
        one = self._opened
        return S3Store(one._filesystem, one._bucket, secrets.token_hex(8), part_bytes=part_bytes)

    def be(self, mood: str) -> None:
        """Be as `tests.programs.s3` says that it can be, from now on: to all tests."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{mood}\n")
        self.process.stdin.flush()
        self.process.stdout.readline()

    def drop(self, bucket: str) -> None:
        """Have a bucket vanish, with all that is in it."""
        for path in self.client.find(bucket):
            self.client.rm_file(path)
        self.client.call_s3("delete_bucket", Bucket=bucket)

    def close(self) -> None:
        """End it, and wait until it has ended."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)


def serve() -> Iterator[Server]:
    """Start a server; it is gone afterwards. The credentials that it takes are in the environment.

    It takes any, as long as there are some.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.programs.s3"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        server = Server(process, f"http://127.0.0.1:{int(process.stdout.readline())}")
        try:
            yield server
        finally:
            server.close()
            process.stdout.close()


def another() -> BlobStore:
    """Return a store under a new prefix of the bucket that the environment names."""
    address, question, query = os.environ[ANOTHER].partition("?")
    return open_store(f"{address.rstrip('/')}/{secrets.token_hex(8)}{question}{query}")
