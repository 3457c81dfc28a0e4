"""The offline pass against the plain model and sae-lens' encoder in float64, pair by pair."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpo_core.data.batches import PairIds
from fpo_core.data.prompt_rows import PromptCost, one_row_pays, rows_of
from fpo_core.errors import FPOError
from fpo_core.features.stats import StatsMerge
from fpo_core.features.tables import FeatureTables, ScoredTokens
from fpo_core.hookpoint import Hookpoint
from fpo_core.models.budget import (
    TokenBudget,
    affordable_tokens,
    is_out_of_memory,
    token_budget,
)
from fpo_core.models.forward import prompt_cost
from fpo_core.offline import WantedFeatures, score_shard
from fpo_core.recipe.schema import FeatureSettings
from fpo_core.sae.coder import ActiveFeatures, load_coder
from tests.tiny import D_SAE, SAE_LAYER, make_model, save_sae

SETTINGS = FeatureSettings(cache_k=10, tokens_k=4, examples=3)
HERE = Hookpoint(SAE_LAYER)
RELATIVE = 1e-5  # of the largest value beside it


def score(model, pairs, sae, *, budget=64, want_reference=True, settings=SETTINGS, pinned=(3, 70)):
    wanted = [WantedFeatures(load_coder(sae), HERE, settings, pinned)] if sae else []
    return score_shard(
        model, pairs, wanted, want_reference=want_reference, budget=TokenBudget(budget)
    )


def plain(model, prompt, response):
    """Summed log-prob in float64 and the SAE's input of one response, by an ordinary pass."""
    ids = torch.tensor([[*prompt, *response]])
    seen = []
    handle = model.model.layers[SAE_LAYER].register_forward_hook(
        lambda *call: seen.append(call[2] if isinstance(call[2], torch.Tensor) else call[2][0])
    )
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double()
    handle.remove()
    positions = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
    logp = torch.log_softmax(logits[positions], -1)[torch.arange(len(response)), response].sum()
    return float(logp), seen[0][0][positions].double()


