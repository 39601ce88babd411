"""soft_topk_mask against oracles, its limits, its bars and its gradients."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import couplings as cp
from couplings.selection.api import DEFAULT_EPSILON, MASK_METHODS
from couplings.testing import SCORE_KINDS, score_rows, topk_mask_by_bisection

EXAMPLE = torch.tensor([0.4, 0.7, 2.3, 1.9, -0.2, 1.4, 0.1], dtype=torch.float64)
THRESHOLDS = ("transport", "laplace", "gaussian", "sparse")
BAR = {torch.float64: 1e-9, torch.float32: 2e-6}


def call(x, k, method="transport", **options):
    """The operator with its noise fixed."""
    if method == "gumbel":
        options["generator"] = torch.Generator(x.device).manual_seed(3)
    return cp.soft_topk_mask(x, k, method=method, **options)


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.01, 1e-3])
@pytest.mark.parametrize("k", [1, 3, 10, 19])
def test_equals_bisection(k, epsilon):
    x = torch.randn(5, 20, dtype=torch.float64)
    scale = 2 / (epsilon * x.std(-1, keepdim=True, correction=0))
    expected = topk_mask_by_bisection(x, torch.full((5, 1), float(k)), scale)
    torch.testing.assert_close(cp.soft_topk_mask(x, k, epsilon=epsilon), expected, atol=1e-10, rtol=0)


def test_weighted_fractional_per_row_equals_bisection():
    x, weights = torch.randn(4, 15, dtype=torch.float64), torch.rand(4, 15, dtype=torch.float64)
    weights[0, :5] = 0
    k = torch.tensor([0.3, 4.0, 7.5, 14.2], dtype=torch.float64)
    total = weights.sum(-1, keepdim=True)
    mean = (weights * x).sum(-1, keepdim=True) / total
    std = ((weights * (x - mean) ** 2).sum(-1, keepdim=True) / total).sqrt()
    expected = topk_mask_by_bisection(x, k.unsqueeze(-1) * total / 15, 2 / (0.2 * std), weights)
    actual = cp.soft_topk_mask(x, k, epsilon=0.2, weights=weights)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("method", MASK_METHODS)
def test_worked_example_and_small_epsilon(method):
    expected = torch.tensor([1, 1, 0, 0, 1, 1, 1], dtype=torch.float64)
    if method != "gumbel":
        mask = call(EXAMPLE, 5, method, largest=False, epsilon=1e-4)
        torch.testing.assert_close(mask, expected, atol=1e-6, rtol=0)
    for options in ({"epsilon": 0}, {"hard": True}):
        if method == "gumbel" and options == {"hard": True}:
            continue
        assert torch.equal(call(EXAMPLE, 5, method, largest=False, **options), expected)


@pytest.mark.parametrize("kind", SCORE_KINDS)
@pytest.mark.parametrize("dtype", BAR)
def test_residual_bar(kind, dtype):
    for n in (10, 100, 1000, 10_000):
        x = score_rows(kind, 4, n, dtype=dtype)
        for k in {1, 9, min(50, n - 1), n // 2, n - 1}:
            for exponent in range(7):
                mask = cp.soft_topk_mask(x, k, epsilon=10.0**-exponent).double()
                residual = 2 * (mask.sum(-1) - k).abs().amax() / n
                assert residual <= BAR[dtype], (n, k, exponent)
                assert mask.amin() >= 0
                assert mask.amax() <= 1


@pytest.mark.parametrize("kind", SCORE_KINDS)
def test_float32_gradient_equals_float64(kind):
    for n, k in ((10, 1), (10, 9), (100, 50), (1000, 10), (1000, 999), (10_000, 9)):
        x = score_rows(kind, 4, n, dtype=torch.float32)
        cotangent = torch.randn(4, n)
        for exponent in range(7):
            grads = []
            for dtype in (torch.float32, torch.float64):
                leaf = x.to(dtype, copy=True).requires_grad_()
                cp.soft_topk_mask(leaf, k, epsilon=10.0**-exponent).backward(cotangent.to(dtype))
                grads.append(leaf.grad.double())
            assert grads[0].isfinite().all()
            size = grads[1].norm(dim=-1)
            error = (grads[0] - grads[1]).norm(dim=-1)
            assert (error <= 1e-4 * size)[size > 1e-20].all(), (n, k, exponent)


@pytest.mark.parametrize("method", MASK_METHODS)
@pytest.mark.parametrize("epsilon", [0.1, 0.01])
@pytest.mark.parametrize("standardize", [True, False])
def test_gradients_of_scores(method, epsilon, standardize):
    x = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)

    def function(x):
        return call(x, 4, method, epsilon=epsilon, standardize=standardize)

    assert gradcheck(function, x)
    assert gradgradcheck(function, x)


@pytest.mark.parametrize("method", THRESHOLDS)
def test_gradients_of_weights_k_and_epsilon(method):
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 8, dtype=torch.float64, requires_grad=True)
    k = torch.tensor([2.5, 4.0], dtype=torch.float64, requires_grad=True)
    epsilon = torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 1] = mask[1, 4] = False

    def function(x, weights, k, epsilon):
        return call(x, k, method, weights=weights, epsilon=epsilon, mask=mask)

    inputs = (x, weights, k, epsilon)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_gradient_equals_unrolled_sinkhorn():
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(3, 12, dtype=torch.float64)
    z = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, correction=0)
    cost = torch.stack((z**2, (z - 1) ** 2), -1) / 0.3
    log_a, log_b = math.log(1 / 12), torch.tensor([8 / 12, 4 / 12], dtype=torch.float64).log()
    g = torch.zeros(3, 2, dtype=torch.float64)
    for _ in range(400):
        f = log_a - torch.logsumexp(g.unsqueeze(-2) - cost, -1)
        g = log_b - torch.logsumexp(f.unsqueeze(-1) - cost, -2)
    plan = 12 * torch.exp(f.unsqueeze(-1) + g.unsqueeze(-2) - cost)[..., 1]
    mask = cp.soft_topk_mask(x, 4, epsilon=0.3)
    torch.testing.assert_close(mask, plan, atol=1e-9, rtol=0)
    (expected,) = torch.autograd.grad(plan, x, cotangent, retain_graph=True)
    (actual,) = torch.autograd.grad(mask, x, cotangent)
    torch.testing.assert_close(actual, expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize(("n", "k"), [(50, 5), (1000, 500), (10, 9)])
def test_bias_bound(n, k):
    """||P_eps - P_0||_F <= eps ln 2 / gap, raw scores: the corrected form of the paper's Theorem 2."""
    for seed in range(20):
        x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ordered = x.sort(descending=True).values
        gap = ordered[k - 1] - ordered[k]
        for epsilon in (1.0, 0.1, 0.01, 1e-3):
            soft = cp.soft_topk_mask(x, k, epsilon=epsilon, standardize=False)
            hard = cp.soft_topk_mask(x, k, epsilon=0)
            distance = (2**0.5) * (soft - hard).norm() / n  # both columns of the plan
            assert distance <= epsilon * math.log(2) / gap * (1 + 1e-12) + 1e-15


