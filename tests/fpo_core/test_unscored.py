"""Responses of several turns against plain forward passes in float64.

The reference knows nothing of batches: one prompt and one side go through transformers' own forward
pass, and the log-probs, activations and KL are taken at the tokens that a mask says are scored.
"""

import functools
import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpo_core.data.batches import (
    PairIds,
    check_vocabulary,
    collate,
    num_scored,
    scored_tokens,
)
from fpo_core.data.prompt_rows import PromptCost, rows_of
from fpo_core.errors import FPOError
from fpo_core.evaluation.audit import Groups, audit_moments
from fpo_core.evaluation.heldout import score_heldout
from fpo_core.hookpoint import Hookpoint
from fpo_core.models.forward import forward_pairs, reference_side
from fpo_core.models.load import load_model
from fpo_core.recipe.schema import FeatureSettings, MonitorSettings
from fpo_core.recipe.training import TrainSettings
from fpo_core.sae.coder import AttachedSae, load_coder
from fpo_core.training.cached import cached_batch
from fpo_core.training.examples import read_examples
from fpo_core.training.feature_shards import FeatureShards
from fpo_core.training.job import LAST_FILE
from fpo_core.training.launch import run_workers
from fpo_core.training.loss import PairLoss
from fpo_core.training.saved import check_saved
from fpo_core.training.start_gate import check_start
from tasks.offline import read_pair_ids
from tests.fpo_core import workers
from tests.fpo_core.test_discrepancy import d_of_row, full_encode
from tests.fpo_core.test_offline import close, same, score
from tests.tiny import D_SAE, SAE_LAYER, make_model, save_model, save_sae

KINDS = ["llama", "llama-masked", "gemma2"]
HERE = Hookpoint(SAE_LAYER)
SIDES = ("chosen", "rejected")


def masked(*masks):
    """The ranges of masks, 1 where a token is scored: of chosen and of rejected."""
    # Where the mask changes, from a scored start to a scored end.
    return tuple(np.flatnonzero(np.diff([1, *mask, 1])).tolist() for mask in masks)


def made_pairs():
    """Pairs whose ranges are in the middle, at either end, several, and none."""
    generator = torch.Generator().manual_seed(3)

    def ids(count):
        return torch.randint(2, 400, (count,), generator=generator).tolist()

    masks = [
        ([1, 1, 0, 0, 0, 1, 1], [1, 0, 1, 0, 0, 1]),
        ([1, 1, 1], [1, 1]),
        ([0, 0, 1, 1], [1, 1, 0]),
        ([1, 0, 0, 0, 0, 0, 0, 0, 1], [1]),
        ([0, 1, 0, 1, 0, 1, 0], [0, 0, 0, 1]),
        ([1, 1, 1, 1, 1], [1, 1, 0, 1, 1]),
        ([1], [0, 1]),
        ([1, 1, 0, 1], [1, 1, 1, 0, 0, 1, 1]),
    ]
    return [
        PairIds(
            pair_id=f"p{number}",
            prompt=ids(2 + number % 5),
            chosen=ids(len(chosen)),
            rejected=ids(len(rejected)),
            unscored=masked(chosen, rejected),
        )
        for number, (chosen, rejected) in enumerate(masks)
    ]


PAIRS = made_pairs()


def side_of(pair, side):
    """A side's ids and the indices of its scored tokens, by walking the ranges."""
    ids, ranges = list((pair.chosen, pair.rejected)[side]), list(pair.unscored[side])
    left_out = {i for a, b in zip(ranges[::2], ranges[1::2], strict=True) for i in range(a, b)}
    return ids, [index for index in range(len(ids)) if index not in left_out]


class Plain:
    """One side of a pair after its prompt, by a model's own forward pass in float64."""

    def __init__(self, model, pair, side):
        ids, self.scored = side_of(pair, side)
        seen = []
        handle = model.model.layers[SAE_LAYER].register_forward_hook(
            lambda *call: seen.append(call[2] if isinstance(call[2], torch.Tensor) else call[2][0])
        )
        logits = model(input_ids=torch.tensor([[*pair.prompt, *ids]])).logits[0]
        handle.remove()
        assert logits.dtype == torch.float64
        before = torch.tensor([len(pair.prompt) - 1 + index for index in self.scored])
        self.tokens = [ids[index] for index in self.scored]
        self.logps = torch.log_softmax(logits[before], -1)  # [n, V]
        self.token_logps = self.logps[range(len(self.scored)), self.tokens]
        self.logp = self.token_logps.sum()
        self.mean = self.token_logps.mean()
        self.x = seen[0][0][before]


