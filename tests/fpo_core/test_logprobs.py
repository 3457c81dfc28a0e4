"""Chunked log-probs against the naive computation in float64, values and gradients."""

import pytest
import torch
from hypothesis import given, settings
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
    softcap=st.sampled_from([None, 5.0, 30.0]), scale=st.sampled_from([0.1, 1.0, 100.0]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_equals_naive_float64(tokens, vocabulary, chunk, softcap, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(tokens, 8, generator=generator)
    weight = torch.randn(vocabulary, 8, generator=generator)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    upstream = torch.randn(tokens, generator=generator)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logps = selected_logps(h, Head(w, softcap), targets, chunk)
    (logps * upstream).sum().backward()

    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = naive(h64, w64, softcap).gather(1, targets[:, None]).squeeze(1)
    (expected * upstream.double()).sum().backward()
    size = max(1.0, float(expected.abs().max()))
    assert (logps.double() - expected).abs().max() <= 2e-6 * size
    for got, want in ((h.grad, h64.grad), (w.grad, w64.grad)):
        bound = 1e-4 * max(1.0, float(want.abs().max()))
        assert (got.double() - want).abs().max() <= bound


def test_frozen_head_gets_no_gradient():
    hidden = torch.randn(5, 4, requires_grad=True)
    weight = torch.randn(9, 4)
    selected_logps(hidden, Head(weight, None), torch.arange(5)).sum().backward()
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
