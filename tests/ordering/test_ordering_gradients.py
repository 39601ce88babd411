"""Derivatives of the ordering operators: finite differences, the whole plan's, other precision, transforms."""

import functools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import couplings as cp
from couplings.testing import SCORE_KINDS, score_rows
from couplings.testing.ordering import ordered_plan

OPERATORS = {
    "soft_sort": cp.soft_sort,
    "soft_rank": cp.soft_rank,
    "soft_permutation": cp.soft_permutation,
    "soft_sort_by": lambda x, **options: cp.soft_sort_by(x, torch.stack((x, x.sin()), -1), **options),
    "soft_quantile": lambda x, **options: cp.soft_quantile(x, [0.2, 0.5], **options).movedim(0, -1),
    "quantile_normalize": lambda x, **options: cp.quantile_normalize(
        x, torch.tensor([0.1, 2.0, 5.0], dtype=x.dtype), **options
    ),
    "soft_quantize": lambda x, **options: cp.soft_quantize(x, 3, **options),
}
each = pytest.mark.parametrize("name", OPERATORS)


def leaf(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def positive(*shape, seed=1):
    return leaf(*shape, seed=seed).detach().exp().requires_grad_()


def check(function, *inputs, second=True):
    assert gradcheck(function, inputs, atol=1e-6)
    if second:
        assert gradgradcheck(function, inputs, atol=1e-5)


@each
@pytest.mark.parametrize("epsilon", [0.5, 0.03])
def test_scores(name, epsilon):
    check(functools.partial(OPERATORS[name], epsilon=epsilon), leaf(2, 5))


@each
def test_scores_weights_and_epsilon(name):
    def function(x, weights, epsilon):
        return OPERATORS[name](x, weights=weights, epsilon=epsilon)

    check(
        function, leaf(2, 4), positive(2, 4), torch.tensor([0.3, 0.05], dtype=torch.float64).requires_grad_()
    )


@pytest.mark.parametrize("name", ["soft_sort", "soft_rank", "soft_permutation", "soft_sort_by"])
@pytest.mark.parametrize("squash", ["logistic", None])
def test_targets_and_their_weights(name, squash):
    def function(x, y, b, epsilon):
        return OPERATORS[name](x, targets=y, target_weights=b, epsilon=epsilon, squash=squash)

    y = torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64).requires_grad_()
    check(function, leaf(2, 4), y, positive(2, 3), torch.tensor(0.1, dtype=torch.float64).requires_grad_())


@pytest.mark.parametrize(
    "options", [{"squash": None}, {"squash": "arctan"}, {"standardize": False}, {"p": 3.0}, {"p": 1.5}]
)
@pytest.mark.parametrize("name", ["soft_sort", "soft_rank"])
def test_options(name, options):
    check(functools.partial(OPERATORS[name], epsilon=0.1, **options), leaf(2, 5))


@each
def test_masked(name):
    mask = torch.tensor([[True, False, True, True, True], [False, True, True, False, False]])
    check(functools.partial(OPERATORS[name], epsilon=0.1, mask=mask), leaf(2, 5))


def test_payload_and_distribution():
    check(lambda x, v: cp.soft_sort_by(x, v, epsilon=0.1), leaf(2, 4), leaf(2, 4, 2, seed=3))
    check(lambda x, t: cp.quantile_normalize(x, t, epsilon=0.1), leaf(2, 4), leaf(2, 3, seed=3))


@each
@pytest.mark.parametrize("seed", [1, 2])
def test_ties(name, seed):
    """At ties the standardised score is smooth, and so is everything behind it."""
    x = leaf(2, 6, seed=seed).detach().round()
    x[0, :3] = 1.0
    check(functools.partial(OPERATORS[name], epsilon=0.1), x.requires_grad_(), second=False)


@each
def test_third_derivative_raises(name):
    x = leaf(4)
    (first,) = torch.autograd.grad(OPERATORS[name](x, epsilon=0.1).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="at most two derivatives"):
        torch.autograd.grad(second.sum(), x)


# the whole plan, differentiated


def dense(x, epsilon):
    """Ranks and sorted values of one row, with autograd through the plan that an oracle found.

    One Newton step of the dual from the solution, with its matrix held fixed, has the solution's derivative.
    """
    n = len(x)
    std = ((x - x.mean()) ** 2).mean().sqrt()
    points = torch.sigmoid((x - x.mean()) / std * (math.pi / math.sqrt(3)))
    a = torch.full((n,), 1 / n, dtype=torch.float64)
    y = torch.arange(n, dtype=torch.float64) / (n - 1)
    found = ordered_plan(points, a, y, a, epsilon)
    logits = -((points[:, None] - y) ** 2) / epsilon
    half = found.plan / a
    curvature = -(half.mT @ half)
    curvature.diagonal().add_(1)
    curvature += a[0]  # constants
    curvature.diagonal().add_(1e-14)
    sums = a @ torch.softmax(logits + found.potential, -1)
    g = found.potential - torch.linalg.solve(curvature, (sums - a) / a)
    pi = torch.softmax(logits + g, -1)
    return pi @ torch.arange(1, n + 1, dtype=torch.float64), pi.mT @ x


