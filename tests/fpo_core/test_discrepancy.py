"""Feature discrepancy: hand-worked values, a float64 reference, an exact gradient."""

from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpo_core.features.discrepancy import (
    CachedFeatures,
    Responses,
    feature_discrepancy,
    group_discrepancies,
    token_discrepancy,
)
from fpo_core.features.pool import TopFeatures, pool_features, top_features
from fpo_core.sae.coder import SparseCoder


def make_coder(d_in=6, d_sae=20, seed=0, centred=True, kind="jumprelu"):
    g = torch.Generator().manual_seed(seed)
    coder = SparseCoder(
        torch.randn(d_in, d_sae, generator=g), 0.1 * torch.randn(d_sae, generator=g),
        0.5 * torch.rand(d_sae, generator=g), torch.randn(d_sae, d_in, generator=g),
        0.1 * torch.randn(d_in, generator=g), centred, "",
    )  # fmt: skip
    if kind == "jumprelu":
        return coder
    coder = coder._replace(threshold=torch.zeros(d_sae))
    if kind == "topk":
        return coder._replace(k=4)
    if kind == "gated":
        b_gate, r_mag = (0.3 * torch.randn(d_sae, generator=g) for _ in range(2))
        vectors = {"b_mag": coder.b_enc, "b_gate": b_gate, "r_mag": r_mag}
        return coder._replace(architecture="gated", vectors=vectors)
    return coder


def full_encode(coder, x):
    """Each architecture's definition, written out in float64 and differentiable."""
    W, b, thr, b_dec = (
        t.double() for t in (coder.W_enc, coder.b_enc, coder.threshold, coder.b_dec)
    )
    projected = (x.double() - b_dec * coder.centred) @ W
    if coder.architecture == "gated":
        b_mag, b_gate, r_mag = (vector.double() for vector in coder.vectors.values())
        return (projected + b_gate > 0) * torch.relu(projected * r_mag.exp() + b_mag)
    pre = projected + b
    if coder.k is not None:
        kth = pre.sort(dim=1, descending=True).values[:, coder.k - 1, None]
        return torch.relu(pre) * (pre >= kth)
    return pre * (pre > thr) * (pre > 0)


def d_of_row(mine, theirs, k, index_set="union"):
    """D of one row of features, in float64, by sorting in Python."""

    def top(values):
        order = sorted(range(len(values)), key=lambda i: (-float(values[i]), i))[:k]
        return {i for i in order if values[i] > 0}

    sets = {"policy": top(mine.detach()), "reference": top(theirs)}
    union = sorted(set().union(*sets.values()) if index_set == "union" else sets[index_set])
    return ((mine[union] - theirs[union]) ** 2).sum() / k


def by_the_paper(coder, x, lengths, reference, k):
    """Eq. 10 in float64 from the dense reference, differentiating the full encode."""
    acts = full_encode(coder, x)
    return torch.stack(
        [
            d_of_row(tokens.mean(0), reference[row].double(), k)
            for row, tokens in enumerate(torch.split(acts, lengths.tolist()))
        ]
    )


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), k=st.integers(1, 25),
    seed=st.integers(0, 500), shift=st.sampled_from([0.0, 0.3, -50.0]), centred=st.booleans(),
    kind=st.sampled_from(["jumprelu", "standard", "topk", "gated"]),
)  # fmt: skip
def test_value_and_gradient_equal_the_full_encode(lengths, k, seed, shift, centred, kind):
    """With all-zero features (shift -50, a positive-only encoder) and one-token responses."""
    coder = make_coder(seed=seed, centred=centred, kind=kind)
    if shift == -50.0:
        coder = coder._replace(b_enc=coder.b_enc - 50)
    g = torch.Generator().manual_seed(seed + 1)
    counts = torch.tensor(lengths)
    response = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    x = torch.randn(len(response), 6, generator=g)
    reference = pool_features(coder, x + 0.5 * torch.randn(x.shape, generator=g), response, counts)
    stored = top_features(reference, coder.d_sae)
    mine = x.clone().requires_grad_()
    got = feature_discrepancy(
        coder,
        Responses(mine, response, counts),
        CachedFeatures(stored, torch.zeros(len(counts))),
        k,
    )
    got.values.sum().backward()
    x64 = x.double().requires_grad_()
    want = by_the_paper(coder, x64, counts, reference, k)
    want.sum().backward()
    torch.testing.assert_close(got.values.double(), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mine.grad.double(), x64.grad, rtol=1e-4, atol=1e-5)
    assert got.missing.sum() == 0


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), k=st.integers(1, 22),
    seed=st.integers(0, 500), kind=st.sampled_from(["jumprelu", "standard", "topk", "gated"]),
    index_set=st.sampled_from(["union", "policy", "reference"]),
)  # fmt: skip
def test_unpooled_values_and_gradients_equal_the_full_encode(lengths, k, seed, kind, index_set):
    """Each token's D in float64, averaged over the response; chunks end inside responses."""
    coder = make_coder(seed=seed, kind=kind)
    g = torch.Generator().manual_seed(seed + 1)
    counts = torch.tensor(lengths)
    response = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    x = torch.randn(len(response), 6, generator=g)
    theirs = coder.encode(x + 0.5 * torch.randn(x.shape, generator=g))
    cached = CachedFeatures(top_features(theirs, coder.d_sae), torch.zeros(len(x)))
    mine = x.clone().requires_grad_()
    with mock.patch("fpo_core.sae.coder.CHUNK_ELEMENTS", 3 * coder.d_sae):
        got = token_discrepancy(coder, Responses(mine, response, counts), cached, k, index_set)
        if got.values.requires_grad:
            got.values.sum().backward()
    x64 = x.double().requires_grad_()
    acts = full_encode(coder, x64)
    each = torch.stack(
        [d_of_row(a, t.double(), k, index_set) for a, t in zip(acts, theirs, strict=True)]
    )
    want = torch.stack([tokens.mean() for tokens in torch.split(each, lengths)])
    want.sum().backward()
    torch.testing.assert_close(got.values.double(), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mine.grad.double(), x64.grad, rtol=1e-4, atol=1e-5)
    assert got.missing.sum() == 0


