"""The folder backend's own: permissions, a full disk, what a crash leaves behind."""

import os
import subprocess
import sys
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


KILLED_IN = """
import os, storage.local
from pathlib import Path
from storage.local import LocalBackend
def {step}(*_): os._exit(9)
storage.local.{step} = {step}
LocalBackend(Path({root!r})).{call}
"""


def killed_in(step: str, backend: LocalBackend, call: str) -> None:
    """A process that is gone when it comes to a step of writing, as SIGKILL would have it."""
    code = KILLED_IN.format(step=step, root=str(backend.root), call=call)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9


def everything(backend: LocalBackend) -> list[str]:
    return sorted(path.name for path in backend.root.rglob("*") if path.is_file())


def test_a_writer_killed_after_the_exclusive_step_leaves_nothing_over(backend):
    killed_in("_sync_folder", backend, "create('a/manifest.json', b'{}')")
    assert everything(backend) == ["manifest.json"]


def test_what_a_killed_swap_leaves_goes_with_the_next(backend):
    killed_in("_sync_folder", backend, "replace('refs/one', b'1', None)")
    backend.root.joinpath("refs", ".tmp-swap").write_bytes(b"ha")  # killed while it wrote
    assert backend.replace("refs/two", b"2", None)
    assert everything(backend) == [".lock", "one", "two"]


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
