"""What a stage does to a store, in a process of its own: shards, a large file, a commit, a ref.

    python -m benchmarks.faults.workload URL [ENDPOINT]

The bytes are always the same. Exit code 0: the artifact is there and was read back; 1: an error,
which it prints in one line.
"""

import errno
import sys

import numpy as np
import pyarrow as pa

from storage.artifact import Artifact
from storage.errors import StoreError
from storage.location import open_store
from storage.manifest import Made
from storage.s3_client import S3Options
from storage.schemas import REFERENCE
from storage.store import Store
from storage.version import artifact_version
from storage.writer import ArtifactWriter

SHARDS, ROWS = 8, 4000
LARGE_FILE, LARGE_BYTES = "model/weights.bin", 20 << 20  # more than one part on S3
STAGE, RECIPE, INPUTS = "reference", {"rows": ROWS}, {"pairs": "0123456789abcdef"}
VERSION = artifact_version(stage=STAGE, schema_version=1, recipe=RECIPE, inputs=INPUTS)
# Short enough that a test can wait for a stalled answer to be given up.
READ_TIMEOUT = 1.0


def shard(number: int) -> pa.Table:
    """A shard's rows, from its number."""
    draw = np.random.default_rng(number)
    counts = draw.integers(1, 500, (2, ROWS), dtype=np.int32)
    return pa.table(
        {
            "pair_id": [f"{number:08x}{row:08x}" for row in range(ROWS)],
            "chosen_logp": draw.normal(size=ROWS),
            "rejected_logp": draw.normal(size=ROWS),
            "chosen_tokens": counts[0],
            "rejected_tokens": counts[1],
        },
        schema=REFERENCE,
    )


def bring_about(store: Store) -> Artifact:
    """Make the artifact, or what is missing of it."""
    with store.hold(STAGE, VERSION, lambda: None) as hold:
        assert hold is not None
        if store.state(STAGE, VERSION) != "complete":
            _write(store.writer(STAGE, VERSION, hold))
    store.set_ref("faults", STAGE, VERSION)
    return store.artifact(STAGE, VERSION)


def _write(writer: ArtifactWriter) -> None:
    finished = writer.finished_shards()
    for number in range(SHARDS):
        if number not in finished:
            writer.put_shard(number, {"": shard(number)})
    large = writer.scratch() / "weights.bin"
    large.write_bytes(np.random.default_rng(0).bytes(LARGE_BYTES))
    writer.put_file(LARGE_FILE, large)
    writer.put_bytes("dropped.jsonl", b"")
    writer.commit(Made(1, RECIPE, INPUTS, {}, 0.0, {}))


def main() -> None:
    """Run once."""
    url, *endpoint = sys.argv[1:]
    options = S3Options(endpoint=endpoint[0] if endpoint else None, read_timeout=READ_TIMEOUT)
    print("started", flush=True)
    try:
        artifact = bring_about(open_store(url, options=options))
        artifact.paths(list(artifact.files))
    except StoreError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print("no space left for work in progress", flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
