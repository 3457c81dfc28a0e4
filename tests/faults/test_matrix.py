"""The fault matrix with the real object store, smaller than the one in docs/reliability.md."""

import pytest

from benchmarks.faults.chance import FAULTS
from benchmarks.faults.matrix import run_matrix

pytestmark = pytest.mark.slow


def test_every_promise_is_kept_under_every_fault(tmp_path):
    rows = run_matrix(tmp_path, probability=0.12, kills=6, seed=0)
    assert [row for row in rows if not row.ok] == []
    seen = {row.fault for row in rows if row.injected}
    assert seen >= set(FAULTS) - {"wrong_xml", "truncated"}  # rare: few answers have such a body
    assert sum(row.injected for row in rows if "killed (" in row.fault) == 12
    assert {row.place for row in rows} == {"S3", "folder"}
