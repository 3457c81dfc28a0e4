"""Rows of ``prompt + chosen + rejected`` without padding, attended part by part without a mask.

A mask over whole rows makes a CPU compute every pair of positions, those that it forbids and the
padding included: three to four times what two responses need of it. Here all rows of a batch are
one, one behind the other, so that no layer sees padding; prompt and chosen response are one causal
call of attention, and the rejected response attends to the prompt and to itself in another. The
numbers agree with the masked ones to rounding.

It is registered with transformers under a name of its own, which takes the place of ``sdpa`` on a
CPU. Calls that are not of rows of pairs (generation) go to transformers' ``sdpa``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fpo_core.data.batches import PADDING, PROMPT, PairBatch

BY_PARTS = "sdpa_by_parts"


class RowParts(NamedTuple):
    """Where the parts of a row are among the tokens of the batch."""

    start: int
    prompt: int  # tokens of each part
    chosen: int
    rejected: int


def packed(batch: PairBatch) -> PairBatch:
    """The same batch as one row [1, T] without padding, its rows one behind the other."""
    there = (batch.segments != PADDING).flatten()
    place = there.cumsum(0) - 1

    def kept(values: Tensor) -> Tensor:
        return values.flatten()[there][None]

    return batch._replace(
        input_ids=kept(batch.input_ids), position_ids=kept(batch.position_ids),
        segments=kept(batch.segments), positions=place[batch.positions],
    )  # fmt: skip


def row_parts(batch: PairBatch) -> list[RowParts]:
    """The rows of a packed batch; a new one begins with each prompt."""
    segments, counts = torch.unique_consecutive(batch.segments[0], return_counts=True)
    rows: list[list[int]] = []
    start = 0
    for segment, count in zip(segments.tolist(), counts.tolist(), strict=True):
        if segment == PROMPT:
            rows.append([start])
        rows[-1].append(count)
        start += count
    return [RowParts(*row, *[0] * (4 - len(row))) for row in rows]


def attention_by_parts(attention: str, device: str) -> str:
    """The name under which transformers is to load an attention implementation.

    Args:
        attention: the recipe's: ``eager`` or ``sdpa``.
        device: where the model is going to be.
    """
    if attention != "sdpa" or not device.startswith("cpu"):
        return attention
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(BY_PARTS, _attend)
    AttentionMaskInterface.register(BY_PARTS, sdpa_mask)
    return BY_PARTS


def is_by_parts(config: Any) -> bool:
    """Whether a decoder of this configuration attends by parts; a sliding window takes a mask."""
    return config._attn_implementation == BY_PARTS and not getattr(config, "sliding_window", None)


def inputs_by_parts(batch: PairBatch) -> dict[str, Any]:
    """What the decoder is called with for a packed batch.

    Transformers would make a mask where it is given none; this one, of a single position, is never
    read.
    """
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
    return {"attention_mask": mask, "row_parts": row_parts(batch)}


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Transformers' attention function: [1, heads, T, d_head] in, [1, T, heads, d_head] out."""
    rows: list[RowParts] | None = kwargs.pop("row_parts", None)
    if rows is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        whole = attention_mask is None or attention_mask.shape[-1] > 1 or key.shape[2] == 1
        assert whole, "this model does not hand on the parts of rows"
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scale = kwargs.get("scaling")
    found = [part for row in rows for part in _row(query, key, value, row, scale)]
    return torch.cat(found, 2).transpose(1, 2).contiguous(), None


def _row(
    query: Tensor, key: Tensor, value: Tensor, row: RowParts, scale: float | None
) -> list[Tensor]:
    """One row's attention [1, heads, T, d_head]: prompt and chosen response, then the rejected."""
    prompt = slice(row.start, row.start + row.prompt)
    first = slice(row.start, prompt.stop + row.chosen)
    own = slice(first.stop, first.stop + row.rejected)
    parts = [
        scaled_dot_product_attention(
            query[:, :, first], key[:, :, first], value[:, :, first],
            is_causal=True, scale=scale, enable_gqa=True,
        )
    ]  # fmt: skip
    if row.rejected:
        seen = torch.ones(row.rejected, row.prompt + row.rejected, dtype=torch.bool)
        keys, values = (torch.cat([x[:, :, prompt], x[:, :, own]], 2) for x in (key, value))
        parts.append(
            scaled_dot_product_attention(
                query[:, :, own], keys, values,
                attn_mask=seen.tril(row.prompt), scale=scale, enable_gqa=True,
            )
        )  # fmt: skip
    return parts