@pytest.mark.parametrize("epsilon", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("kind", ["normal", "uniform", "clustered", "tied", "outlier", "cauchy"])
@pytest.mark.parametrize("n", [300, pytest.param(600, marks=pytest.mark.slow)])
def test_boxes_against_the_whole_plan(kind, epsilon, n):
    x = score_rows(kind, 1, n)[0].requires_grad_()
    cotangent = torch.randn(n, dtype=torch.float64)
    expected = dense(x, epsilon)
    for function, oracle in zip((cp.soft_rank, cp.soft_sort), expected):
        (wanted,) = torch.autograd.grad((oracle * cotangent).sum(), x, retain_graph=True)
        (found,) = torch.autograd.grad((function(x, epsilon=epsilon) * cotangent).sum(), x)
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("function", [cp.soft_rank, cp.soft_sort])
@pytest.mark.parametrize("kind", SCORE_KINDS)
@pytest.mark.parametrize("n", [17, 130])
def test_float32_like_float64(function, kind, n):
    single = score_rows(kind, 3, n, dtype=torch.float32)
    cotangent = torch.randn(3, n)
    for epsilon in (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        grads = []
        for x in (single.clone(), single.double()):
            x.requires_grad_()
            out = function(x, epsilon=epsilon)
            (grad,) = torch.autograd.grad(out, x, cotangent.to(x.dtype))
            assert grad.isfinite().all()
            grads.append(grad.double())
        size = grads[1].norm(dim=-1)
        wrong = (grads[0] - grads[1]).norm(dim=-1)
        told = size > 1e-20
        assert (wrong[told] <= 1e-4 * size[told]).all(), (epsilon, wrong / size)


@pytest.mark.parametrize("function", [cp.soft_rank, cp.soft_sort])
@pytest.mark.parametrize("kind", ["normal", "tied", "heavy", "clustered"])
@pytest.mark.parametrize("n", [4, 12, 40])
def test_size_of_the_gradient(function, kind, n):
    """Ranks lie in [1, n] on scores one deviation apart: no derivative can exceed n over what epsilon resolves.

    dR/du is a covariance over the plan's row times 2 / epsilon, and a row of the plan is at most 1 wide.
    """
    x = score_rows(kind, 2, n).requires_grad_()
    scale = x.detach().std(-1, correction=0).min()
    for epsilon in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        out = function(x, epsilon=epsilon)
        (grad,) = torch.autograd.grad(out.sum() if function is cp.soft_sort else out.square().sum(), x)
        bound = 1e2 * n**3 / epsilon * (1 + 1 / scale)
        assert grad.isfinite().all()
        assert grad.abs().max() < bound, epsilon


@pytest.mark.parametrize("epsilon", [1e-2, 1e-3, 1e-4, 1e-5])
def test_nearly_hard_rows_against_the_whole_plan(epsilon):
    """Blocks that hardly couple: rounding must not be divided by the coupling."""
    for x in ([-1.0, 0.0, 0.5, 2.0], [0.0, 1.0, 2.0, 3.0, 3.1, 7.0, 7.0, 7.2]):
        x = torch.tensor(x, dtype=torch.float64).requires_grad_()
        weight = torch.arange(len(x), dtype=torch.float64) ** 2
        for function, oracle in zip((cp.soft_rank, cp.soft_sort), dense(x, epsilon)):
            (wanted,) = torch.autograd.grad((weight * oracle).sum(), x, retain_graph=True)
            (found,) = torch.autograd.grad((weight * function(x, epsilon=epsilon)).sum(), x)
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


# transforms


@each
@pytest.mark.parametrize("n", [6, 130])
def test_func_transforms(name, n):
    x = leaf(3, n).detach()

    def function(row):
        return OPERATORS[name](row, epsilon=0.05)

    def loss(row):
        return function(row).square().mean()

    close = functools.partial(torch.testing.assert_close, atol=1e-8, rtol=1e-7)
    close(torch.func.vmap(function)(x), function(x))
    own = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(loss(row) for row in own), own)
    close(torch.stack([torch.func.grad(loss)(row) for row in x]), expected)
    close(torch.func.vmap(torch.func.grad(loss))(x), expected)
    if n < 10:
        jacobian = torch.func.jacrev(function)(x[0])
        close(jacobian, torch.autograd.functional.jacobian(function, x[0]))
        hessian = torch.func.jacrev(torch.func.jacrev(loss))(x[0])
        close(hessian, torch.autograd.functional.hessian(loss, x[0]))


@each
def test_compile_fullgraph(name):
    def function(x):
        return OPERATORS[name](x, epsilon=0.05)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    try:
        for dtype in (torch.float64, torch.float32):
            x = leaf(3, 6).detach().to(dtype).requires_grad_()
            torch.testing.assert_close(compiled(x), function(x))
            (expected,) = torch.autograd.grad(function(x).square().sum(), x)
            (actual,) = torch.autograd.grad(compiled(x).square().sum(), x)
            torch.testing.assert_close(actual, expected)
    finally:
        torch._dynamo.reset()


def test_compile_with_weights_mask_and_targets():
    mask = torch.tensor([True, True, False, True, True])
    y = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)

    def function(x, weights, epsilon):
        return cp.soft_rank(x, weights=weights, mask=mask, targets=y, epsilon=epsilon, descending=True)

    inputs = leaf(2, 5), positive(2, 5), torch.tensor(0.1, dtype=torch.float64).requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    try:
        torch.testing.assert_close(compiled(*inputs), function(*inputs))
        expected = torch.autograd.grad(function(*inputs).square().sum(), inputs)
        actual = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
        torch.testing.assert_close(actual, expected)
    finally:
        torch._dynamo.reset()
