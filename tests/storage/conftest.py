"""Every test that asks for ``place``, ``backend`` or ``store`` runs on a folder and on S3."""

import uuid

import pytest

from storage.s3_client import S3Options
from tests.storage.places import LocalPlace, S3Place, credentials


@pytest.fixture
def s3_environment(seaweed, tmp_path, monkeypatch):
    """Credentials of the object store, a read cache of the test's own."""
    for name, value in credentials(seaweed).items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("FPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def s3_place(seaweed, s3_environment):
    """A store in a real bucket, under a prefix of the test's own."""
    return S3Place(seaweed, f"test-{uuid.uuid4().hex[:12]}", S3Options(endpoint=seaweed.endpoint))


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path):
    """A place for a store: a folder, and a bucket of SeaweedFS."""
    if request.param == "s3":
        return request.getfixturevalue("s3_place")
    return LocalPlace(tmp_path / "store")


@pytest.fixture
def store(place):
    """The place's store."""
    return place.open()


@pytest.fixture
def backend(store):
    """The store's backend."""
    return store.backend
