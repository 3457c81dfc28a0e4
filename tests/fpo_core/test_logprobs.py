"""Chunked log-probs against the naive computation in float64, values and gradients."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fpo_core.logprobs import Head, entropies, kl_divergences, selected_logps, sum_by_response


def naive(hidden, weight, softcap):
    logits = hidden.double() @ weight.double().T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, -1)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 30), vocabulary=st.integers(2, 60), chunk=st.integers(1, 40),
    softcap=st.sampled_from([None, 5.0, 30.0]), scale=st.sampled_from([0.1, 1.0, 100.0, 3000.0]),
    seed=st.integers(0, 1000),
)  # fmt: skip
# Found once: logits of 60,000 whose terms cancel to within the soft cap's reach.
@example(tokens=12, vocabulary=7, chunk=1, softcap=5.0, scale=3000.0, seed=222)
def test_equals_naive_float64(tokens, vocabulary, chunk, softcap, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(tokens, 8, generator=generator)  # logits beyond 1e4 at the most
    weight = torch.randn(vocabulary, 8, generator=generator)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    upstream = torch.randn(tokens, generator=generator)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logps = selected_logps(h, Head(w, softcap), targets, chunk)
    (logps * upstream).sum().backward()

    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = naive(h64, w64, softcap).gather(1, targets[:, None]).squeeze(1)
    (expected * upstream.double()).sum().backward()
    size = max(1.0, float(expected.detach().abs().max()))
    # What float32 rounds off a logit's terms stays where they cancel.
    rounding = torch.finfo(torch.float32).eps * float((hidden.abs() @ weight.abs().T).max())
    assert (logps.double() - expected).abs().max() <= 2e-6 * size + rounding
    for got, want, factor in ((h.grad, h64.grad, weight), (w.grad, w64.grad, hidden)):
        bound = 1e-4 * max(1.0, float(want.abs().max()))
        bound += rounding * float(upstream.abs().sum() * factor.abs().max())
        assert (got.double() - want).abs().max() <= bound


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_gradients_pass_gradcheck_in_float64(softcap, scale):
    torch.manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    hidden, weight = draw(7, 4), draw(11, 4)
    other = Head(torch.randn(11, 4, dtype=torch.float64), softcap)
    reference, targets = torch.randn(7, 4, dtype=torch.float64), torch.arange(7)
    assert torch.autograd.gradcheck(
        lambda h, w: selected_logps(h, Head(w, softcap, scale), targets, 3), (hidden, weight)
    )
    assert torch.autograd.gradcheck(
        lambda h, w: kl_divergences(reference, other, h, Head(w, softcap, scale), 3),
        (hidden, weight),
    )


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 20), vocabulary=st.integers(2, 60), chunk=st.integers(1, 25),
    softcap=st.sampled_from([None, 5.0]), scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_kl_equals_naive_float64_with_its_gradient(tokens, vocabulary, chunk, softcap, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    ref, pol = (scale * torch.randn(tokens, 8, generator=generator) for _ in range(2))
    ref_weight, weight = (torch.randn(vocabulary, 8, generator=generator) for _ in range(2))
    h, w = pol.clone().requires_grad_(), weight.clone().requires_grad_()
    got = kl_divergences(ref, Head(ref_weight, softcap), h, Head(w, softcap), chunk)
    got.sum().backward()
    h64, w64 = pol.double().requires_grad_(), weight.double().requires_grad_()
    p, q = naive(ref, ref_weight, softcap), naive(h64, w64, softcap)
    want = (p.exp() * (p - q)).sum(-1)
    want.sum().backward()
    for ours, theirs, rounding in (
        (got, want, 1e-5),
        (h.grad, h64.grad, 1e-4),
        (w.grad, w64.grad, 1e-4),
    ):
        bound = rounding * max(1.0, float(theirs.detach().abs().max()))
        assert (ours.double() - theirs).abs().max() <= bound


def test_a_policy_equal_to_the_reference_has_no_divergence_and_no_gradient():
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4)
    kl = kl_divergences(hidden, Head(weight), hidden, Head(weight))
    kl.sum().backward()
    assert kl.abs().max() < 1e-6
    assert hidden.grad.abs().max() < 1e-6


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_logits_stay_finite(extreme):
    """A token that is all but certain, and one that is all but impossible."""
    hidden = torch.tensor([[extreme]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    logps = selected_logps(hidden.expand(3, 1), Head(weight), torch.arange(3))
    kl = kl_divergences(torch.zeros(3, 1), Head(weight), hidden.expand(3, 1), Head(weight))
    (logps.sum() + kl.sum()).backward()
    assert torch.isfinite(logps).all()
    assert torch.isfinite(kl).all()
    assert torch.isfinite(hidden.grad).all()
    assert sorted(logps.tolist()) == [-2e4, -1e4, 0.0]


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 20), vocabulary=st.integers(2, 60), chunk=st.integers(1, 25),
    softcap=st.sampled_from([None, 5.0]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_bfloat16_states_are_summed_in_float32(tokens, vocabulary, chunk, softcap, seed):
    """The logits are bfloat16 products; all after them is float32, and gradients are bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, 16, generator=generator).bfloat16().requires_grad_()
    w = torch.randn(vocabulary, 16, generator=generator).bfloat16().requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    low = selected_logps(h, Head(w, softcap), targets, chunk)
    low.sum().backward()
    assert low.dtype == torch.float32
    assert h.grad.dtype == w.grad.dtype == torch.bfloat16
    logits = (h.detach() @ w.detach().T).double()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    same_logits = torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(low.double(), same_logits, rtol=1e-5, atol=1e-5)
    h64, w64 = (leaf.detach().double().requires_grad_() for leaf in (h, w))
    exact = naive(h64, w64, softcap).gather(1, targets[:, None]).squeeze(1)
    exact.sum().backward()
    for got, want in ((h.grad, h64.grad), (w.grad, w64.grad)):
        assert (got.double() - want).norm() <= 0.05 * max(1.0, float(want.norm()))


def test_frozen_head_gets_no_gradient():
    hidden = torch.randn(5, 4, requires_grad=True)
    weight = torch.randn(9, 4)
    selected_logps(hidden, Head(weight), torch.arange(5)).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_backward_holds_no_tokens_by_vocabulary():
    """The largest tensor saved for backward is the weight itself, whatever the tokens."""
    saved = []
    hidden, weight = torch.randn(4096, 4, requires_grad=True), torch.randn(1000, 4)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        selected_logps(hidden, Head(weight, None), torch.zeros(4096, dtype=torch.int64)).sum()
    assert max(saved) <= max(weight.numel(), hidden.numel())


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_entropy_and_kl_equal_float64(softcap):
    torch.manual_seed(0)
    a, b = torch.randn(37, 8), torch.randn(37, 8)
    wa, wb = torch.randn(50, 8), torch.randn(50, 8)
    p, q = naive(a, wa, softcap), naive(b, wb, softcap)
    expected = (p.exp() * (p - q)).sum(-1)
    got = kl_divergences(a, Head(wa, softcap), b, Head(wb, softcap), chunk=10)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    entropy = -(p.exp() * p).sum(-1)
    got = entropies(a, Head(wa, softcap), chunk=10)
    torch.testing.assert_close(got.double(), entropy, rtol=1e-4, atol=1e-5)


def test_sum_by_response():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert sum_by_response(values, torch.tensor([0, 0, 2, 2]), 3).tolist() == [3.0, 0.0, 12.0]