def test_unpooled_tokens_that_are_cut_short_count_what_is_missing():
    coder = SparseCoder(
        torch.eye(3), torch.zeros(3), torch.zeros(3), torch.eye(3), torch.zeros(3), False, ""
    )
    x = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 4.0]])
    stored = TopFeatures(torch.tensor([[0], [1]]), torch.tensor([[2.0], [2.0]]))
    policy = Responses(x, torch.tensor([0, 0]), torch.tensor([2]))
    got = token_discrepancy(coder, policy, CachedFeatures(stored, torch.tensor([2.0, 0.0])), 2)
    # token 0: (3 - 2)^2 + (1 - 0)^2, feature 1 is missing; token 1: all is stored, feature 2 is 0
    assert got.values.tolist() == [((1 + 1) / 2 + (0 + 16) / 2) / 2]
    assert got.missing.tolist() == [1]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 500),
    kind=st.sampled_from(["jumprelu", "standard", "topk", "gated"]),
)  # fmt: skip
def test_groups_equal_the_full_encode(lengths, seed, kind):
    """Mean squared change of each group, with its gradient; groups may share features."""
    coder = make_coder(seed=seed, kind=kind)
    g = torch.Generator().manual_seed(seed + 1)
    counts = torch.tensor(lengths)
    response = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    x = torch.randn(len(response), 6, generator=g)
    theirs = pool_features(coder, x + torch.randn(x.shape, generator=g), response, counts)
    groups = [torch.tensor([3, 11, 4]), torch.tensor([11])]
    reference = theirs[:, torch.cat(groups)]
    mine = x.clone().requires_grad_()
    got = group_discrepancies(coder, Responses(mine, response, counts), groups, reference)
    (got @ torch.tensor([1.0, 3.0])).sum().backward()
    x64 = x.double().requires_grad_()
    means = torch.stack(
        [tokens.mean(0) for tokens in torch.split(full_encode(coder, x64), lengths)]
    )
    squares = (means - theirs.double()) ** 2
    want = torch.stack([squares[:, [3, 4, 11]].mean(1), squares[:, 11]], 1)
    (want @ torch.tensor([1.0, 3.0], dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mine.grad.double(), x64.grad, rtol=1e-4, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.integers(0, 3), min_size=9, max_size=9),
            st.lists(st.integers(0, 3), min_size=9, max_size=9),
        ),
        min_size=1, max_size=4,
    ),
    k=st.integers(1, 9),
)  # fmt: skip
def test_ties_and_zeros_give_one_well_defined_d(rows, k):
    """Whole numbers: most values are tied, many zero; ties go to the lower index on both sides."""
    coder = SparseCoder(
        torch.eye(9), torch.zeros(9), torch.zeros(9), torch.eye(9), torch.zeros(9), False, ""
    )
    x, theirs = (torch.tensor(side, dtype=torch.float32) for side in zip(*rows, strict=True))
    count = len(rows)
    policy = Responses(x, torch.arange(count), torch.ones(count, dtype=torch.int64))
    cached = CachedFeatures(top_features(theirs, 9), torch.zeros(count))
    got = feature_discrepancy(coder, policy, cached, k).values
    want = torch.stack(
        [d_of_row(m.double(), t.double(), k) for m, t in zip(x, theirs, strict=True)]
    )
    torch.testing.assert_close(got.double(), want)