def close(found, wanted):
    wanted = np.asarray(wanted)
    scale = float(np.abs(wanted).max(initial=1e-3))
    np.testing.assert_allclose(found, wanted, atol=RELATIVE * scale, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_tables_equal_the_plain_computation(kind, pairs, sae):
    from sae_lens import SAE

    theirs = SAE.load_from_disk(sae, device="cpu", dtype="float32").double()
    model = make_model(kind)
    scores = score(model, pairs, sae)
    (features,) = scores.features
    pooled, tokens = features.pooled, features.tokens
    every, row, token = [], 0, 0
    for number, pair in enumerate(pairs):
        for side in ("chosen", "rejected"):
            response = list(getattr(pair, side))
            logp, x = plain(model, pair.prompt, response)
            assert scores.reference[f"{side}_logp"][number] == pytest.approx(logp, rel=1e-5)
            assert scores.reference[f"{side}_tokens"][number] == len(response)
            with torch.no_grad():
                acts = theirs.encode(x)
            mean = acts.mean(0)
            order = torch.sort(mean, descending=True, stable=True)
            positive = int((mean > 0).sum())
            stored = min(positive, SETTINGS.cache_k)
            assert pooled["pair_id"][row] == pair.pair_id
            assert pooled["side"][row] == side
            assert pooled["n_tokens"][row] == len(response)
            assert pooled["indices"][row].tolist() == order.indices[:stored].tolist()
            close(pooled["values"][row], order.values[:stored])
            close(pooled["pinned_values"][row], mean[[3, 70]])
            assert pooled["nonzero"][row] == positive
            close(pooled["mass"][row], float(mean.sum()))
            close(pooled["cutoff"][row], float(order.values[stored]) if positive > stored else 0.0)
            for position, found in enumerate(acts):
                assert tokens["pair_id"][token] == pair.pair_id
                assert tokens["side"][token] == side
                assert tokens["token_id"][token] == response[position]
                assert tokens["position"][token] == position
                top = torch.sort(found, descending=True, stable=True)
                kept = min(int((found > 0).sum()), SETTINGS.tokens_k)
                assert tokens["indices"][token].tolist() == top.indices[:kept].tolist()
                close(tokens["values"][token], top.values[:kept])
                assert tokens["nonzero"][token] == int((found > 0).sum())
                close(tokens["mass"][token], float(found.sum()))
                token += 1
            every.append((pair.pair_id, side, acts))
            row += 1
    assert token == len(tokens["position"])
    check_stats(features.stats, every)


def merged(shards):
    """The statistics of shards [(columns, pairs)]."""
    merge = StatsMerge(D_SAE, SETTINGS.examples)
    for stats, pairs in shards:
        merge.add(stats, np.array([pair.pair_id for pair in pairs]))
    return merge


def examples_of(columns, feature):
    found = columns["examples"]
    part = slice(*found["offsets"][feature : feature + 2])
    names = ("pair_id", "side", "position", "value")
    return list(zip(*(found[name][part].tolist() for name in names), strict=True))


def check_stats(stats, every):
    merge = StatsMerge(D_SAE, SETTINGS.examples)
    pair_ids = [pair_id for pair_id, side, _ in every if side == "chosen"]
    merge.add(stats, np.array(pair_ids))
    columns = merge.columns()
    acts = torch.cat([found for *_, found in every]).numpy()
    assert len(columns["feature"]) == D_SAE
    np.testing.assert_allclose(columns["density"], (acts > 0).mean(0), rtol=1e-6)
    close(columns["mean"], acts.mean(0))
    close(columns["max"], acts.max(0))
    for side in ("chosen", "rejected"):
        means = [found.numpy().mean(0) for _, name, found in every if name == side]
        close(columns[f"mean_{side}"], np.mean(means, axis=0))
    by_name = {(pair_id, side): found for pair_id, side, found in every}
    for feature in range(D_SAE):
        top = np.sort(acts[:, feature])[::-1][: SETTINGS.examples]
        found = examples_of(columns, feature)
        close([value for *_, value in found], top[top > 0])
        for pair_id, side, position, value in found:
            close(value, float(by_name[pair_id, side][position, feature]))
    kept = np.sort(acts, axis=1)[:, ::-1][:, : SETTINGS.tokens_k].sum()
    dropped = merge.dropped()
    assert dropped["tokens_mass"] == pytest.approx(1 - kept / acts.sum(), abs=1e-5)
    left = np.maximum((acts > 0).sum(1) - SETTINGS.tokens_k, 0)
    assert dropped["tokens_features"] == pytest.approx(left.mean())
    means = np.stack([found.numpy().mean(0) for *_, found in every])
    pooled = np.sort(means, axis=1)[:, ::-1][:, : SETTINGS.cache_k].sum()
    assert dropped["pooled_mass"] == pytest.approx(1 - pooled / means.sum(), abs=1e-5)
    left = np.maximum((means > 0).sum(1) - SETTINGS.cache_k, 0)
    assert dropped["pooled_features"] == pytest.approx(left.mean())


def same(one, other, *, exactly):
    """Two shards' columns."""
    for left, right in zip(one.features, other.features, strict=True):
        for table in left._fields:
            for name, column in getattr(left, table).items():
                match = getattr(right, table)[name]
                if name in ("example_responses", "example_positions") and not exactly:
                    continue  # both responses begin at the same position: rounding decides
                if exactly or name in ("pair_id", "side", "position", "token_id"):
                    np.testing.assert_array_equal(np.hstack(column), np.hstack(match))
                else:
                    close(np.hstack(column).astype(float), np.hstack(match).astype(float))


def test_the_batch_size_changes_nothing_but_rounding(pairs, sae):
    small, large = (score(make_model(), pairs, sae, budget=budget) for budget in (18, 4096))
    np.testing.assert_allclose(
        small.reference["chosen_logp"], large.reference["chosen_logp"], rtol=1e-5
    )
    same(small, large, exactly=False)


def test_features_alone_are_bitwise_what_all_together_give(pairs, sae, tmp_path):
    model, second = make_model(), load_coder(save_sae(tmp_path / "two", layer=2))
    saes = [
        WantedFeatures(load_coder(sae), HERE, SETTINGS, (3, 70)),
        WantedFeatures(second, Hookpoint(2), SETTINGS),
    ]

    def together(saes, want_reference):
        return score_shard(
            model, pairs, saes, want_reference=want_reference, budget=TokenBudget(64)
        )

    every = together(saes, want_reference=True)
    for number, sae_ in enumerate(saes):
        alone = together([sae_], want_reference=False)
        assert alone.reference is None
        same(alone, every._replace(features=(every.features[number],)), exactly=True)
    reference = together([], want_reference=True)
    np.testing.assert_array_equal(
        reference.reference["chosen_logp"], every.reference["chosen_logp"]
    )
    assert reference.features == ()
    assert reference.tokens == every.tokens == sum(pair.length for pair in pairs)


@pytest.mark.parametrize("want_reference", [True, False])
def test_for_features_alone_nothing_runs_after_the_deepest_sae(pairs, sae, want_reference):
    model, ran = make_model(), []
    inner = model.model
    for part in (inner.layers[SAE_LAYER], inner.layers[SAE_LAYER + 1], inner.norm):
        part.register_forward_pre_hook(lambda module, _inputs: ran.append(module))
    score(model, pairs, sae, want_reference=want_reference)
    assert inner.layers[SAE_LAYER] in ran
    for later in (inner.layers[SAE_LAYER + 1], inner.norm):
        assert (later in ran) == want_reference


def test_statistics_of_shards_merge_to_those_of_the_whole(pairs, sae):
    def stats(part):
        return score(make_model(), part, sae).features[0].stats

    whole = merged([(stats(pairs), pairs)]).columns()
    parts = merged([(stats(part), part) for part in (pairs[:1], pairs[1:4], pairs[4:])]).columns()
    for name in ("density", "mean", "max", "mean_chosen", "mean_rejected"):
        close(parts[name], whole[name])
    for feature in range(D_SAE):
        one, other = examples_of(parts, feature), examples_of(whole, feature)
        assert [example[:3] for example in one] == [example[:3] for example in other]


def test_a_share_of_the_tokens_is_drawn_by_what_they_are(pairs, sae):
    """Nothing else changes, and neither the batches nor the other pairs decide."""
    settings = SETTINGS.model_copy(update={"tokens_share": 0.5})
    every = score(make_model(), pairs, sae).features[0]
    some, alone = (
        score(make_model(), part, sae, settings=settings, budget=budget).features[0]
        for part, budget in ((pairs, 64), (pairs[3:5], 30))
    )

    def rows(tokens):
        names = ("pair_id", "side", "position")
        return list(zip(*(tokens[name].tolist() for name in names), strict=True))

    drawn = rows(some.tokens)
    assert 0.2 < len(drawn) / len(rows(every.tokens)) < 0.8
    assert drawn == [row for row in rows(every.tokens) if row in set(drawn)]
    assert rows(alone.tokens) == [row for row in drawn if row[0] in {p.pair_id for p in pairs[3:5]}]
    places = [rows(every.tokens).index(row) for row in drawn]
    for number, place in enumerate(places):
        np.testing.assert_array_equal(some.tokens["values"][number], every.tokens["values"][place])
    np.testing.assert_array_equal(some.stats["active"], every.stats["active"])
    np.testing.assert_array_equal(some.pooled["mass"], every.pooled["mass"])
    none = SETTINGS.model_copy(update={"tokens_share": 0.0})
    assert rows(score(make_model(), pairs, sae, settings=none).features[0].tokens) == []


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_tables_of_made_up_activations(pairs, data):
    """Few distinct values, so that ties are everywhere, and batches in any order."""
    d_sae, counts = 7, [(len(p.chosen), len(p.rejected)) for p in pairs]
    draw = np.random.default_rng(data.draw(st.integers(0, 999)))
    dense = {
        2 * n + side: draw.choice([0.0, 0.0, 1.0, 2.0], (counts[n][side], d_sae))
        for n in range(len(pairs)) for side in (0, 1)
    }  # fmt: skip
    k, cache_k = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    tables = FeatureTables(pairs, d_sae, FeatureSettings(cache_k=cache_k, tokens_k=k, examples=2))
    order = data.draw(st.permutations(range(len(pairs))))
    cut = data.draw(st.integers(0, len(pairs)))
    for batch in filter(None, (order[:cut], order[cut:])):
        responses = np.array([2 * n + side for n in batch for side in (0, 1)])
        acts = np.concatenate([dense[n] for n in responses])
        token, feature = acts.nonzero()
        active = ActiveFeatures(token, feature, acts[token, feature].astype(np.float32))
        lengths = np.array([len(dense[n]) for n in responses])
        scored = ScoredTokens(
            responses=responses,
            lengths=lengths,
            positions=np.concatenate([np.arange(length) for length in lengths]),
            targets=np.zeros(len(acts), np.int64),
        )
        tables.add(scored, active)
    pooled, tokens, stats = tables.columns()
    row = 0
    for response, acts in dense.items():
        mean = acts.mean(0)
        ranked = np.argsort(-mean, kind="stable")[: min(cache_k, int((mean > 0).sum()))]
        assert pooled["indices"][response].tolist() == ranked.tolist()
        np.testing.assert_allclose(pooled["values"][response], mean[ranked], rtol=1e-6)
        for found in acts:
            ranked = np.argsort(-found, kind="stable")[: min(k, int((found > 0).sum()))]
            assert tokens["indices"][row].tolist() == ranked.tolist()
            row += 1
    every = np.concatenate(list(dense.values()))
    np.testing.assert_array_equal(stats["active"], (every > 0).sum(0))
    np.testing.assert_array_equal(stats["max"], every.max(0))
    for feature in range(d_sae):
        ranked = sorted(
            (-acts[position, feature], response, position)
            for response, acts in dense.items()
            for position in np.flatnonzero(acts[:, feature])
        )
        names = ("values", "responses", "positions")
        found = zip(*(stats[f"example_{name}"][feature] for name in names), strict=True)
        assert [(-value, *place) for value, *place in found] == ranked[:2]


def test_which_tokens_are_drawn_does_not_depend_on_the_batches(pairs):
    settings = FeatureSettings(tokens_share=0.4)
    lengths = np.full(2 * len(pairs), 30)
    nothing = ActiveFeatures(*(np.empty(0, dtype) for dtype in (np.int64, np.int64, np.float32)))

    def drawn(batches):
        tables = FeatureTables(pairs, 3, settings)
        for batch in batches:
            tokens = ScoredTokens(
                responses=np.array(batch),
                lengths=lengths[batch],
                positions=np.tile(np.arange(30), len(batch)),
                targets=np.zeros(30 * len(batch), int),
            )
            tables.add(tokens, nothing)
        columns = tables.columns().tokens
        names = (columns[name].tolist() for name in ("pair_id", "side", "position"))
        return list(zip(*names, strict=True))

    every = list(range(2 * len(pairs)))
    whole = drawn([every])
    assert 0.25 < len(whole) / lengths.sum() < 0.55
    assert drawn([every[4:], every[:4]]) == whole
    assert len({position for *_, position in whole}) == 30  # not the same in each response


def test_a_prompt_is_computed_once_where_that_pays(pairs, sae):
    """The rule against the operations counted, and the tables either way."""
    cost = prompt_cost(make_model("llama-masked"))
    weights = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64 + 2 * 32
    assert cost == (2 * weights, 4 * 4 * 8)
    assert prompt_cost(make_model()) == (2 * weights, 0)  # by parts nothing is masked
    short = PairIds("p", [1], [2] * 300, [3] * 300)
    long = PairIds("p", [1] * 300, [2] * 20, [3] * 20)
    assert [one_row_pays(pair, cost) for pair in (short, long)] == [False, True]
    assert [row.responses.tolist() for row in rows_of([short, long], cost)] == [[0], [1], [2, 3]]

    def found(attention):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fpo_core.offline.prompt_cost", lambda _: PromptCost(1.0, attention))
            return score(make_model(), pairs, sae)

    once, twice = found(0.0), found(1e9)
    assert once.tokens == sum(pair.length for pair in pairs)
    # A pair whose prompt outweighs its answers saves attention too.
    assert twice.tokens > once.tokens
    same(once, twice, exactly=False)
    for side in ("chosen_logp", "rejected_logp"):
        np.testing.assert_allclose(once.reference[side], twice.reference[side], rtol=1e-5)


def short_of_memory(model, limit):
    """The model as on a GPU that holds so many tokens."""
    sizes = []

    def refuse(_module, _args, kwargs):
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    return model, sizes


def test_out_of_memory_halves_the_batches_once(pairs, sae, caplog):
    model, sizes = short_of_memory(make_model(), 40)
    with caplog.at_level(logging.WARNING):
        found = score(model, pairs, sae, budget=60)
    assert sum(size > 40 for size in sizes) == 1
    assert "half the tokens a forward pass, 30" in caplog.text
    same(found, score(make_model(), pairs, sae, budget=30), exactly=True)
    model, _ = short_of_memory(make_model(), 20)
    with pytest.raises(FPOError, match=r"out of memory with 30 tokens.*tokens_per_batch"):
        score(model, pairs, sae, budget=60)


@pytest.mark.parametrize(
    ("want_reference", "what"), [(True, "log-probs"), (False, "activations at layer 1 resid_post")]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(pairs, sae, want_reference, what, value):
    """In one of the pairs that share a batch; no feature fires at NaN."""
    model, bad = make_model("llama-masked"), pairs[2]  # whose rows are of one pair each
    rows = []

    def read(_module, _args, kwargs):
        rows[:] = (kwargs["input_ids"][:, 0] == bad.prompt[0]).nonzero().flatten().tolist()

    def poison(_module, _inputs, output):
        output[rows, len(bad.prompt) :] = value

    model.model.register_forward_pre_hook(read, with_kwargs=True)
    model.model.layers[0].register_forward_hook(poison)
    with pytest.raises(FPOError, match=rf"{what} are not finite .* in the pairs p2: .*dtype"):
        score(model, pairs, sae, want_reference=want_reference)


def test_many_pairs_of_numbers_that_are_not_finite_are_counted(pairs, sae):
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(FPOError, match=r"in the pairs p\d, p\d, p\d and 3 more: "):
        score(model, pairs, sae, budget=10_000)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_an_empty_response_is_told_with_its_pair(pairs, sae, side):
    with pytest.raises(FPOError, match="pair p3 has an empty response.*rerun from tokenize"):
        score(make_model(), [*pairs[:3], pairs[3]._replace(**{side: ()})], sae)


def test_a_budget_below_the_longest_pair_names_it(pairs, sae):
    longest = max(pairs, key=lambda pair: pair.length)
    with pytest.raises(FPOError, match=f"=9 is too small for pair {longest.pair_id}, .*`auto`"):
        score(make_model(), pairs, sae, budget=9)
    TokenBudget(9, given=False).check(pairs)  # of one that was found, each goes alone


@pytest.mark.parametrize("given", [True, False])
def test_a_pair_longer_than_the_halved_budget_goes_alone(pairs, sae, given):
    """In the shard that ran out of memory and in those after it, whose budget stays halved."""
    longest = max(pair.length for pair in pairs)
    model, sizes = short_of_memory(make_model(), longest)
    wanted = [WantedFeatures(load_coder(sae), HERE, SETTINGS)]
    budget = TokenBudget(longest + 6, given=given)
    shards = [
        score_shard(model, part, wanted, want_reference=True, budget=budget)
        for part in (pairs, pairs[::-1], pairs)
    ]
    assert sum(size > longest for size in sizes) == 1
    assert budget.tokens == (longest + 6) // 2 < longest
    same(shards[0], shards[2], exactly=True)
    assert [shard.tokens for shard in shards] == [sum(pair.length for pair in pairs)] * 3


@pytest.mark.parametrize(
    ("said", "short"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`", False),
    ],
)
def test_what_torch_says_when_memory_is_short(said, short):
    assert is_out_of_memory(RuntimeError(said)) == short


def test_the_budget_that_is_found():
    assert affordable_tokens(60e9, 1.5e6) == 19 * 1024  # half of it in thousands
    assert affordable_tokens(70e9, 1e5) == 65_536
    assert affordable_tokens(1e6, 1e6) == 1024
    assert token_budget(make_model(), 77, 100).tokens == 77
    assert token_budget(make_model(), "auto", 100).tokens == 2048
