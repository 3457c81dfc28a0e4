"""Batches of pairs: one row a pair, its prompt computed once for both responses.

A row is ``prompt + chosen + rejected``. The rejected part restarts its position ids after the
prompt and does not see the chosen part, so each response is read exactly as if it followed the
prompt alone (the numbers agree to rounding; tests pin it) at the cost of one prompt.

*Scored positions* are defined here and nowhere else: a response token is scored at the position
that predicts it, so a response of n tokens is scored at the prompt's last position and at its own
first n - 1. A response of several turns has unscored ranges, the turns of other speakers: they are
attended to like any token, but no position that predicts one of their tokens is scored. Log-probs,
feature pooling and evaluation all read these positions, flattened over the batch, and padding
never reaches them.

Shapes: B pairs, T padded length, R = 2B responses (2i chosen, 2i + 1 rejected), N scored tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fpo_core.errors import FPOError

Ids = Sequence[int] | np.ndarray
PROMPT, CHOSEN, REJECTED, PADDING = 0, 1, 2, -1


class PairIds(NamedTuple):
    """Token ids of one pair; ``rejected`` is empty for an answer that is compared with none."""

    pair_id: str
    prompt: Ids
    chosen: Ids
    rejected: Ids
    # Of chosen and of rejected: start, stop, start, stop, ... of the ranges that are not scored.
    unscored: tuple[Ids, Ids] = ((), ())

    @property
    def length(self) -> int:
        """Tokens of the pair's row, scored or not."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def scored(self) -> tuple[int, int]:
        """Scored tokens of chosen and of rejected."""
        chosen, rejected = self.unscored
        return num_scored(self.chosen, chosen), num_scored(self.rejected, rejected)


class PairBatch(NamedTuple):
    """Tensors of a batch of pairs."""

    pair_ids: tuple[str, ...]
    input_ids: Tensor  # [B, T] int64
    position_ids: Tensor  # [B, T] int64
    segments: Tensor  # [B, T] int64: PROMPT, CHOSEN, REJECTED or PADDING
    positions: Tensor  # [N] int64: flat index into B*T of each scored position
    targets: Tensor  # [N] int64: the token predicted there
    response: Tensor  # [N] int64: which response it belongs to, in 0..R-1, ascending
    lengths: Tensor  # [R] int64: scored tokens of each response
    offsets: Tensor  # [N] int64: index of each scored token within its response, unscored included

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int((self.segments != PADDING).sum())


def scored_tokens(ids: Ids, unscored: Ids) -> np.ndarray:
    """Return the indices [n] of a response's scored tokens, ascending.

    Args:
        ids: the response.
        unscored: the ranges that are not scored: start, stop, start, stop, ...
    """
    scored = np.ones(len(ids), dtype=bool)
    if len(unscored):
        ends = np.asarray(unscored, dtype=np.int64)
        ascending = (np.diff(ends, prepend=-1, append=len(ids) + 1) > 0).all()
        assert len(ends) % 2 == 0, f"{ends.tolist()}: a range without its stop"
        assert ascending, f"{ends.tolist()} are no ascending ranges of {len(ids)} tokens"
        for start, stop in ends.reshape(-1, 2).tolist():
            scored[start:stop] = False
    return np.flatnonzero(scored)


def num_scored(ids: Ids, unscored: Ids) -> int:
    """Return how many tokens of a response are scored; arguments as of ``scored_tokens``."""
    return len(ids) - int(sum(unscored[1::2])) + int(sum(unscored[0::2]))