@functools.cache
def plain_model(kind="llama", seed=0):
    return make_model(kind, seed).double()


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_of_the_scored_tokens_alone(kind, sae):
    kept = FeatureSettings(cache_k=10, tokens_k=4, examples=3)
    scores = score(make_model(kind), PAIRS, sae, settings=kept)
    (features,) = scores.features
    coder, row, rows = load_coder(sae), 0, []
    for number, pair in enumerate(PAIRS):
        for side, name in enumerate(SIDES):
            with torch.no_grad():
                wanted = Plain(plain_model(kind), pair, side)
                acts = full_encode(coder, wanted.x).numpy()
            response, n = 2 * number + side, len(wanted.scored)
            rows.append(acts)
            close(scores.reference[f"{name}_logp"][number], float(wanted.logp))
            assert scores.reference[f"{name}_tokens"][number] == n
            assert features.pooled["n_tokens"][response] == n
            mean = acts.mean(0)
            order = np.argsort(-mean, kind="stable")[: min(10, int((mean > 0).sum()))]
            close(features.pooled["values"][response], mean[order])
            close(features.pooled["mass"][response], mean.sum())
            close(features.pooled["pinned_values"][response], mean[[3, 70]])
            part = slice(row, row + n)
            assert features.tokens["position"][part].tolist() == wanted.scored
            assert features.tokens["token_id"][part].tolist() == wanted.tokens
            assert set(features.tokens["side"][part]) == {name}
            close(features.tokens["mass"][part], acts.sum(1))
            row += n
    assert row == len(features.tokens["position"])
    stats, every = features.stats, np.concatenate(rows)
    assert stats["tokens"][0] == len(every)
    np.testing.assert_array_equal(stats["active"], (every > 0).sum(0))
    close(stats["total"], every.sum(0))
    for feature in range(D_SAE):
        names = ("responses", "positions", "values")
        examples = zip(*(stats[f"example_{name}"][feature] for name in names), strict=True)
        for response, position, value in examples:
            _, scored = side_of(PAIRS[response // 2], response % 2)
            close(value, rows[response][scored.index(position), feature])


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """The caches of these pairs, all of them to train on."""
    root = tmp_path_factory.mktemp("unscored")
    save_model(root / "model")
    save_sae(root / "sae")
    workers.write_caches(root, PAIRS, load_model(root / "model", dtype="float32", attention="sdpa"))
    return root


def read(root, *, tokens=True, pairs="pairs", split="train"):
    cache = FeatureShards(
        pooled=(root / "pooled.parquet",),
        tokens=(root / "tokens.parquet",) if tokens else (),
        d_sae=D_SAE,
        pinned=workers.PINNED,
        label="features",
    )
    shards = [root / f"{pairs}.parquet"], [root / "reference.parquet"]
    return read_examples(*shards, [cache], 8, split)


GROUP = {"name": "held", "features": [40, 2, 5], "weight": 3.0}


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("method", ["fpo", "dpo", "simpo", "tdpo2", "grouped"])
def test_losses_and_gradients_are_those_of_the_scored_tokens(cached, method, pooled):
    options = {"groups": [GROUP]} if method == "grouped" else {}
    method = "fpo" if method == "grouped" else method
    train = TrainSettings(lr=1e-3, method=method, k=8, pooled=pooled, **options)
    coder = load_coder(cached / "sae")
    live = functools.partial(reference_side, make_model()) if method == "tdpo2" else None
    loss = PairLoss(train, [AttachedSae(coder, HERE)], live)
    examples = read(cached)
    batch = collate([example.ids for example in examples])
    policy = make_model(seed=5)
    out = forward_pairs(policy, batch, loss.hookpoints, loss.live(batch))
    pinned = workers.PINNED if train.groups else ()
    found = loss(batch, out, cached_batch(examples, "cpu", pinned))
    found.losses.sum().backward()

    plain, reference = make_model(seed=5).double(), plain_model()
    losses, discrepancies = [], []
    for pair in PAIRS:
        mine = [Plain(plain, pair, side) for side in (0, 1)]
        with torch.no_grad():
            theirs = [Plain(reference, pair, side) for side in (0, 1)]
        d = [discrepancy(coder, *both, pooled) for both in zip(mine, theirs, strict=True)]
        held = [change_of_group(coder, *both) for both in zip(mine, theirs, strict=True)]
        discrepancies += [float(one.detach()) for one in d]
        if train.groups:
            d = [one + 3.0 * other for one, other in zip(d, held, strict=True)]
        losses.append(by_hand(method, mine, theirs, d))
    close(found.losses.detach(), [float(one.detach()) for one in losses])
    close(found.sae_discrepancies[0], discrepancies)
    torch.stack(losses).sum().backward()
    wanted = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in policy.named_parameters():
        difference = (parameter.grad.double() - wanted[name]).norm()
        assert difference < 1e-4 * wanted[name].norm(), name


def discrepancy(coder, mine, theirs, pooled):
    """D of a side; of each token and averaged, where it is not pooled."""
    acts, reference = full_encode(coder, mine.x), full_encode(coder, theirs.x)
    if pooled:
        return d_of_row(acts.mean(0), reference.mean(0), 8)
    return torch.stack([d_of_row(*rows, 8) for rows in zip(acts, reference, strict=True)]).mean()


def change_of_group(coder, mine, theirs):
    columns = GROUP["features"]
    means = [full_encode(coder, side.x)[:, columns].mean(0) for side in (mine, theirs)]
    return (means[0] - means[1]).square().mean()


def by_hand(method, mine, theirs, d):
    """A pair's loss from the objectives' definitions."""
    if method == "fpo":
        u = 0.1 * ((mine[0].mean - mine[1].mean) - (theirs[0].mean - theirs[1].mean))
        u = u - 0.5 * (0.1 * d[1] - 0.1 * d[0].detach())
    elif method == "simpo":
        u = 2.0 * (mine[0].mean - mine[1].mean) - 0.5
    else:
        u = 0.1 * ((mine[0].logp - mine[1].logp) - (theirs[0].logp - theirs[1].logp))
    if method == "tdpo2":
        kl = [
            (r.logps.exp() * (r.logps - p.logps)).sum() for p, r in zip(mine, theirs, strict=True)
        ]
        u = u - 0.5 * (0.1 * kl[1] - 0.1 * kl[0].detach())
    return -torch.nn.functional.logsigmoid(u)


def test_held_out_metrics_and_the_audit_are_of_the_scored_tokens(cached):
    sae = AttachedSae(load_coder(cached / "sae"), HERE)
    groups = Groups({"one": [1, 2]}, D_SAE)
    models = make_model(seed=5), make_model()
    examples = read(cached, tokens=False)
    found = score_heldout(*models, examples, sae, groups, k=8, tokens_per_batch=40)
    pooled = np.zeros((2, 2, D_SAE))
    for number, pair in enumerate(PAIRS):
        for side in (0, 1):
            with torch.no_grad():
                mine, theirs = (Plain(plain_model(seed=s), pair, side) for s in (5, 0))
            at = number, side
            assert found.tokens[at] == len(mine.scored)
            close(found.policy_logps[at], float(mine.logp))
            close(found.reference_logps[at], float(theirs.logp))
            kl = (theirs.logps.exp() * (theirs.logps - mine.logps)).sum()
            assert found.kl[at] == pytest.approx(float(kl), rel=1e-3)
            entropies = found.policy_entropy[at], found.reference_entropy[at]
            for entropy, plain in zip(entropies, (mine, theirs), strict=True):
                wanted = -(plain.logps.exp() * plain.logps).sum()
                assert entropy == pytest.approx(float(wanted), rel=1e-4)
            close(found.discrepancy[at], float(discrepancy(sae.coder, mine, theirs, True)))
            for place, plain in enumerate((theirs, mine)):
                pooled[place, side] += full_encode(sae.coder, plain.x).mean(0).numpy()
    close(found.features.reference, pooled[0])
    close(found.features.policy, pooled[1])
    audited, _ = audit_moments(*models, PAIRS, sae, groups, tokens_per_batch=40)
    close(audited.policy, pooled[1])


@pytest.mark.parametrize("pooled", [True, False])
def test_the_caches_start_training_and_those_of_other_ranges_do_not(cached, tmp_path, pooled):
    train = TrainSettings(lr=1e-3, k=8, pooled=pooled, groups=[GROUP])
    loss = PairLoss(train, [AttachedSae(load_coder(cached / "sae"), HERE)])
    examples = read(cached)
    side = cached_batch(examples, "cpu", workers.PINNED)

    def start(pairs):
        batch = collate(pairs)
        with torch.no_grad():
            found = loss(batch, forward_pairs(make_model(), batch, [HERE]), side)
        check_start(found, side, batch, [workers.sae(cached)], train, "float32")
        return found

    assert start([example.ids for example in examples]).losses.tolist() == pytest.approx(
        [math.log(2)] * len(PAIRS), abs=1e-5
    )
    # As many scored tokens, but others: nothing tells before the log-probs do.
    others = [PAIRS[0]._replace(unscored=([0, 3], PAIRS[0].unscored[1])), *PAIRS[1:]]
    with pytest.raises(FPOError, match=r"`reference`: the cached log-probs differ .*pair p0"):
        start(others)


def changed(root, folder, side, ranges):
    """The caches beside a table of pairs in which a side of the first pair has other ranges."""
    for name in ("reference", "pooled", "tokens"):
        (folder / f"{name}.parquet").symlink_to(root / f"{name}.parquet")
    table = pq.read_table(root / "pairs.parquet")
    rows = table.to_pylist()
    rows[0][f"{side}_unscored"] = ranges
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), folder / "pairs.parquet")
    return folder


