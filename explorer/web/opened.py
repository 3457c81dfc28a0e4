"""What the pages have opened: caches, indexes and the way to the logits, a few of them kept."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import lru_cache
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, NamedTuple

from explorer.cache import FeatureCache
from explorer.errors import NotThere
from explorer.features import Histogram, feature_histogram
from explorer.index import PairIndex, open_feature_index, open_pair_index
from explorer.labels import Labels
from explorer.metadata import matching_pairs
from explorer.store import ExploredStore
from fpo_core.errors import FPOError

if TYPE_CHECKING:
    from explorer.logits import LogitEffect, LogitLens

log = logging.getLogger("fpo.browse")

PATIENCE = 2.0  # seconds that a page waits for the index that it cannot do without
AGAIN = 60.0  # and after which an index that could not be made is tried again


class Indexing(FPOError):
    """The index of a cache is being made; the page comes by itself."""


class Opened:
    """Caches and indexes that were looked at, a few of them kept.

    Args:
        store: the store.
    """

    def __init__(self, store: ExploredStore) -> None:
        self.store = store
        self.cache = lru_cache(maxsize=8)(self._open)
        self.matching = lru_cache(maxsize=8)(matching_pairs)
        self._lens = lru_cache(maxsize=1)(self._open_lens)  # it holds the SAE's decoder
        self._opening = Lock()  # once; and transformers is not to be imported by two threads
        self._begun: dict[tuple[str, Callable[..., Any]], _Begun] = {}

    def _open(self, name: str) -> FeatureCache:
        cache = self.store.features(name)
        self._begin(cache, open_pair_index)  # while its first page is read
        return cache

    def labels(self, cache: FeatureCache) -> Labels:
        """Read anew: somebody else may have named a feature."""
        return Labels(self.store.store, cache.sae)

    def pairs(self, cache: FeatureCache) -> PairIndex:
        """The index of a cache's pairs.

        Raises:
            Indexing: it is not made yet.
        """
        try:
            return self._begin(cache, open_pair_index).result(PATIENCE)
        except TimeoutError:
            raise Indexing(f"the index of {cache.name}'s pairs is being made, once") from None

    def histogram(self, cache: FeatureCache, feature: int, wait: float) -> Histogram | None:
        """A feature's distribution; None while the index is made, which takes up to minutes.

        Raises:
            FPOError, StoreError: the index could not be made.
        """
        cache.check_feature(feature)
        try:
            index = self._begin(cache, open_feature_index).result(wait)
        except TimeoutError:
            return None
        return feature_histogram(cache, index, feature)

    def logits(self, cache: FeatureCache, feature: int) -> "LogitEffect":
        """What a feature does to the logits.

        Raises:
            NotThere: model or SAE are not at hand.
        """
        with self._opening:
            lens = self._lens(cache.name)
        if isinstance(lens, NotThere):
            raise lens
        return lens.effect(feature)

    def _open_lens(self, name: str) -> "LogitLens | NotThere":
        """That there is none is kept, too: an SAE would else be read for every feature's page."""
        from explorer.logits import LogitLens  # and torch with it, which no other page needs

        try:
            return LogitLens(self.store.store, self.cache(name))
        except NotThere as error:
            return error

    def _begin(self, cache: FeatureCache, make: Callable[[FeatureCache], Any]) -> Future[Any]:
        """Made in a thread of its own, which does not hold up the end of the program."""
        key, now = (cache.name, make), time.monotonic()
        begun = self._begun.get(key)
        if begun is None or (begun.failed() and now - begun.since > AGAIN):
            begun = self._begun[key] = _Begun(Future(), now)
            Thread(target=_fulfil, args=(begun.future, make, cache), daemon=True).start()
        return begun.future


class _Begun(NamedTuple):
    """An index that is being made, was made, or could not be."""

    future: Future[Any]
    since: float  # on the monotonic clock

    def failed(self) -> bool:
        return self.future.done() and self.future.exception() is not None


def _fulfil(begun: Future[Any], make: Callable[[FeatureCache], Any], cache: FeatureCache) -> None:
    try:
        begun.set_result(make(cache))
    except Exception as error:
        log.warning("an index of %s cannot be made: %s", cache.name, error)
        log.debug("of %s", cache.name, exc_info=True)
        if isinstance(error, OSError):
            error = FPOError(f"the index cannot be made: {error.strerror or error}")
        begun.set_exception(error)
