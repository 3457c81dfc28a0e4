"""A finished store whose pairs get metadata columns, as a recipe's ``data.metadata`` gives them."""

import hashlib
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from storage.manifest import MANIFEST, json_bytes, sealed
from storage.parquet import write_parquet
from storage.schemas import pairs_schema

HOSTILE = "<script>document.title='stolen'</script>"
# By the number of a pair, twelve for training and six held out; null means no such field.
METADATA = {
    "topic": (pa.string(), lambda n: ("maths", "code", HOSTILE, None)[n % 4]),
    "turns": (pa.int64(), lambda n: n % 3),
    "score": (pa.float64(), lambda n: None if n == 5 else n / 8),
    "checked": (pa.bool_(), lambda n: n % 2 == 0),
    "kl_chosen": (pa.int64(), lambda n: n),  # a name that the evaluation's table has itself
}


def add_metadata(store: Path) -> None:
    """Rewrite the store's pairs with the columns of ``METADATA``, under the same version.

    The evaluation is removed, so that a run measures it again.
    """
    (folder,) = store.glob("artifacts/pairs/*")
    manifest, first = json.loads((folder / MANIFEST).read_text()), 0
    for name in sorted(name for name in manifest["files"] if name.endswith(".parquet")):
        path = folder / "data" / name
        table = pq.read_table(path)
        for column, (kind, value) in METADATA.items():
            values = pa.array([value(first + n) for n in range(table.num_rows)], kind)
            table = table.append_column(column, values)
        first += table.num_rows
        schema = pairs_schema({column: kind for column, (kind, _) in METADATA.items()})
        path.chmod(0o644)
        write_parquet(table.select(schema.names).cast(schema), path)
        data = path.read_bytes()
        manifest["files"][name] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST).chmod(0o644)
    (folder / MANIFEST).write_bytes(json_bytes(sealed(manifest)))
    for evaluation in store.glob("artifacts/evaluation/*"):
        shutil.rmtree(evaluation)
