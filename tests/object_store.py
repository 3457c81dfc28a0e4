"""A real object store for tests: import the fixture into a folder's ``conftest.py``."""

from collections.abc import Iterator

import pytest

from benchmarks.faults.seaweed import SeaweedFS

BUCKET = "fpo-tests"


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory) -> Iterator[SeaweedFS]:
    """A running server with an empty bucket; without its program, tests that ask for it fail."""
    with SeaweedFS(tmp_path_factory.mktemp("seaweed") / "data") as server:
        server.create_bucket(BUCKET)
        yield server
