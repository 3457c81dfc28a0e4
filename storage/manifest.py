"""The manifest: what an artifact is, what it was made from, and a seal over all of it."""

import datetime as dt
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from storage.backend import FileRecord
from storage.errors import ArtifactCorrupt, OtherFormat
from storage.version import artifact_version, canonical_json

MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "fpo-artifact", 2

Manifest = Mapping[str, Any]

_FIELDS = {
    "stage", "version", "schema_version", "created", "inputs", "recipe", "rows", "bytes", "files",
    "stats", "seconds", "provenance",
}  # fmt: skip


class Made(NamedTuple):
    """What a stage says of an artifact that it made; versions follow from the first four."""

    schema_version: int
    recipe: Mapping[str, Any]  # the settings that decide the result
    inputs: Mapping[str, str]
    stats: Mapping[str, Any]
    seconds: float
    provenance: Mapping[str, Any]


def make_manifest(
    stage: str,
    version: str,
    made: Made,
    files: Mapping[str, FileRecord],
    rows: Mapping[str, int],
) -> dict[str, Any]:
    """A sealed manifest.

    Args:
        stage: the artifact's name.
        version: its version.
        made: what the stage says.
        files: every data file.
        rows: rows by table.
    """
    return sealed(
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "stage": stage,
            "version": version,
            "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "schema_version": made.schema_version,
            "inputs": dict(made.inputs),
            "recipe": dict(made.recipe),
            "rows": next(iter(rows.values()), None),
            "rows_by_table": dict(rows),
            "bytes": sum(record.bytes for record in files.values()),
            "files": {name: record._asdict() for name, record in sorted(files.items())},
            "stats": dict(made.stats),
            "seconds": round(made.seconds, 3),
            "provenance": dict(made.provenance),
        }
    )


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its ``seal``: sha256 over the canonical JSON of all the rest."""
    rest = json.loads(json_bytes(manifest))  # what reading it back will give
    return {**rest, "seal": _seal(rest)}


def _seal(manifest: Manifest) -> str:
    rest = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(canonical_json(rest)).hexdigest()


def read_manifest(data: bytes, stage: str, version: str) -> Manifest:
    """Parse and check a manifest.

    Raises:
        ArtifactCorrupt: not JSON, of another artifact, or changed since.
        OtherFormat: written by another version of this program.
    """
    name = f"{stage}/{version}"

    def corrupt(why: str) -> ArtifactCorrupt:
        return ArtifactCorrupt(f"{name} is damaged: its manifest {why}", stage, version)

    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise corrupt(f"is not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise corrupt("is no manifest")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise OtherFormat(
            f"{name} has format version {manifest.get('format_version')}, this program reads "
            f"{FORMAT_VERSION}: use the version of the project that wrote it, or compute it again "
            f"with --force"
        )
    if (manifest.get("stage"), manifest.get("version")) != (stage, version):
        raise corrupt("is that of another artifact")
    try:
        whole = _seal(manifest) == manifest.get("seal")
        file_records(manifest)
    except (ValueError, TypeError, KeyError, AttributeError):
        whole = False  # what no manifest of ours has: NaN, half a character, no files
    if not whole or not set(manifest) >= _FIELDS:
        raise corrupt("was changed after it was written")
    return manifest


def version_fault(manifest: Manifest) -> str | None:
    """Why the version is not the one that follows from what the manifest says, or None."""
    expected = artifact_version(
        stage=manifest["stage"], schema_version=manifest["schema_version"],
        recipe=manifest["recipe"], inputs=manifest["inputs"],
    )  # fmt: skip
    if expected == manifest["version"]:
        return None
    return f"the manifest's inputs and recipe give the version {expected}"


def file_records(manifest: Manifest) -> dict[str, FileRecord]:
    """The manifest's files."""
    return {name: FileRecord(**record) for name, record in manifest["files"].items()}


def json_bytes(value: Any) -> bytes:
    """JSON for people to read, as all small objects of a store are written."""
    return (json.dumps(value, indent=2, allow_nan=False, default=str) + "\n").encode()
