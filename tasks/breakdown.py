"""The evaluation's results by group: metadata of the held-out pairs, and the table they give."""

from typing import TYPE_CHECKING

import polars as pl
import pyarrow as pa

from storage.artifact import Artifact
from storage.parquet import check_schema, write_parquet
from storage.schemas import EVALUATION_BREAKDOWN, metadata_columns, names_beside
from storage.writer import ArtifactWriter

if TYPE_CHECKING:
    from fpo_core.evaluation.heldout import HeldoutScores

BREAKDOWN = "breakdown.parquet"  # of an evaluation whose pairs have metadata columns


def heldout_metadata(pairs: Artifact, pair_ids: list[str]) -> pl.DataFrame:
    """Return the metadata columns of held-out pairs; no column where the pairs have none.

    Args:
        pairs: The ``pairs`` artifact.
        pair_ids: Held-out pairs; the rows come in their order.
    """
    names = metadata_columns(pairs.schema())
    if not names:
        return pl.DataFrame()
    heldout = pairs.scan().filter(pl.col("split") == "heldout").select("pair_id", *names)
    ids = pl.DataFrame({"pair_id": pair_ids}, schema={"pair_id": pl.String})
    found = ids.join(heldout.collect(), on="pair_id", maintain_order="left", validate="m:1")
    assert found.height == len(pair_ids), f"{pairs.name} lacks held-out pairs of its evaluation"
    return found.drop("pair_id")


def with_metadata(frame: pl.DataFrame, metadata: pl.DataFrame) -> pl.DataFrame:
    """Return a table of pairs with their metadata as further columns, in the same order."""
    names = names_beside(metadata.columns, frame.columns)
    return frame.hstack([column.alias(names[column.name]) for column in metadata])


def write_breakdown(
    writer: ArtifactWriter,
    scores: "HeldoutScores",
    metadata: pl.DataFrame,
    resamples: int,
    seed: int,
) -> None:
    """Write ``breakdown.parquet``; nothing where the pairs have no metadata column."""
    from fpo_core.evaluation.breakdown import break_down

    if not metadata.width:
        return
    frame = break_down(scores, metadata, resamples, seed)
    table = pa.Table.from_pylist(frame.to_dicts(), schema=EVALUATION_BREAKDOWN)
    check_schema(table, EVALUATION_BREAKDOWN)
    path = writer.scratch() / BREAKDOWN
    write_parquet(table, path)
    writer.put_file(BREAKDOWN, path)
