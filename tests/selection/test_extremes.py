"""Extremes that once went wrong: k = n with weights, batched cotangents, far outliers without weight, tiny scores."""

import math

import pytest
import torch

import couplings as cp
from couplings.transport import solve_points


@pytest.mark.parametrize("options", [{}, {"epsilon": 0}, {"hard": True}])
def test_all_selected_whatever_the_weights(options):
    x = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    for weights in ([1.1, 0.7, 0.3, 1e-9], [1.1, 0.7, 0.3, 0.0]):
        mask = cp.soft_topk_mask(x, 4, weights=torch.tensor([weights]), **options)
        assert torch.equal(mask, torch.ones(1, 4))


@pytest.mark.parametrize("function", [cp.soft_topk_mask, lambda x, k: cp.soft_topk(x, k)[0]])
def test_batched_cotangents(function):
    x = torch.randn(3, 5, requires_grad=True)
    out = function(x, 2)
    cotangents = torch.randn(4, *out.shape)
    (batched,) = torch.autograd.grad(out, x, cotangents, is_grads_batched=True)
    single = [torch.autograd.grad(function(x, 2), x, cotangent)[0] for cotangent in cotangents]
    torch.testing.assert_close(batched, torch.stack(single))


def test_single_entry_and_single_target():
    values, weights = cp.soft_topk(torch.tensor([[3.0], [4.0]]), 1)
    assert values.tolist() == [[3.0], [4.0]]
    assert torch.equal(weights, torch.ones(2, 1, 1))
    plan = solve_points(torch.rand(3), torch.zeros(1), epsilon=0.1).plan()
    torch.testing.assert_close(plan, torch.full((3, 1), 1 / 3))


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 2e-6), (torch.float64, 1e-9)])
def test_targets_of_very_unequal_mass(dtype, bar):
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        x, a = torch.rand(1, 5, generator=generator), torch.rand(1, 5, generator=generator) + 0.01
        b = (torch.rand(1, 7, generator=generator) * 12).exp()
        y = torch.linspace(0, 1, 7)
        problem = [t.to(dtype) for t in (x, y, a / a.sum(), b / b.sum())]
        assert solve_points(*problem, epsilon=0.1, on_fail="raise").residual.amax() <= bar


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [3, 10, 999])
def test_a_masked_score_leaves_the_bits_of_other_rows(dtype, k):
    x = torch.randn(6, 1000, dtype=dtype)
    other = x.clone()
    other[5, 0] = -math.inf
    grads = []
    for rows in (x, other):
        leaf = rows.clone().requires_grad_()
        mask = cp.soft_topk_mask(leaf, k)
        (grad,) = torch.autograd.grad((mask * torch.linspace(0, 1, 1000, dtype=dtype)).sum(), leaf)
        grads.append((mask[:5], grad[:5]))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


def test_epsilon_gradient_where_scores_tie():
    x = (torch.randn(50, 40) * 2).round()
    cotangent = torch.randn(50, 5, 40)
    for value in (1e-4, 1e-2, 0.1):
        grads = []
        for dtype in (torch.float32, torch.float64):
            epsilon = torch.full((50,), value, dtype=dtype, requires_grad=True)
            loss = (cp.soft_topk(x.to(dtype), 5, epsilon=epsilon)[1] * cotangent).sum()
            grads.append(torch.autograd.grad(loss, epsilon)[0].double())
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_gradients_of_tiny_and_huge_scores(size):
    x = torch.tensor([0.4, 0.7, 2.3, 1.9, -0.2])
    cotangent = torch.randn(5)

    def grads(x):
        x = x.clone().requires_grad_()
        weights = torch.tensor([1.0, 0.5, 0.2, 2.0, 1.0], requires_grad=True)
        mask = cp.soft_topk_mask(x, 2, weights=weights, epsilon=0.5)
        return torch.autograd.grad((mask * cotangent).sum(), (x, weights))

    (expected, expected_weights), (actual, actual_weights) = grads(x), grads(x * size)
    torch.testing.assert_close(actual * size, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(actual_weights, expected_weights, atol=1e-5, rtol=1e-4)
    values = cp.soft_topk(x * size, 2)[0]
    torch.testing.assert_close(values / size, cp.soft_topk(x, 2)[0], rtol=1e-5, atol=1e-5)


def test_outlier_without_weight_and_size_of_weights():
    x, weights = torch.tensor([1e10, 1.0, 2.0, 3.0, 2.5]), torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])
    mask = cp.soft_topk_mask(x, 2, weights=weights, epsilon=0.5)
    inside = cp.soft_topk_mask(x[1:], 8 / 5, epsilon=0.5)
    torch.testing.assert_close(mask[1:], inside, atol=1e-6, rtol=1e-5)
    for size in (1e-38, 1e-30, 1e30):
        scaled = cp.soft_topk_mask(x, 2, weights=weights * size, epsilon=0.5)
        torch.testing.assert_close(scaled, mask, atol=1e-6, rtol=1e-5)


def test_meta_tensors_get_shapes():
    x = torch.empty(2, 5, device="meta")
    assert cp.soft_topk_mask(x, 2).shape == (2, 5)
    assert cp.soft_topk(x, 2)[1].shape == (2, 2, 5)


def test_large_batches_equal_their_rows():
    """More than a million entries go through in blocks of rows."""
    x = torch.randn(6000, 200, requires_grad=True)
    mask = cp.soft_topk_mask(x, 7)
    torch.testing.assert_close(mask[4321], cp.soft_topk_mask(x[4321], 7), atol=1e-6, rtol=0)
    (grad,) = torch.autograd.grad(mask[:, 3].sum(), x)
    (alone,) = torch.autograd.grad(cp.soft_topk_mask(x[4321], 7)[3], x)
    torch.testing.assert_close(grad[4321], alone[4321], atol=1e-5, rtol=1e-4)
