"""Attention within rows of ``prompt + chosen + rejected``, part by part and without a mask.

A mask over whole rows makes a CPU compute every pair of positions, those that it forbids and the
padding included: three to four times what two responses need of it. Here prompt and chosen
response are one causal call, and the rejected response attends to the prompt and to itself in
another. The numbers agree with the masked ones to rounding.

It is registered with transformers under a name of its own, which takes the place of ``sdpa`` on a
CPU. Calls that are not of rows of pairs (generation) go to transformers' ``sdpa``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from fpo_core.data.batches import CHOSEN, PADDING, PROMPT, REJECTED, PairBatch

BY_PARTS = "sdpa_by_parts"


class RowParts(NamedTuple):
    """Where the parts of a row are: tokens before it, and tokens of each part."""

    start: int
    prompt: int
    chosen: int
    rejected: int


def row_parts(batch: PairBatch) -> list[RowParts]:
    """The parts of each row of a batch, padded on either side."""
    starts = (batch.segments != PADDING).int().argmax(1).tolist()
    counts = ((batch.segments == part).sum(1).tolist() for part in (PROMPT, CHOSEN, REJECTED))
    return [RowParts(*parts) for parts in zip(starts, *counts, strict=True)]


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


def parts_for(config: Any, batch: PairBatch) -> dict[str, Any]:
    """What the decoder's call passes on to the attention, where that goes by parts.

    Args:
        config: the decoder's.
        batch: its input.
    """
    return {"row_parts": row_parts(batch)} if is_by_parts(config) else {}


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Transformers' attention function: [B, heads, T, d_head] in, [B, T, heads, d_head] out."""
    rows: list[RowParts] | None = kwargs.pop("row_parts", None)
    if rows is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    found = [
        _row(query[n : n + 1], key[n : n + 1], value[n : n + 1], row, kwargs.get("scaling"))
        for n, row in enumerate(rows)
    ]
    return torch.cat(found).transpose(1, 2).contiguous(), None


def _row(query: Tensor, key: Tensor, value: Tensor, row: RowParts, scale: float | None) -> Tensor:
    """One row's attention, [1, heads, T, d_head], zero at its padding."""
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
    return pad(torch.cat(parts, 2), (0, 0, row.start, query.shape[2] - own.stop))
