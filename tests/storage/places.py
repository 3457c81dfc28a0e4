"""The two places a store can be, looked at and tampered with past our own code."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from storage.location import open_store
from storage.s3_client import S3Options
from storage.store import Store

BUCKET = "fpo-tests"


class Place(Protocol):
    """A place with a store in it."""

    url: str

    def open(self) -> Store:
        """Open the store anew, as another process would."""
        ...

    def read(self, key: str) -> bytes:
        """An object's bytes."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Write an object, or over it."""
        ...

    def remove(self, key: str) -> None:
        """Remove an object."""
        ...

    def keys(self, prefix: str = "") -> list[str]:
        """All keys below a prefix; locks, leases and scratch left out."""
        ...


class LocalPlace:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = str(folder)

    def open(self) -> Store:
        return open_store(self.url)

    def read(self, key: str) -> bytes:
        return (self.folder / key).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        (self.folder / key).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / key).write_bytes(data)

    def remove(self, key: str) -> None:
        (self.folder / key).unlink()

    def keys(self, prefix: str = "") -> list[str]:
        every = (p for p in self.folder.rglob("*") if p.is_file() and p.name != ".lock")
        return _objects((p.relative_to(self.folder).as_posix() for p in every), prefix)


class S3Place:
    def __init__(self, seaweed, prefix: str, options: S3Options) -> None:
        self.url, self.options = f"s3://{BUCKET}/{prefix}", options
        self._prefix, self._client = prefix, seaweed.client()

    def open(self) -> Store:
        return open_store(self.url, options=self.options)

    def read(self, key: str) -> bytes:
        return self._client.get_object(Bucket=BUCKET, Key=self._full(key))["Body"].read()

    def write(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=self._full(key), Body=data)

    def remove(self, key: str) -> None:
        self._client.delete_object(Bucket=BUCKET, Key=self._full(key))

    def keys(self, prefix: str = "") -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=BUCKET, Prefix=f"{self._prefix}/"
        )
        every = (item["Key"] for page in pages for item in page.get("Contents", ()))
        return _objects((key.removeprefix(f"{self._prefix}/") for key in every), prefix)

    def _full(self, key: str) -> str:
        return f"{self._prefix}/{key}"


def _objects(keys: Iterator[str], prefix: str) -> list[str]:
    ours = ("scratch/", "locks/", "leases/")
    return sorted(key for key in keys if key.startswith(prefix) and not key.startswith(ours))


def credentials(seaweed) -> dict[str, str]:
    """The environment of a process that may use the object store."""
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("AWS_")},
        "AWS_ACCESS_KEY_ID": seaweed.access_key,
        "AWS_SECRET_ACCESS_KEY": seaweed.secret_key,
        "AWS_ENDPOINT_URL": seaweed.endpoint,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
