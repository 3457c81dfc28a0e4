"""What people call features: kept in the store, by the SAE's content, for all who read it.

<root>/labels/<digest of the SAE's identity>.json    {"sae": ..., "labels": {"17": {...}}}
"""

import datetime as dt
import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from explorer.cache import SaeIdentity
from explorer.errors import NotReadable
from storage.manifest import json_bytes
from storage.store import Store

LONGEST = 300  # characters of a label
_ATTEMPTS = 20


class Label(NamedTuple):
    """What a feature is called, and who says so."""

    text: str
    source: str  # hand, or neuronpedia
    at: str  # ISO 8601


class Labels:
    """The labels of an SAE's features.

    Args:
        store: where they are kept.
        sae: whose features.
    """

    def __init__(self, store: Store, sae: SaeIdentity) -> None:
        digest = hashlib.sha256(sae.identity.encode()).hexdigest()[:16]
        self._store, self._sae, self._key = store, sae, f"labels/{digest}.json"
        self._labels = self._read()[0]

    def text(self, feature: int) -> str:
        """What a feature is called; empty where nobody has named it."""
        found = self._labels.get(int(feature))
        return found.text if found else ""

    def search(self, text: str) -> set[int]:
        """The features whose label contains a text, in any case."""
        wanted = text.casefold()
        return {one for one, label in self._labels.items() if wanted in label.text.casefold()}

    def groups(self) -> dict[str, list[int]]:
        """The features of each label that several have."""
        found: dict[str, list[int]] = {}
        for feature, label in self._labels.items():
            found.setdefault(label.text, []).append(feature)
        return {text: features for text, features in found.items() if len(features) > 1}

    def __len__(self) -> int:
        return len(self._labels)

    def set(self, feature: int, text: str) -> None:
        """Name a feature; an empty text takes the name away."""
        now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        label = Label(" ".join(text.split())[:LONGEST], "hand", now)
        self._change(lambda _labels: {feature: label})

    def import_neuronpedia(self, path: Path) -> int:
        """Take over the explanations of a Neuronpedia export; what was named by hand stays.

        Args:
            path: JSON or JSONL, plain or gzipped, of objects with ``index`` and ``description``.

        Returns:
            How many labels were taken.

        Raises:
            NotReadable: the file is no such export, or names features that the SAE does not have.
        """
        now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        found = {}
        for number, record in enumerate(_records(path), 1):
            try:
                feature, text = int(record["index"]), str(record["description"])
            except (KeyError, TypeError, ValueError) as error:
                raise NotReadable(
                    f"{path.name}, record {number}: no `index` and `description`, which an export "
                    f"of Neuronpedia's explanations has"
                ) from error
            if not 0 <= feature < self._sae.d_sae:
                raise NotReadable(
                    f"{path.name}, record {number}: feature {feature} is not in this SAE, whose "
                    f"features are 0 to {self._sae.d_sae - 1}: is the export of another one?"
                )
            found[feature] = Label(" ".join(text.split())[:LONGEST], "neuronpedia", now)
        taken: dict[int, Label] = {}

        def change(labels: dict[int, Label]) -> dict[int, Label]:
            by_hand = {one for one, label in labels.items() if label.source == "hand"}
            taken.clear()
            taken.update((one, label) for one, label in found.items() if one not in by_hand)
            return taken

        self._change(change)
        return len(taken)

    def _read(self) -> tuple[dict[int, Label], str | None]:
        found = self._store.backend.read_with_etag(self._key)
        if found is None:
            return {}, None
        data, etag = found
        try:
            labels = json.loads(data)["labels"]
            return {int(feature): Label(**label) for feature, label in labels.items()}, etag
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise NotReadable(
                f"the labels in {self._key} of the store are damaged ({error}): put the file "
                f"right, or remove it to begin anew"
            ) from error

    def _change(self, change: Callable[[dict[int, Label]], dict[int, Label]]) -> None:
        """Compare and swap: two people naming at once lose nothing."""
        for _ in range(_ATTEMPTS):
            labels, etag = self._read()
            labels |= change(labels)
            kept = {one: label for one, label in sorted(labels.items()) if label.text}
            record = {
                "sae": self._sae.identity, "source": self._sae.source,
                "labels": {str(one): label._asdict() for one, label in kept.items()},
            }  # fmt: skip
            if self._store.backend.replace(self._key, json_bytes(record), etag):
                self._labels = kept
                return
        raise NotReadable("somebody else keeps changing the labels; try again")


def copy_labels(source: Store, target: Store) -> int:
    """Take along the labels of all SAEs; where both stores name a feature, the target's stays.

    Returns:
        How many labels came.
    """
    taken = 0
    for entry in source.backend.list("labels/"):
        ours = json.loads(source.backend.read(entry.key))
        for _ in range(_ATTEMPTS):
            found = target.backend.read_with_etag(entry.key)
            there = json.loads(found[0])["labels"] if found else {}
            new = {one: label for one, label in ours["labels"].items() if one not in there}
            record = {**ours, "labels": {**there, **new}}
            etag = found[1] if found else None
            if not new or target.backend.replace(entry.key, json_bytes(record), etag):
                taken += len(new)
                break
    return taken


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise NotReadable(f"{path.name}: not JSON or JSONL ({error})") from error