def test_published_bias_bound_is_false():
    """Theorem 2 as printed, eps (ln n + ln 2) / (n gap), fails at n = 1000, k = 500, gap = eps: .0119 against .0076."""
    n, k, gap = 1000, 500, 1.0
    x = torch.cat((torch.zeros(k), torch.full((k,), gap))).double()
    difference = cp.soft_topk_mask(x, k, epsilon=gap, standardize=False) - (x > 0.5).double()
    distance = 2**0.5 * difference.norm() / n
    printed, corrected = (math.log(n) + math.log(2)) / n, math.log(2)
    assert distance == pytest.approx(0.0120, abs=1e-4)
    assert printed == pytest.approx(0.0076, abs=1e-4)
    assert printed < distance < corrected


@pytest.mark.parametrize("method", MASK_METHODS)
def test_default_epsilon_is_neither_hard_nor_constant(method):
    """Of the selected mass, the part that a default spreads: over rows of 10 to 1000 scores."""
    for n in (10, 100, 1000):
        x = torch.randn(64, n)
        for k in (1, max(2, n // 10)):
            mask = call(x, k, method).clamp(0, 1)
            spread = (mask * (1 - mask)).sum(-1).mean() / k
            assert 0.02 <= spread <= 0.9, (n, k, spread)
    assert DEFAULT_EPSILON[method] > 0


def test_ties_share_equally_when_soft_and_go_first_when_hard():
    x = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0])
    soft = cp.soft_topk_mask(x, 2, epsilon=0.01)
    torch.testing.assert_close(soft, torch.tensor([0, 2 / 3, 2 / 3, 2 / 3, 0]), atol=1e-6, rtol=0)
    for options in ({"epsilon": 0}, {"hard": True}):
        assert cp.soft_topk_mask(x, 2, **options).tolist() == [0, 1, 1, 0, 0]


