"""What an address opens, and what is refused before anything is touched."""

import base64
import re
from pathlib import Path

import pytest

from storage.address import open_store
from storage.encrypted import EncryptedStore
from storage.errors import UnsupportedUriError
from storage.local import LocalStore
from storage.remote import S3Store


@pytest.mark.parametrize("name", ["run", "me@home"])
def test_addresses_of_folders_open_the_local_store(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    for address in (str(folder), f"file://{folder}", f"file://localhost{folder}"):
        store = open_store(address)
        assert isinstance(store, LocalStore)
        assert store.root == folder


@pytest.mark.parametrize("address", ["gs://bucket/run", "file://other-host/run", "http://x"])
def test_an_address_of_another_kind_is_refused_and_says_what_is_supported(address: str) -> None:
    with pytest.raises(UnsupportedUriError, match="supported are a folder"):
        open_store(address)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("file:/mnt/x", "expected file:///mnt/x;"),
        ("FILE:/mnt/x", "expected file:///mnt/x;"),
        ("file:x", "expected /folder or file:///folder;"),
        ("s3:bucket/run", "expected s3://bucket/prefix;"),
        ("~/x", "expected the home folder written out"),
        ("~somebody/x", "expected the home folder written out"),
    ],
)
def test_an_address_that_would_become_a_folder_of_an_odd_name_is_refused_with_what_to_write(
    address: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(UnsupportedUriError, match=re.escape(says)):
        open_store(address)

    store = open_store(f"./{address}")
    assert isinstance(store, LocalStore)
    assert store.root == Path(address)


def test_an_address_of_a_bucket_opens_the_store_of_objects() -> None:
    for address in ("s3://bucket", "s3://bucket/a/run", "s3://my.bucket-1/run/?part=8&region=x"):
        assert isinstance(open_store(address), S3Store)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("s3://bucket/run?retries=3", "option 'retries' is unknown, expected one of endpoint"),
        ("file:///run?part=8", "option 'part' is unknown, expected one of encrypt"),
        ("s3://bucket/run?part=8&part=9", "given twice"),
        ("s3://bucket/run?part=4", "part is '4', expected a whole number from 5 to 5120"),
        ("s3://bucket/run?connections=many", "connections is 'many'"),
        ("s3://bucket/run?checksum=never", "expected when_supported or when_required"),
        ("s3://bucket/run?endpoint=localhost:9000", "endpoint must be http://host:port"),
        ("s3://bucket/run#1", "has a #"),
        ("s3://B/run", "no bucket has the name 'B'"),
        ("s3:///run", "no bucket has the name ''"),
        ("s3://bucket/../run", "prefix can not be used"),
        ("s3://bucket/a run", "prefix can not be used"),
    ],
)
def test_an_address_of_a_bucket_with_a_mistake_is_refused_and_says_which(
    address: str, says: str
) -> None:
    with pytest.raises(UnsupportedUriError, match=re.escape(says)):
        open_store(address)


@pytest.mark.parametrize(
    "address",
    [
        "s3://me:hunter2@bucket/run",
        "s3:me:hunter2@bucket/run",
        "S3:/me:hunter2@bucket/run",
        "me:hunter2@bucket/run",
        # Keys have slashes in them.
        "s3://me:hunter2/hunter2/hunter2@bucket/run",
        "s3://me:hunter2#hunter2@bucket/run",
        "gs://me:hunter2/hunter2@bucket/run",
        "file://hunter2@/run",
        "s3://bucket/run?secret=hunter2",
        "s3://bucket/run?endpoint=http://me:hunter2@host",
        "s3://bucket/run?key=hunter2#hunter2",
    ],
)
def test_a_secret_in_an_address_is_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(UnsupportedUriError) as refused:
        open_store(address)

    assert "hunter2" not in str(refused.value)


def test_a_key_from_the_environment_encrypts_what_is_stored(tmp_path: Path) -> None:
    environment = {"KEY": base64.b64encode(bytes(32)).decode()}

    store = open_store(f"file://{tmp_path}?encrypt=KEY", environment)
    store.put("k", b"plain words")

    assert isinstance(store, EncryptedStore)
    assert store.get("k") == b"plain words"
    assert b"plain" not in (tmp_path / "k").read_bytes()


@pytest.mark.parametrize("value", [None, "", "c2hvcnQ=", "not base64 at all", "A" * 43])
def test_a_key_that_is_none_is_refused_and_not_repeated(value: str | None, tmp_path: Path) -> None:
    environment = {} if value is None else {"KEY": value}

    with pytest.raises(UnsupportedUriError, match="KEY") as refused:
        open_store(f"file://{tmp_path}?encrypt=KEY", environment)

    assert not value or value not in str(refused.value)
    assert "environment" in refused.value.hint