def test_pooling_does_not_depend_on_chunks():
    coder = make_coder()
    lengths = torch.tensor([1, 7, 2, 5])
    response = torch.repeat_interleave(torch.arange(4), lengths)
    x = torch.randn(15, 6)
    want = torch.stack([tokens.mean(0) for tokens in coder.encode(x).split(lengths.tolist())])
    for tokens in (1, 2, 4, 15):
        with mock.patch("fpo_core.sae.coder.CHUNK_ELEMENTS", tokens * coder.d_sae):
            torch.testing.assert_close(pool_features(coder, x, response, lengths), want)


def test_the_index_set_may_be_one_sides_top_k():
    """Features 0 and 1 are the policy's top, 2 and 1 the reference's."""
    coder = SparseCoder(
        torch.eye(4), torch.zeros(4), torch.zeros(4), torch.eye(4), torch.zeros(4), False, ""
    )
    x = torch.tensor([[4.0, 3.0, 1.0, 0.5]])
    stored = TopFeatures(torch.tensor([[2, 1, 0]]), torch.tensor([[5.0, 2.0, 1.0]]))
    one, zero = torch.tensor([1]), torch.tensor([0])

    def value(index_set):
        cached = CachedFeatures(stored, torch.zeros(1))
        return feature_discrepancy(
            coder, Responses(x, zero, one), cached, 2, index_set
        ).values.item()  # fmt: skip

    assert value("policy") == ((4 - 1) ** 2 + (3 - 2) ** 2) / 2
    assert value("reference") == ((1 - 5) ** 2 + (3 - 2) ** 2) / 2
    assert value("union") == ((4 - 1) ** 2 + (3 - 2) ** 2 + (1 - 5) ** 2) / 2


def test_same_activations_give_zero():
    coder = make_coder()
    x = torch.randn(7, 6)
    counts, response = torch.tensor([3, 4]), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    stored = top_features(pool_features(coder, x, response, counts), 20)
    got = feature_discrepancy(
        coder, Responses(x, response, counts), CachedFeatures(stored, torch.zeros(2)), 5
    )
    assert got.values.max() < 1e-12


def test_index_that_is_not_stored_reads_as_zero_and_is_counted():
    """A reference that stores one feature; the policy's top 2 needs another."""
    coder = SparseCoder(
        torch.eye(3), torch.zeros(3), torch.zeros(3), torch.eye(3), torch.zeros(3), False, ""
    )
    x = torch.tensor([[3.0, 1.0, 0.0]])
    stored = TopFeatures(torch.tensor([[0, -1]]), torch.tensor([[2.0, 0.0]]))
    policy = Responses(x, torch.tensor([0]), torch.tensor([1]))
    got = feature_discrepancy(coder, policy, CachedFeatures(stored, torch.tensor([0.7])), 2)
    assert got.values.tolist() == [((3 - 2) ** 2 + (1 - 0) ** 2) / 2]
    assert got.missing.tolist() == [1]
    whole = feature_discrepancy(coder, policy, CachedFeatures(stored, torch.tensor([0.0])), 2)
    assert whole.missing.tolist() == [0]  # cutoff 0: all is stored, 0 is the true value


def test_a_pinned_value_answers_for_an_index_that_is_not_stored():
    coder = SparseCoder(
        torch.eye(3), torch.zeros(3), torch.zeros(3), torch.eye(3), torch.zeros(3), False, ""
    )
    policy = Responses(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([0]), torch.tensor([1]))
    stored = TopFeatures(torch.tensor([[0]]), torch.tensor([[2.0]]))
    pinned = TopFeatures(torch.tensor([[1, 2]]), torch.tensor([[0.5, 0.0]]))
    got = feature_discrepancy(coder, policy, CachedFeatures(stored, torch.tensor([0.7]), pinned), 2)
    assert got.values.tolist() == [((3 - 2) ** 2 + (1 - 0.5) ** 2) / 2]
    assert got.missing.tolist() == [0]


def test_top_features_breaks_ties_by_lower_index_and_skips_zeros():
    top = top_features(torch.tensor([[0.0, 2.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.5]]), 3)
    assert top.indices.tolist() == [[1, 3, 2], [4, -1, -1]]
    assert top.values.tolist() == [[2.0, 2.0, 1.0], [0.5, 0.0, 0.0]]
