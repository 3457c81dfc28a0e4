"""Feature discrepancy: hand-worked values, a float64 reference, an exact gradient."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpo_core.features.discrepancy import feature_discrepancy
from fpo_core.features.pool import TopFeatures, pool_features, top_features
from fpo_core.sae.coder import Gate, SparseCoder


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
        bias, scale = (0.3 * torch.randn(d_sae, generator=g) for _ in range(2))
        return coder._replace(gate=Gate(bias, scale.exp()))
    return coder


def full_encode(coder, x):
    """Each architecture's definition, written out in float64 and differentiable."""
    W, b, thr, b_dec = (
        t.double() for t in (coder.W_enc, coder.b_enc, coder.threshold, coder.b_dec)
    )
    projected = (x.double() - b_dec * coder.centred) @ W
    if coder.gate is not None:
        on = projected + coder.gate.bias.double() > 0
        return on * torch.relu(projected * coder.gate.scale.double() + b)
    pre = projected + b
    if coder.k is not None:
        kth = pre.sort(dim=1, descending=True).values[:, coder.k - 1, None]
        return torch.relu(pre) * (pre >= kth)
    return pre * (pre > thr) * (pre > 0)


def by_the_paper(coder, x, lengths, reference, k):
    """Eq. 10 in float64 from the dense reference, differentiating the full encode."""
    acts = full_encode(coder, x)
    out = []
    for row, tokens in enumerate(torch.split(acts, lengths.tolist())):
        mine, theirs = tokens.mean(0), reference[row].double()

        def top(values):
            order = sorted(range(len(values)), key=lambda i: (-float(values[i]), i))[:k]
            return {i for i in order if values[i] > 0}

        union = sorted(top(mine.detach()) | top(theirs))
        out.append(((mine[union] - theirs[union]) ** 2).sum() / k)
    return torch.stack(out)


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
    got = feature_discrepancy(coder, mine, response, counts, stored, torch.zeros(len(counts)), k)
    got.values.sum().backward()
    x64 = x.double().requires_grad_()
    want = by_the_paper(coder, x64, counts, reference, k)
    want.sum().backward()
    torch.testing.assert_close(got.values.double(), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mine.grad.double(), x64.grad, rtol=1e-4, atol=1e-5)
    assert got.missing.sum() == 0


def test_the_index_set_may_be_one_sides_top_k():
    """Features 0 and 1 are the policy's top, 2 and 1 the reference's."""
    coder = SparseCoder(
        torch.eye(4), torch.zeros(4), torch.zeros(4), torch.eye(4), torch.zeros(4), False, ""
    )
    x = torch.tensor([[4.0, 3.0, 1.0, 0.5]])
    stored = TopFeatures(torch.tensor([[2, 1, 0]]), torch.tensor([[5.0, 2.0, 1.0]]))
    one, zero = torch.tensor([1]), torch.tensor([0])

    def value(index_set):
        return feature_discrepancy(
            coder, x, zero, one, stored, torch.zeros(1), 2, index_set
        ).values.item()  # fmt: skip

    assert value("policy") == ((4 - 1) ** 2 + (3 - 2) ** 2) / 2
    assert value("reference") == ((1 - 5) ** 2 + (3 - 2) ** 2) / 2
    assert value("union") == ((4 - 1) ** 2 + (3 - 2) ** 2 + (1 - 5) ** 2) / 2


def test_same_activations_give_zero():
    coder = make_coder()
    x = torch.randn(7, 6)
    counts, response = torch.tensor([3, 4]), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    stored = top_features(pool_features(coder, x, response, counts), 20)
    got = feature_discrepancy(coder, x, response, counts, stored, torch.zeros(2), 5)
    assert got.values.max() < 1e-12


def test_index_that_is_not_stored_reads_as_zero_and_is_counted():
    """A reference that stores one feature; the policy's top 2 needs another."""
    coder = SparseCoder(
        torch.eye(3), torch.zeros(3), torch.zeros(3), torch.eye(3), torch.zeros(3), False, ""
    )
    x = torch.tensor([[3.0, 1.0, 0.0]])
    stored = TopFeatures(torch.tensor([[0, -1]]), torch.tensor([[2.0, 0.0]]))
    one = torch.tensor([1])
    got = feature_discrepancy(coder, x, torch.tensor([0]), one, stored, torch.tensor([0.7]), 2)
    assert got.values.tolist() == [((3 - 2) ** 2 + (1 - 0) ** 2) / 2]
    assert got.missing.tolist() == [1]
    whole = feature_discrepancy(coder, x, torch.tensor([0]), one, stored, torch.tensor([0.0]), 2)
    assert whole.missing.tolist() == [0]  # cutoff 0: all is stored, 0 is the true value


def test_top_features_breaks_ties_by_lower_index_and_skips_zeros():
    top = top_features(torch.tensor([[0.0, 2.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.5]]), 3)
    assert top.indices.tolist() == [[1, 3, 2], [4, -1, -1]]
    assert top.values.tolist() == [[2.0, 2.0, 1.0], [0.5, 0.0, 0.0]]
