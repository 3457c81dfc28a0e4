"""When the cut-cross-entropy kernel is used: limits, comparison with the plain path, a GPU."""

import logging

import pytest
import torch

from fpo_core import logprob_kernel
from fpo_core.logprobs import Head, selected_logps

BF16, CAP = torch.bfloat16, 30.0


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"dtype": torch.float32, "weight_dtype": torch.float32}, False),
        ({"weight_dtype": torch.float32}, False),
        ({"tokens": 0}, False),
        ({"vocabulary": 256_001}, False),
        ({"vocabulary": 256_001, "softcap": None}, True),
        ({"vocabulary": 1_048_576}, False),  # times 2,304: offsets of 32 bits overflow
    ],
)
def test_what_the_kernel_gets_wrong_is_not_asked_of_it(changed, expected):
    gemma = {
        "dtype": BF16, "weight_dtype": BF16, "tokens": 4096, "width": 2304, "vocabulary": 256_000,
        "softcap": CAP,
    }  # fmt: skip
    assert logprob_kernel.supported(**{**gemma, **changed}) is expected


def test_nothing_is_chosen_on_a_cpu():
    hidden, weight = torch.zeros(4, 8, dtype=BF16), torch.zeros(128, 8, dtype=BF16)
    assert not logprob_kernel.applies(hidden, weight, None)


def naive(hidden, weight, targets, softcap=CAP):
    logits = (hidden @ weight.T).float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)


def without_softcap(hidden, weight, targets):
    return naive(hidden, weight, targets, None)


def without_the_heads_gradient(hidden, weight, targets):
    return naive(hidden, 0 * weight + weight.detach(), targets)


def that_fails(hidden, weight, targets):
    raise RuntimeError("no compiler")


def plain(hidden, weight, targets):
    return selected_logps(hidden, Head(weight, CAP), targets, 16)


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        (naive, True),
        (without_softcap, False),
        (without_the_heads_gradient, False),
        (that_fails, False),
    ],
)
def test_a_kernel_that_differs_is_not_used_and_said(candidate, expected, monkeypatch, caplog):
    """Compared as in a run: bfloat16 inputs, logits up to where the soft-cap bends them."""
    monkeypatch.setattr(logprob_kernel, "_verdicts", {})
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 32, generator=draw).to(BF16)
    weight = (3 * torch.randn(384, 32, generator=draw)).to(BF16)
    targets = torch.randint(384, (40,), generator=draw)
    with caplog.at_level(logging.INFO, "fpo.kernel"):
        for _ in range(2):
            found = logprob_kernel.agrees(candidate, plain, hidden, weight, targets, (CAP, 1.0))
            assert found is expected
    (said,) = caplog.messages  # asked once a head
    assert ("not used" in said) is not expected


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, CAP])
def test_the_kernel_on_a_gpu_equals_the_plain_path(softcap):
    pytest.importorskip("cut_cross_entropy")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    hidden = torch.randn(512, 256, device="cuda").to(BF16)
    weight = (0.2 * torch.randn(49_152, 256, device="cuda")).to(BF16)
    targets = torch.randint(49_152, (512,), device="cuda")
    assert logprob_kernel.applies(hidden, weight, softcap)
    results = []
    for precise in (False, True):
        leaves = [t.float() if precise else t.clone() for t in (hidden, weight)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        logps = selected_logps(leaves[0], Head(leaves[1], softcap), targets)
        logps.sum().backward()
        results.append((logps.detach(), *(leaf.grad.float() for leaf in leaves)))
    (logps, *gradients), (expected, *wanted) = results
    assert (logps - expected).abs().max() < 0.05
    for got, want in zip(gradients, wanted, strict=True):
        assert (got - want).norm() < logprob_kernel.GRADIENT_TOLERANCE * want.norm()
