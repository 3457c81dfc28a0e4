"""What judges answered: ``judgments/<2 digits>/<digest>.json``, by the content of the question.

Not part of any artifact: evaluations share them, and nothing is asked twice. An entry is never
changed; only one that is damaged is written over.
"""

from collections.abc import Iterable

from storage.backend import Backend, in_parallel
from storage.errors import StoreError


class Judgments:
    """The judgments of a store.

    Args:
        backend: of the store.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def get_all(self, digests: Iterable[str]) -> dict[str, bytes]:
        """The entries that are there, by digest."""
        wanted = list(digests)
        found = in_parallel(self._backend, self._get, wanted)
        return {
            digest: entry for digest, entry in zip(wanted, found, strict=True) if entry is not None
        }

    def put(self, digest: str, entry: bytes) -> bytes:
        """Keep an entry where there is none; returns the one that is there now."""
        if self._backend.create(_key(digest), entry):
            return entry
        there = self._get(digest)
        if there is None:
            raise StoreError(f"{_key(digest)} was removed while it was being written")
        return there

    def copy_to(self, target: "Judgments") -> int:
        """Take along all that another store has not; returns how many those are."""
        keys = [entry.key for entry in self._backend.list("judgments/")]
        there = {entry.key for entry in target._backend.list("judgments/")}
        return sum(
            in_parallel(
                target._backend,
                lambda key: target._backend.create(key, self._backend.read(key)),
                [key for key in keys if key not in there],
            )
        )

    def mend(self, digest: str, entry: bytes) -> None:
        """Write an entry over a damaged one."""
        self._backend.put(_key(digest), entry)

    def _get(self, digest: str) -> bytes | None:
        try:
            return self._backend.read(_key(digest))
        except KeyError:
            return None


def _key(digest: str) -> str:
    return f"judgments/{digest[:2]}/{digest}.json"
