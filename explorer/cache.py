"""A feature cache and the pairs it is of."""

from functools import cached_property
from typing import NamedTuple

import polars as pl
import pyarrow as pa

from explorer.errors import NotThere
from explorer.text import Detokenizer
from storage.artifact import Artifact
from storage.schemas import metadata_types

SMALL = ("feature", "density", "mean", "max", "mean_chosen", "mean_rejected")
_DIFFERENCE = (pl.col("mean_chosen") - pl.col("mean_rejected")).alias("difference")


class SaeIdentity(NamedTuple):
    """The SAE that a cache is of."""

    identity: str  # by its content, or the artifact that it is
    source: str | None  # its name in the newest recipe, where that is known
    layer: int
    site: str
    d_sae: int
    model: str | None

    def neuronpedia_url(self, feature: int) -> str | None:
        """The feature's page, where the SAE is one that Neuronpedia shows."""
        from explorer.neuronpedia import page_of

        return page_of(self.source, feature)


class FeatureCache:
    """A features artifact, opened for looking.

    Args:
        artifact: the features.
        pairs: whose responses they are of.
        sae: the SAE.
        detokenizer: of the model.
        recipes: names of recipes whose newest cache it is.
    """

    def __init__(
        self, artifact: Artifact, pairs: Artifact, sae: SaeIdentity, detokenizer: Detokenizer,
        recipes: tuple[str, ...],
    ) -> None:  # fmt: skip
        self.artifact, self.pairs, self.sae = artifact, pairs, sae
        self.detokenizer, self.recipes = detokenizer, recipes

    @property
    def name(self) -> str:
        """``features/VERSION``."""
        return self.artifact.name

    @property
    def n_pairs(self) -> int:
        """Pairs, two responses each."""
        return int(self.artifact.manifest["rows"]) // 2

    @property
    def n_tokens(self) -> int:
        """Scored tokens."""
        return int(self.artifact.manifest["stats"]["scored_tokens"])

    def stats(self) -> pl.LazyFrame:
        """``features/stats`` with ``difference``: mean on chosen less mean on rejected."""
        return self.artifact.scan("stats").with_columns(_DIFFERENCE)

    @cached_property
    def small_stats(self) -> pl.DataFrame:
        """The same without examples, in memory: a few numbers a feature."""
        frame = pl.DataFrame(self.artifact.rows("stats", 0, None, SMALL))
        return frame.with_columns(_DIFFERENCE)

    def pooled(self) -> pl.LazyFrame:
        """``features/pooled``, two rows a pair."""
        return self.artifact.scan("pooled")

    def tokens(self) -> pl.LazyFrame:
        """``features/tokens``, a row a scored token."""
        return self.artifact.scan("tokens")

    def pairs_table(self) -> pl.LazyFrame:
        """``pairs``, one row a pair."""
        return self.pairs.scan()

    @cached_property
    def metadata(self) -> dict[str, pa.DataType]:
        """Type of each metadata column of the pairs, by name."""
        return metadata_types(self.pairs.schema())

    def check_feature(self, feature: int) -> None:
        """Refuse a feature that the SAE does not have.

        Raises:
            NotThere: naming those it has.
        """
        if not 0 <= feature < self.sae.d_sae:
            raise NotThere(
                f"no feature {feature} in this SAE, whose features are 0 to {self.sae.d_sae - 1}"
            )