@pytest.mark.parametrize(
    ("side", "ranges", "message"),
    [
        ("chosen", [], "chosen response of pair p0 has 7 scored tokens, reference was made of 4"),
        ("rejected", [1, 2], "rejected response of pair p0 has 5 scored tokens, ref.* made of 3"),
        ("chosen", [0, 3], "token row 0: .* features have the position 0 where 3 should be"),
    ],
)
def test_caches_of_other_ranges_are_refused_as_they_are_read(
    cached, tmp_path, side, ranges, message
):
    with pytest.raises(FPOError, match=message):
        read(changed(cached, tmp_path, side, ranges))


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    """Eight pairs to train on and as many that are held out."""
    root = tmp_path_factory.mktemp("unscored_heldout")
    save_model(root / "model")
    save_sae(root / "sae")
    pairs = [*PAIRS, *(pair._replace(pair_id=f"h{pair.pair_id}") for pair in PAIRS)]
    workers.write_caches(root, pairs, load_model(root / "model", dtype="float32", attention="sdpa"))
    return root


def test_workers_train_on_them_and_what_they_save_is_checked(heldout, tmp_path):
    """Unpooled, with numbers on held-out pairs; its last words are read in both formats."""
    one = workers.sae(heldout, tokens=["tokens"])
    spec = workers.job(heldout, tmp_path, (one,), pooled=False, epochs=4)
    monitored = {"monitor": MonitorSettings(heldout_steps=4), "tokens_per_batch": 30}
    records, measured = [], []
    run_workers(spec.model_copy(update=monitored), 1, records.append, on_heldout=measured.append)
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert records[-1]["loss"] < records[0]["loss"]
    assert measured[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert measured[0]["kl_chosen"] == pytest.approx(0, abs=1e-6)
    last = json.loads((tmp_path / LAST_FILE).read_text())
    assert last["pair"][4] == [list(ranges) for ranges in PAIRS[0].unscored]
    check_saved(tmp_path, "sdpa")
    policy = load_model(tmp_path / "model", dtype="float32", attention="sdpa")
    with torch.no_grad():
        batch = collate([PairIds(*last["pair"][:4])])
        every = forward_pairs(policy, batch, ()).logps.tolist()
    before = {"pair": last["pair"][:4], "logps": every}  # as it was written without ranges
    (tmp_path / LAST_FILE).write_text(json.dumps(before))
    check_saved(tmp_path, "sdpa")
    (tmp_path / LAST_FILE).write_text(json.dumps({**before, "logps": last["logps"]}))
    with pytest.raises(FPOError, match="pair p0 the log-prob"):
        check_saved(tmp_path, "sdpa")


@st.composite
def some_pairs(draw):
    """Two or three pairs whose responses have any ranges, but a scored token each."""
    ids = st.integers(2, 399)

    def response():
        mask = draw(st.lists(st.booleans(), min_size=1, max_size=9).filter(any))
        return draw(st.lists(ids, min_size=len(mask), max_size=len(mask))), mask

    pairs = []
    for number in range(draw(st.integers(2, 3))):
        (chosen, one), (rejected, other) = response(), response()
        prompt = draw(st.lists(ids, min_size=1, max_size=6))
        pairs.append(PairIds(f"p{number}", prompt, chosen, rejected, masked(one, other)))
    return pairs


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(pairs=some_pairs())
def test_any_ranges_give_what_a_mask_by_hand_gives(kind, pairs):
    """Log-probs and activations, padded on either side, in one batch and alone."""
    model = make_model(kind)
    with torch.no_grad():
        wanted = [Plain(plain_model(kind), pair, side) for pair in pairs for side in (0, 1)]
        batches = [
            *([collate(pairs, 7, padding_side=side) for side in ("right", "left")]),
            *(collate([pair]) for pair in pairs),
        ]
        found = [forward_pairs(model, batch, [HERE]) for batch in batches]
    together = [(batch, out, 0) for batch, out in zip(batches[:2], found[:2], strict=True)]
    alone = [
        (batch, out, 2 * number)
        for number, (batch, out) in enumerate(zip(batches[2:], found[2:], strict=True))
    ]
    for batch, out, first in together + alone:
        for response in range(len(batch.lengths)):
            one, mine = wanted[first + response], batch.response == response
            assert batch.lengths[response] == len(one.scored)
            assert batch.offsets[mine].tolist() == one.scored
            assert batch.targets[mine].tolist() == one.tokens
            close(out.logps[response], float(one.logp))
            torch.testing.assert_close(
                out.activations[0][mine].double(), one.x, rtol=1e-4, atol=1e-4
            )


@settings(max_examples=10, deadline=None)
@given(pairs=some_pairs())
def test_one_row_or_two_and_any_budget_give_the_same_tables(sae, pairs):
    rows = rows_of(pairs, PromptCost(0.0, 1e9))
    for row in rows:
        if len(row.responses) == 1:
            pair, side = divmod(int(row.responses[0]), 2)
            assert (row.ids.chosen, row.ids.unscored[0]) == (
                (pairs[pair].chosen, pairs[pair].rejected)[side],
                pairs[pair].unscored[side],
            )
            assert row.ids.unscored[1] == ()
    found = []
    for attention, budget in ((0.0, 64), (1e9, 64), (1e9, 25)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fpo_core.offline.prompt_cost", lambda _, a=attention: PromptCost(0.0, a))
            found.append(score(make_model(), pairs, sae, budget=budget))
    for other in found[1:]:
        same(found[0], other, exactly=False)
        for side in SIDES:
            close(found[0].reference[f"{side}_logp"], other.reference[f"{side}_logp"])
            np.testing.assert_array_equal(
                found[0].reference[f"{side}_tokens"], other.reference[f"{side}_tokens"]
            )


def test_a_share_of_the_tokens_is_drawn_by_their_position_in_the_response(sae):
    """The token at a position has a row or not, whatever else is scored."""
    half = FeatureSettings(tokens_share=0.5)
    whole = [pair._replace(unscored=((), ())) for pair in PAIRS]

    def drawn(pairs):
        tokens = score(make_model(), pairs, sae, settings=half).features[0].tokens
        names = (tokens[name].tolist() for name in ("pair_id", "side", "position"))
        return list(zip(*names, strict=True))

    scored = {
        (pair.pair_id, name, position)
        for pair in PAIRS
        for side, name in enumerate(SIDES)
        for position in side_of(pair, side)[1]
    }
    some = drawn(PAIRS)
    assert 0.2 < len(some) / len(scored) < 0.8
    assert some == [row for row in drawn(whole) if row in scored]


def test_collate_shows_its_layout():
    pair = PairIds("x", [10, 11], [20, 21, 22, 23, 1], [30, 31, 1], ([0, 1, 2, 4], [1, 2]))
    batch = collate([pair])
    assert batch.input_ids.tolist() == [[10, 11, 20, 21, 22, 23, 1, 30, 31, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 2, 3, 4]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 1, 1, 1, 2, 2, 2]]
    assert batch.positions.tolist() == [2, 5, 1, 8]
    assert batch.targets.tolist() == [21, 1, 30, 1]
    assert batch.offsets.tolist() == [1, 4, 0, 2]
    assert batch.response.tolist() == [0, 0, 1, 1]
    assert batch.lengths.tolist() == [2, 2]
    assert batch.num_tokens == pair.length == 10
    assert pair.scored == (2, 2)


@given(pairs=some_pairs(), left=st.booleans())
def test_without_ranges_a_batch_is_what_it_was(pairs, left):
    """Against the layout written out for answers of one turn, dtypes included."""
    plain = [PairIds(*pair[:4]) for pair in pairs]
    empty = [pair._replace(unscored=(np.empty(0, np.int32), [])) for pair in pairs]
    side = "left" if left else "right"
    batches = [collate(one, padding_side=side) for one in (plain, empty)]
    for one, other in zip(*(batch[1:] for batch in batches), strict=True):
        assert one.dtype == other.dtype == torch.int64
        assert torch.equal(one, other)
    positions, targets, width = [], [], max(pair.length for pair in plain)
    for row, pair in enumerate(plain):
        start = row * width + (width - pair.length if left else 0)
        begin = start + len(pair.prompt)
        for ids in (pair.chosen, pair.rejected):
            positions += [start + len(pair.prompt) - 1, *range(begin, begin + len(ids) - 1)]
            targets += ids
            begin += len(ids)
    lengths = [len(ids) for pair in plain for ids in (pair.chosen, pair.rejected)]
    batch = batches[0]
    assert (batch.positions.tolist(), batch.targets.tolist()) == (positions, targets)
    assert batch.lengths.tolist() == lengths
    assert batch.offsets.tolist() == [index for n in lengths for index in range(n)]


@pytest.mark.parametrize(
    "ranges", [[1], [2, 1], [1, 1], [0, 2, 2, 3], [0, 3, 2, 4], [3, 6], [-1, 2]]
)
def test_what_is_no_list_of_ranges_is_refused(ranges):
    with pytest.raises(AssertionError, match=r"range"):
        scored_tokens([5] * 5, ranges)


@given(mask=st.lists(st.booleans(), max_size=12))
def test_helpers_agree_with_the_mask(mask):
    (ranges,) = masked(mask)
    for given_ranges in (ranges, np.array(ranges, np.int32)):
        assert scored_tokens(mask, given_ranges).tolist() == np.flatnonzero(mask).tolist()
        assert num_scored(mask, given_ranges) == sum(mask)


def test_a_response_without_a_scored_token_is_refused(sae):
    pair = PAIRS[1]._replace(unscored=((), [0, 2]))
    with pytest.raises(AssertionError, match="pair p1 has an unscored response"):
        collate([PAIRS[0], pair])
    with pytest.raises(FPOError, match="pair p1 has a response without a scored token"):
        score(make_model(), [PAIRS[0], pair], sae)


def test_ranges_are_no_token_ids():
    """They may be larger than any, and neither make a row longer."""
    long = PairIds("x", [3], [2] * 600, [4], ([450, 599], ()))
    check_vocabulary([long], 400)
    assert long.length == 602
    (row,) = rows_of([long], PromptCost(1.0, 0.0))
    assert row.ids is long


def test_pairs_from_before_the_columns_are_read(cached, tmp_path):
    """As answers that are scored whole, by the offline pass, the audit and training."""
    plain = [pair._replace(unscored=((), ())) for pair in PAIRS]
    (tmp_path / "sae").symlink_to(cached / "sae")
    workers.write_caches(tmp_path, plain, make_model())
    table = pq.read_table(tmp_path / "pairs.parquet")
    old = table.drop_columns(["chosen_unscored", "rejected_unscored"])
    pq.write_table(old, tmp_path / "old.parquet")
    heldout = old.filter(np.arange(len(old)) % 2 == 1).combine_chunks()
    for found, wanted in (
        (read_pair_ids(table), plain),
        (read_pair_ids(old), plain),
        (read_pair_ids(heldout), plain[1::2]),
        ([example.ids for example in read(tmp_path, pairs="old")], plain),
    ):
        assert [as_lists(pair) for pair in found] == [as_lists(pair) for pair in wanted]
    new = read_pair_ids(pq.read_table(cached / "pairs.parquet").slice(2, 4))
    assert [as_lists(pair) for pair in new] == [as_lists(pair) for pair in PAIRS[2:6]]


def as_lists(pair):
    parts = (pair.prompt, pair.chosen, pair.rejected, *pair.unscored)
    return [pair.pair_id, *(np.asarray(part, np.int64).tolist() for part in parts)]