def test_constant_row_is_uniform_with_the_centring_gradient():
    x = torch.full((2, 8), 3.7, requires_grad=True)
    mask = cp.soft_topk_mask(x, 3, epsilon=0.5)
    torch.testing.assert_close(mask, torch.full((2, 8), 3 / 8))
    cotangent = torch.randn(2, 8)
    mask.backward(cotangent)
    expected = 3 / 8 * 5 / 8 * 4 * (cotangent - cotangent.mean(-1, keepdim=True))
    torch.testing.assert_close(x.grad, expected)


def test_sparse_has_exact_zeros_and_ones():
    mask = cp.soft_topk_mask(torch.randn(8, 100), 10, method="sparse")
    assert (mask == 0).any(-1).all()
    assert (mask == 1).any(-1).all()
    projection = cp.soft_topk_mask(EXAMPLE, 3, method="sparse", p=2, epsilon=1.0, standardize=False)
    low, high = EXAMPLE.min() - 2, EXAMPLE.max()
    for _ in range(200):  # clip((x - t), 0, 1) sums to 3: the Euclidean projection onto the hypersimplex
        t = (low + high) / 2
        low, high = (t, high) if (EXAMPLE - t).clamp(0, 1).sum() > 3 else (low, t)
    torch.testing.assert_close(projection, (EXAMPLE - t).clamp(0, 1), atol=1e-12, rtol=0)


def test_gumbel_is_seeded_and_random():
    x = torch.randn(4, 20)
    draws = [call(x, 3, "gumbel") for _ in range(2)]
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], cp.soft_topk_mask(x, 3, method="gumbel"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    x = torch.randn(4, 50, dtype=dtype, requires_grad=True)
    mask = cp.soft_topk_mask(x, 5)
    assert mask.dtype == dtype
    assert torch.equal(mask, cp.soft_topk_mask(x.float(), 5).to(dtype))
    mask.square().sum().backward()
    assert x.grad.dtype == dtype
    assert x.grad.isfinite().all()
    single = x.detach().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cp.soft_topk_mask(single, 5), cp.soft_topk_mask(single, 5))
        assert cp.soft_topk(single, 5)[1].dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = cp.soft_topk(single, 5)[0]
    assert torch.equal(inside, cp.soft_topk(single, 5)[0])


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_huge_and_tiny_scores(size):
    x = torch.randn(3, 40)
    expected = cp.soft_topk_mask(x, 4)
    torch.testing.assert_close(cp.soft_topk_mask(x * size, 4), expected, atol=1e-5, rtol=0)


def test_tiny_epsilon_is_the_hard_answer():
    x = torch.randn(3, 40, requires_grad=True)
    mask = cp.soft_topk_mask(x, 4, epsilon=1e-30)
    assert torch.equal(mask, cp.soft_topk_mask(x, 4, epsilon=0))
    mask.sum().backward()
    assert x.grad.isfinite().all()


def test_zero_and_all():
    x = torch.randn(2, 6, requires_grad=True)
    for k, value in ((0, 0.0), (6, 1.0), (0.0, 0.0), (torch.tensor([6, 6]), 1.0)):
        mask = cp.soft_topk_mask(x, k)
        assert torch.equal(mask, torch.full((2, 6), value))
        mask.sum().backward()
        assert torch.equal(x.grad, torch.zeros(2, 6))
