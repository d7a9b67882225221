"""Sources in an object store, against a server that speaks S3."""

from collections.abc import Iterator

import fsspec
import pytest
import s3fs
from moto import server as moto

from orchestrator.worker import MisconfiguredError
from tests import texts
from trainer import retrying
from trainer.retrying import SourceUnavailableError
from trainer.text import Text

DOCUMENTS = texts.documents(50)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    for name, value in (
        ("AWS_ENDPOINT_URL", address),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 0.01)
    s3fs.S3FileSystem.clear_instance_cache()
    files = fsspec.filesystem("s3")
    files.makedirs("texts", exist_ok=True)
    yield files
    s3fs.S3FileSystem.clear_instance_cache()


def put(files: fsspec.AbstractFileSystem, name: str, documents: list[str]) -> None:
    with files.open(f"texts/{name}", "wb") as file:
        file.write("".join(f'{{"text": "{text}"}}\n' for text in documents).encode())


def test_a_folder_of_an_object_store_is_read_and_a_changed_object_is_noticed(
    bucket: fsspec.AbstractFileSystem,
) -> None:
    put(bucket, "day/b.jsonl", DOCUMENTS[30:])
    put(bucket, "day/a.jsonl", DOCUMENTS[:30])
    text = Text("s3://texts/day")

    assert list(text.documents()) == DOCUMENTS
    assert text.bytes == bucket.du("texts/day")

    put(bucket, "day/a.jsonl", DOCUMENTS[:29])
    assert Text("s3://texts/day").fingerprint != text.fingerprint
    with pytest.raises(MisconfiguredError, match=r"changed while it was read.*texts/day/a\.jsonl"):
        list(text.documents())


@pytest.mark.usefixtures("bucket")
def test_a_bucket_that_is_not_there_is_refused() -> None:
    with pytest.raises(MisconfiguredError, match="nothing there"):
        Text("s3://other/day")


@pytest.mark.usefixtures("bucket")
def test_a_store_that_is_away_is_given_up_after_a_few_attempts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()

    with pytest.raises(SourceUnavailableError, match=r"no answer in 6 attempts.*texts/day"):
        Text("s3://texts/day")
