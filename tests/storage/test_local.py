"""The folder backend's own: permissions, a full disk, what a crash leaves behind."""

import os
import tempfile
import time
from pathlib import Path

import pytest

from storage.errors import StoreUnwritable
from storage.local import LocalBackend


@pytest.fixture
def backend(tmp_path):
    return LocalBackend(tmp_path / "store")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    backend = LocalBackend(tmp_path / "file" / "store")
    with pytest.raises(StoreUnwritable, match=r"file/store' cannot be written.*FPO_STORE"):
        backend.put("k", b"")


def test_a_folder_without_permission_is_named():
    """As root, who may write everywhere, under the rights of nobody."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o555)
        me = os.geteuid()
        if me == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(StoreUnwritable, match=r"cannot be written \(Permission denied\)"):
                LocalBackend(folder).put("k", b"")
        finally:
            os.seteuid(me)
        assert list(folder.iterdir()) == []


def test_a_full_disk_is_said_as_such(small_disk):
    """A real one, of 2 MB."""
    backend = LocalBackend(small_disk / "store")
    backend.put("before", b"kept")
    with pytest.raises(StoreUnwritable, match="no space left for the store"):
        backend.put("big", bytes(4 << 20))
    assert [entry.key for entry in backend.list("")] == ["before"]
    # The temporary file is gone too, so what fits still fits.
    backend.put("after", bytes(1 << 20))


def test_sweep_removes_old_temporary_files_only(backend):
    backend.put("a/kept", b"")
    left = backend.root / "a" / ".tmp-left"
    left.write_bytes(b"half")
    assert backend.sweep("a/", 3600) == 0
    os.utime(left, (time.time() - 7200,) * 2)
    assert backend.sweep("b/", 3600) == 0
    assert backend.sweep("a/", 3600) == 1
    assert [path.name for path in (backend.root / "a").iterdir()] == ["kept"]


def test_no_lock_file_stays(backend):
    with backend.hold("features/0123", None), backend.hold("features/0123", None) as second:
        assert second is None
    assert list((backend.root / "locks").iterdir()) == []
