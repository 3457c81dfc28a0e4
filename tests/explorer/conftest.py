"""A finished run's store to look at, with an index folder of its own."""

import shutil

import pytest


@pytest.fixture(scope="session")
def browsed(finished_run, tmp_path_factory):
    """A store with a feature cache; labels may be written into it."""
    folder = tmp_path_factory.mktemp("browsed")
    shutil.copytree(finished_run.store, folder / "store")
    return folder / "store"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "explorer-cache"
    monkeypatch.setenv("FPO_CACHE", str(folder))
