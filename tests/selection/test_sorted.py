"""soft_topk against oracles, its bars and its gradients."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import couplings as cp
from couplings import transport
from couplings.selection.api import SORTED_METHODS
from couplings.testing import SCORE_KINDS, score_rows, sorted_plan_by_sinkhorn
from couplings.transport import cuts

BAR = {torch.float64: 1e-9, torch.float32: 2e-6}


def call(x, k, method="transport", **options):
    """The operator with its noise fixed."""
    if method == "gumbel":
        options["generator"] = torch.Generator().manual_seed(3)
    return cp.soft_topk(x, k, method=method, **options)


@pytest.mark.parametrize(("epsilon", "sweeps"), [(1.0, 300), (0.5, 1000), (0.3, 4000)])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_equals_converged_sinkhorn(k, epsilon, sweeps):
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    expected = sorted_plan_by_sinkhorn(x, k, epsilon, sweeps)
    values, weights = cp.soft_topk(x, k, epsilon=epsilon)
    torch.testing.assert_close(weights, expected, atol=1e-8, rtol=0)
    torch.testing.assert_close(values, (weights @ x.unsqueeze(-1)).squeeze(-1))
    cotangent = torch.randn_like(expected)
    (unrolled,) = torch.autograd.grad(expected, x, cotangent)
    (implicit,) = torch.autograd.grad(weights, x, cotangent)
    torch.testing.assert_close(implicit, unrolled, atol=1e-6, rtol=0)


def test_worked_example():
    x = torch.tensor([0.4, 0.7, 2.3, 1.9, -0.2, 1.4, 0.1])
    values, weights = cp.soft_topk(x, 2, largest=False, epsilon=1e-3)
    torch.testing.assert_close(values, torch.tensor([-0.2, 0.1]), atol=1e-3, rtol=0)
    assert weights.argmax(-1).tolist() == [4, 6]


def test_one_target_agrees_with_the_mask():
    x = torch.randn(5, 30, dtype=torch.float64)
    torch.testing.assert_close(cp.soft_topk(x, 1)[1][:, 0], cp.soft_topk_mask(x, 1), atol=1e-12, rtol=0)


def residual(weights):
    """L1 error of both marginals at mass 1, the last target taking what is left."""
    n = weights.shape[-1]
    weights = weights.double()
    excess = (weights.sum(-2) - 1).clamp_min(0)
    return (2 * (weights.sum(-1) - 1).abs().sum(-1) + excess.sum(-1)) / n


@pytest.mark.parametrize("kind", SCORE_KINDS)
@pytest.mark.parametrize("dtype", BAR)
def test_residual_bar(kind, dtype):
    for n, k, rows in (
        (10, 1, 4),
        (10, 9, 4),
        (100, 9, 4),
        (100, 50, 2),
        (100, 99, 2),
        (1000, 1, 2),
        (1000, 50, 1),
    ):
        x = score_rows(kind, rows, n, dtype=dtype)
        for exponent in range(7):
            values, weights = cp.soft_topk(x, k, epsilon=10.0**-exponent)
            assert weights.amin() >= 0
            assert residual(weights).amax() <= BAR[dtype], (n, k, exponent)
            assert values.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCORE_KINDS)
@pytest.mark.parametrize("dtype", BAR)
@pytest.mark.parametrize(("n", "k"), [(1000, 999), (10_000, 100)])
def test_residual_bar_of_large_problems(kind, dtype, n, k):
    x = score_rows(kind, 1, n, dtype=dtype)
    for exponent in range(7):
        assert residual(cp.soft_topk(x, k, epsilon=10.0**-exponent)[1]).amax() <= BAR[dtype], exponent


@pytest.mark.parametrize("kind", SCORE_KINDS)
@pytest.mark.parametrize("output", [0, 1])
def test_float32_gradient_equals_float64(kind, output):
    for n, k in ((10, 1), (10, 9), (100, 9), (100, 50), (1000, 9)):
        x = score_rows(kind, 2, n, dtype=torch.float32)
        cotangent = torch.randn(cp.soft_topk(x, k)[output].shape)
        for exponent in range(7):
            grads = []
            for dtype in (torch.float32, torch.float64):
                leaf = x.to(dtype, copy=True).requires_grad_()
                cp.soft_topk(leaf, k, epsilon=10.0**-exponent)[output].backward(cotangent.to(dtype))
                grads.append(leaf.grad.double())
            assert grads[0].isfinite().all()
            size = grads[1].norm(dim=-1)
            error = (grads[0] - grads[1]).norm(dim=-1)
            assert (error <= 1e-4 * size)[size > 1e-20].all(), (n, k, exponent)


@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_of_columns_change_nothing(weighted, monkeypatch):
    """Long rows are worked on block by block; a block as long as the row gives the same values and gradients."""
    n, k = 9000, 3
    mask = torch.rand(2, n) > 0.1
    leaves = [
        torch.randn(2, n, dtype=torch.float64),
        torch.tensor([0.1, 0.01], dtype=torch.float64),
        torch.rand(2, n, dtype=torch.float64) + 0.1,
        torch.linspace(0, 1, k + 1, dtype=torch.float64),
    ]
    used = leaves if weighted else leaves[:2]
    cotangents = torch.randn(2, k, dtype=torch.float64), torch.randn(2, k, n, dtype=torch.float64)

    def both(block, pieces):
        monkeypatch.setattr(cuts, "BLOCK", block)
        assert len(cuts.column_blocks(n, 2 * k)) == pieces
        x, epsilon, masses, targets = (leaf.clone().requires_grad_() for leaf in leaves)
        if weighted:
            masses = masses * mask
            plan = transport.solve_points(
                x, targets, masses / masses.sum(-1, keepdim=True), epsilon=epsilon, mask=mask
            ).plan()
            outputs = plan[..., :k].sum(-2), plan[..., :k].mT * n
        else:
            outputs = cp.soft_topk(x, k, epsilon=epsilon, mask=mask)
        loss = sum((output * cotangent).sum() for output, cotangent in zip(outputs, cotangents))
        return *outputs, *torch.autograd.grad(loss, (x, epsilon, masses, targets)[: len(used)])

    for one, several in zip(both(2**40, 1), both(1, 3)):
        assert one.abs().amax() > 0
        torch.testing.assert_close(several, one, rtol=1e-9, atol=1e-12 * float(one.detach().abs().amax()))


@pytest.mark.parametrize("method", SORTED_METHODS)
@pytest.mark.parametrize("epsilon", [0.1, 0.01])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_gradients(method, epsilon, k):
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)

    def function(x):
        return call(x, k, method, epsilon=epsilon)

    assert gradcheck(function, x)
    assert gradgradcheck(function, x)


@pytest.mark.parametrize("method", SORTED_METHODS)
def test_gradients_with_mask_and_tensor_epsilon(method):
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    epsilon = torch.tensor([0.1, 0.3], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 1] = False
    mask[1, :5] = False

    def function(x, epsilon):
        return call(x, 3, method, epsilon=epsilon, mask=mask)

    assert gradcheck(function, (x, epsilon))
    assert gradgradcheck(function, (x, epsilon))


@pytest.mark.parametrize("method", SORTED_METHODS)
def test_exact_at_zero_and_hard(method):
    x = torch.tensor([1.0, 3.0, 2.0, 3.0, 0.0], requires_grad=True)
    if method == "gumbel":
        return
    for options in ({"epsilon": 0}, {"hard": True}):
        values, weights = call(x, 3, method, **options)
        assert values.tolist() == [3, 3, 2]
        assert weights.argmax(-1).tolist() == [1, 3, 2]
    (grad,) = torch.autograd.grad(call(x, 3, method, epsilon=0)[0].sum(), x)
    assert grad.tolist() == [0, 1, 1, 1, 0]


def test_order_of_dimensions():
    x = torch.randn(4, 9, 3)
    values, weights = cp.soft_topk(x, 2, dim=1)
    assert values.shape == (4, 2, 3)
    assert weights.shape == (4, 3, 2, 9)
    torch.testing.assert_close(values, torch.einsum("bckn,bnc->bkc", weights, x))


def test_rows_with_fewer_valid_entries_than_k():
    x = torch.tensor([[4.0, 1.0, 3.0, 2.0], [5.0, 6.0, 7.0, 8.0]], requires_grad=True)
    mask = torch.tensor([[True, False, True, False], [False] * 4])
    for method in SORTED_METHODS:
        values, weights = call(x, 3, method, mask=mask)
        torch.testing.assert_close(weights.sum(-1), torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
        assert (weights.masked_select(~mask.unsqueeze(-2)) == 0).all()
        (grad,) = torch.autograd.grad(values.sum() + weights.square().sum(), x)
        assert grad.isfinite().all()
        assert (grad[~mask] == 0).all()