def collate(
    pairs: Sequence[PairIds],
    pad_id: int = 0,
    device: str = "cpu",
    padding_side: Literal["right", "left"] = "right",
) -> PairBatch:
    """Build a batch.

    Args:
        pairs: the pairs; the prompt has a token, each response that is not empty a scored one.
        pad_id: id that fills rows to one length (never read).
        device: torch device of the tensors.
        padding_side: where; the numbers are the same.
    """
    width = max(pair.length for pair in pairs)
    shape = (len(pairs), width)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    segments = torch.full(shape, PADDING, dtype=torch.int64)
    positions: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    offsets: list[np.ndarray] = []
    for row, pair in enumerate(pairs):
        start = width - pair.length if padding_side == "left" else 0
        last_of_prompt = row * width + start + len(pair.prompt) - 1
        parts = (
            (PROMPT, pair.prompt, ()),
            (CHOSEN, pair.chosen, pair.unscored[0]),
            (REJECTED, pair.rejected, pair.unscored[1]),
        )
        for segment, part, unscored in parts:
            ids = np.array(part, dtype=np.int64)  # a copy: the shards are not to be written
            assert len(ids) or segment == REJECTED, f"pair {pair.pair_id} has an empty part"
            stop, position = start + len(ids), 0 if segment == PROMPT else len(pair.prompt)
            input_ids[row, start:stop] = torch.from_numpy(ids)
            position_ids[row, start:stop] = torch.arange(position, position + len(ids))
            segments[row, start:stop] = segment
            if segment != PROMPT:
                within = scored_tokens(ids, unscored)
                assert len(within) or not len(ids), f"pair {pair.pair_id} has an unscored response"
                first = within == 0  # the prompt predicts it
                positions.append(np.where(first, last_of_prompt, row * width + start - 1 + within))
                targets.append(ids[within])
                offsets.append(within)
            start = stop
    lengths = torch.tensor([len(within) for within in offsets])
    batch = PairBatch(
        pair_ids=tuple(pair.pair_id for pair in pairs),
        input_ids=input_ids,
        position_ids=position_ids,
        segments=segments,
        positions=torch.from_numpy(np.concatenate(positions)),
        targets=torch.from_numpy(np.concatenate(targets)),
        response=torch.repeat_interleave(torch.arange(len(lengths)), lengths),
        lengths=lengths,
        offsets=torch.from_numpy(np.concatenate(offsets)),
    )
    if device == "cpu":
        return batch
    return PairBatch(batch.pair_ids, *(tensor.to(device) for tensor in batch[1:]))


def attention_mask(batch: PairBatch, config: Any, dtype: torch.dtype) -> Any:
    """The 4-d mask [B, 1, T, T] that keeps the two responses of a row apart.

    Models whose layers are of several types (Gemma-2, Gemma-3, Qwen) get a mapping of one mask a
    type, the form that transformers accepts from callers that made their masks themselves. Mistral
    has no types: with a window, all of its layers have it.

    Args:
        batch: the batch.
        config: the text decoder's configuration.
        dtype: dtype of the attention logits, to which an additive mask is made for ``eager``.
    """
    index = torch.arange(batch.segments.shape[1], device=batch.segments.device)
    causal = index[:, None] >= index[None, :]
    query, key = batch.segments[:, :, None], batch.segments[:, None, :]
    allowed = causal & ((key == PROMPT) | (key == query))  # [B, T, T]; padding sees padding only

    def finish(mask: Tensor) -> Tensor:
        if config._attn_implementation != "eager":
            return mask[:, None]
        zero = torch.zeros((), dtype=dtype, device=mask.device)
        return torch.where(mask[:, None], zero, torch.finfo(dtype).min)

    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if window is None or (types and "sliding_attention" not in types):
        return finish(allowed)
    distance = batch.position_ids[:, :, None] - batch.position_ids[:, None, :]
    within = finish(allowed & (distance < window))
    return {"full_attention": finish(allowed), "sliding_attention": within} if types else within


def batches_by_length(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Group row numbers into batches of similar length, longest first.

    Args:
        lengths: tokens of each row.
        tokens_per_batch: most tokens a batch, padding included; a longer row goes alone.

    Yields:
        Row numbers. The order depends on the lengths only, never on time or machine.
    """
    rows = by_length(lengths)
    while rows:
        batch = that_fit(rows, lengths, tokens_per_batch)
        yield batch
        rows = rows[len(batch) :]


def by_length(lengths: Sequence[int]) -> list[int]:
    """Row numbers, longest first."""
    return sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))


def that_fit(rows: Sequence[int], lengths: Sequence[int], tokens_per_batch: int) -> list[int]:
    """The first of some rows, longest first, that fit into a batch; one at least."""
    count = max(1, tokens_per_batch // lengths[rows[0]])
    return list(rows[:count])


def check_vocabulary(pairs: Iterable[PairIds], size: int) -> None:
    """Refuse pairs of another tokenizer, as far as token ids show it.

    Raises:
        FPOError: naming a pair whose ids the model does not have.
    """
    for pair in pairs:
        parts = (pair.prompt, pair.chosen, pair.rejected)
        highest = max(int(np.max(ids, initial=0)) for ids in parts)
        if highest >= size:
            raise FPOError(
                f"pair {pair.pair_id} has the token id {highest}, the model's vocabulary "
                f"has {size}: `pairs` was made with another tokenizer; rerun from tokenize"
            )
