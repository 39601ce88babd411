"""method="projection": independent oracles, laws, gradients, extremes, torch.func and compile."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import isotonic_regression
from torch.autograd import gradcheck, gradgradcheck

from couplings.ordering import projection
from couplings.ordering.rows import prepare

EPSILONS = [1e-3, 1e-2, 0.1, 1.0, 10.0, 1e3]
double = {"dtype": torch.float64}


def ranks(x, epsilon, regularization="l2", weights=None, mask=None, standardize=True):
    rows = prepare(x, x.dim() - 1, False, weights, mask, standardize)
    return projection.ranks(rows, epsilon, regularization=regularization)


def sort(x, epsilon, regularization="l2", weights=None, mask=None, standardize=True):
    rows = prepare(x, x.dim() - 1, False, weights, mask, standardize)
    return projection.sorted_values(rows, epsilon, regularization=regularization)


OPERATORS = {"ranks": ranks, "sort": sort}
operators = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
regularizations = pytest.mark.parametrize("regularization", projection.REGULARIZATIONS)


def standardized(x, weights):
    z = x - np.average(x, weights=weights)
    return z / np.sqrt(np.average(z**2, weights=weights))


def northwest(weights, n):
    """The exact 1-D plan between sorted entries with these weights and n equal targets, by filling corners."""
    left, plan, target, room = weights / weights.sum(), np.zeros((n, n)), 0, 1 / n
    for i, mass in enumerate(left):
        while mass > 1e-15 and target < n:
            part = min(mass, room)
            plan[i, target] += part
            mass, room = mass - part, room - part
            if room <= 1e-15:
                target, room = target + 1, 1 / n
    return plan


def rank_oracle(x, epsilon, weights=None):
    n, order = len(x), np.argsort(x)
    a = np.ones(n) if weights is None else weights[order]
    s = standardized(x, weights)[order] / epsilon
    target = northwest(a, n) @ np.arange(1, n + 1) / (a / a.sum())
    out = np.empty(n)
    out[order] = s - isotonic_regression(s - target, weights=a).x
    return out


def sort_oracle(x, epsilon, weights=None):
    n, order = len(x), np.argsort(x)
    a = np.ones(n) if weights is None else weights[order]
    z = standardized(x, weights)
    target = n * northwest(a, n).T @ z[order]
    s = np.arange(1, n + 1) / epsilon
    out = s - isotonic_regression(s - target).x
    mean = np.average(x, weights=weights)
    return mean + out * np.sqrt(np.average((x - mean) ** 2, weights=weights))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("n", [2, 5, 40, 300])
def test_l2_agrees_with_scipy(n, epsilon, weighted):
    x = torch.randn(2, n, **double) * 3 + 1
    weights = torch.rand(2, n, **double) + 0.05 if weighted else None
    for operator, oracle in ((ranks, rank_oracle), (sort, sort_oracle)):
        found = operator(x, epsilon, weights=weights)
        for i in range(2):
            expected = oracle(x[i].numpy(), epsilon, None if weights is None else weights[i].numpy())
            np.testing.assert_allclose(found[i], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.7, 3.0])
def test_on_the_permutahedron_itself(epsilon):
    """A point of the hull at which no vertex lies downhill is the projection: all 720 vertices for n = 6."""
    x = torch.randn(6, **double)
    x = (x - x.mean()) / x.std(unbiased=False)
    w, place = x.sort().values, torch.arange(1.0, 7.0, **double)
    exponential = sort(x, epsilon, "kl").exp()
    cases = [
        (ranks(x, epsilon), place, lambda mu: mu - x / epsilon),
        (ranks(x, epsilon, "kl"), place, lambda mu: mu.log() - x / epsilon),
        (sort(x, epsilon), w, lambda mu: mu - place / epsilon),
        (exponential, w.exp(), lambda mu: mu.log() - place / epsilon),
    ]
    for found, vertex, slope in cases:
        vertices = torch.stack([torch.stack(order) for order in itertools.permutations(vertex)])
        assert (((vertices - found) @ slope(found)) >= -1e-9).all()
        prefix = found.sort().values.cumsum(0) - vertex.cumsum(0)
        assert (prefix >= -1e-12).all()
        assert abs(prefix[-1]) < 1e-12


@pytest.mark.parametrize("epsilon", [0.02, 0.3, 3.0, 30.0])
def test_kl_optimality(epsilon):
    """Subgradient conditions by naive log-sum-exps: ranks / exp(s) are constant on blocks, fall between, sums match."""
    x = torch.randn(60, **double).sort().values
    weights = torch.rand(60, **double) + 0.1
    for a in (None, weights):
        found = ranks(x, epsilon, "kl", a)
        share = torch.ones_like(x) if a is None else a
        target = torch.from_numpy(
            northwest(share.numpy(), 60) @ np.arange(1.0, 61.0) / (share / share.sum()).numpy()
        )
        slack = ((target - found) * share).cumsum(0)  # majorised: prefixes weigh no less than the vertex's
        assert (slack <= 1e-9).all()
        scale = standardized(x.numpy(), None if a is None else a.numpy()) / epsilon
        dual = torch.from_numpy(scale) - found.log()
        assert (dual.diff() >= -1e-9).all()
        assert ((dual.diff().abs() < 1e-9) | (slack[:-1].abs() < 1e-9)).all()


@operators
@regularizations
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("epsilon", [0.05, 0.5, 5.0])
def test_gradcheck_and_gradgradcheck(operator, regularization, weighted, epsilon):
    x = torch.randn(2, 6, **double, requires_grad=True)
    weights = (torch.rand(2, 6, **double) + 0.2).requires_grad_() if weighted else None
    eps = torch.full((2, 1), epsilon, **double, requires_grad=True)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 2] = False

    def function(x, eps, *rest):
        return operator(x, eps, regularization, *rest, mask=mask)

    arguments = (x, eps, *([weights] if weighted else []))
    assert gradcheck(function, arguments)
    assert gradgradcheck(function, arguments)


@operators
@regularizations
@pytest.mark.parametrize("epsilon", [1e-4, 1e-2, 1.0, 100.0])
def test_float32_gradients(operator, regularization, epsilon):
    x, cotangent = torch.randn(20, 50), torch.randn(20, 50)

    def gradient(dtype):
        leaf = x.to(dtype, copy=True).requires_grad_()
        operator(leaf, epsilon, regularization).backward(cotangent.to(dtype))
        return leaf.grad.double()

    mine, exact = gradient(torch.float32), gradient(torch.float64)
    assert mine.isfinite().all()
    scale = exact.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    assert ((mine - exact).abs() <= 1e-3 * exact.abs() + 1e-5 * scale).all()


def test_kl_gradients_at_tiny_epsilon_with_close_scores():
    """Blocks exist at 1e-4 only where scores nearly tie; there the softmax feels the last bits of the scores."""
    x = (torch.randn(4, 50) * 30).round() / 30 + 1e-6 * torch.randn(4, 50)

    def gradient(dtype):
        leaf = x.to(dtype, copy=True).requires_grad_()
        (ranks(leaf, 1e-4, "kl") ** 2).sum().backward()
        return leaf.grad.double()

    mine, exact = gradient(torch.float32), gradient(torch.float64)
    assert (exact != 0).any()
    assert ((mine - exact).abs() <= 1e-3 * exact.abs() + 1e-5 * exact.abs().amax(-1, keepdim=True)).all()


@operators
@regularizations
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_laws(operator, regularization, epsilon):
    x = torch.randn(3, 17, **double)
    x[1] = x[1].round()
    found = operator(x, epsilon, regularization)
    close = {"rtol": 0, "atol": 1e-9}
    order = torch.randperm(17)
    permuted = operator(x[:, order], epsilon, regularization)
    torch.testing.assert_close(permuted, found[:, order] if operator is ranks else found, **close)
    moved = operator(7 * x - 3, epsilon, regularization)
    torch.testing.assert_close(moved, found if operator is ranks else 7 * found - 3, rtol=0, atol=1e-8)
    if operator is ranks or regularization == "l2":
        total = torch.full((3,), 17 * 18 / 2, **double) if operator is ranks else x.sum(-1)
        torch.testing.assert_close(found.sum(-1), total, **close)
    ordered = found.gather(-1, x.argsort(-1)) if operator is ranks else found
    assert (ordered.diff(dim=-1) >= -1e-12).all()
    low, high = (1, 17) if operator is ranks else (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))
    assert ((found >= low - 1e-9) & (found <= high + 1e-9)).all()
    if operator is ranks:
        ties = x.unsqueeze(-1) == x.unsqueeze(-2)
        assert ((found.unsqueeze(-1) - found.unsqueeze(-2))[ties] == 0).all()


@operators
@regularizations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_do_not_meet(operator, regularization, dtype):
    x = torch.randn(5, 200, dtype=dtype)
    other = x.clone()
    other[0] *= 1e4
    other[2] = 0
    other[4, 7] = torch.nan
    for epsilon in (0.01, 0.3, 30.0):
        mine, theirs = operator(x, epsilon, regularization), operator(other, epsilon, regularization)
        assert torch.equal(mine[[1, 3]], theirs[[1, 3]])
        assert theirs[4].isnan().all()
        assert theirs[:4].isfinite().all()


@operators
@regularizations
@pytest.mark.parametrize("weighted", [False, True])
def test_padding(operator, regularization, weighted):
    x, weights = torch.randn(2, 9, **double), torch.rand(2, 9, **double) + 0.1
    places = torch.tensor([0, 2, 3, 5, 6, 7, 10, 11, 13])
    mask = torch.zeros(2, 15, dtype=torch.bool)
    mask[:, places] = True
    padded = torch.full((2, 15), torch.nan, **double)
    padded[:, places] = x
    heavy = torch.full((2, 15), 5.0, **double)
    heavy[:, places] = weights
    padded.requires_grad_()
    found = operator(padded, 0.3, regularization, heavy if weighted else None, mask)
    expected = operator(x, 0.3, regularization, weights if weighted else None)
    valid, rest = (found[:, places], found[~mask]) if operator is ranks else (found[:, :9], found[:, 9:])
    torch.testing.assert_close(valid, expected, rtol=0, atol=1e-10)
    assert (rest == 0).all()
    found.pow(2).sum().backward()
    assert padded.grad.isfinite().all()
    assert (padded.grad[~mask] == 0).all()


@operators
@regularizations
def test_limits(operator, regularization):
    x = torch.arange(8, **double)[torch.randperm(8)] ** 1.5
    hard = x.argsort().argsort() + 1.0 if operator is ranks else x.sort().values
    torch.testing.assert_close(operator(x, 1e-5, regularization), hard.double(), rtol=0, atol=1e-12)
    soft = operator(x, 1e9, regularization)
    z = (x - x.mean()) / x.std(unbiased=False)
    mean = 4.5 if operator is ranks else x.mean()
    if operator is sort and regularization == "kl":  # the mean of the exponentials
        mean = x.mean() + x.std(unbiased=False) * (z.exp().mean().log())
    torch.testing.assert_close(soft, torch.full_like(x, float(mean)), rtol=0, atol=1e-6)


@regularizations
def test_weights(regularization):
    x = torch.tensor([[3.0, 1.0, 2.0, 5.0]], **double)
    weights = torch.tensor([[1.0, 2.0, 0.0, 1.0]], **double)
    # the masses 1, 2, 4 of 4 hold the ranks 1-2, 3, 4; no mass sits at rank 2.0, after the first entry
    assert ranks(x, 1e-9, regularization, weights).tolist() == [[3.0, 1.5, 3.0, 4.0]]
    assert sort(x, 1e-9, regularization, weights).tolist() == [[1.0, 1.0, 3.0, 5.0]]
    weights = torch.rand(3, 11, **double)
    x = torch.randn(3, 11, **double)
    for epsilon in (1e-6, 0.1, 1.0, 50.0):
        mean = (weights * ranks(x, epsilon, regularization, weights)).sum(-1) / weights.sum(-1)
        torch.testing.assert_close(mean, torch.full_like(mean, 6.0), rtol=0, atol=1e-9)
        for operator in (ranks, sort):
            even = operator(x, epsilon, regularization, torch.full_like(x, 0.7))
            torch.testing.assert_close(even, operator(x, epsilon, regularization), rtol=0, atol=1e-9)
    # an entry of no weight moves nobody
    light = weights.clone()
    light[:, 4] = 0
    moved = x.clone()
    moved[:, 4] = 0.123
    rest = [i for i in range(11) if i != 4]
    before, after = (ranks(t, 0.3, regularization, light) for t in (x, moved))
    torch.testing.assert_close(before[:, rest], after[:, rest], rtol=0, atol=1e-9)
    assert after.isfinite().all()


@operators
@regularizations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes(operator, regularization, dtype):
    big = 1e30 if dtype == torch.float32 else 1e150
    rows = {
        "constant": torch.full((6,), 3.0),
        "huge": big * torch.randn(6, dtype=dtype),
        "tiny": torch.randn(6, dtype=dtype)
        / big ** (2 / 3),  # the gradient, 1 / (std epsilon), must be a number
        "outlier": torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, big], dtype=dtype),
        "one": torch.tensor([2.5]),
        "two": torch.tensor([2.5, 2.5]),
    }
    for name, row in rows.items():
        for epsilon in (1e-9, 1e-4, 1.0, 1e6):
            x = row.to(dtype).clone().requires_grad_()
            found = operator(x, epsilon, regularization)
            found.sum().backward()
            assert found.isfinite().all(), name
            assert x.grad.isfinite().all(), name
            if operator is ranks and name in ("constant", "one", "two"):
                assert (found == (len(row) + 1) / 2).all()
    empty = torch.zeros(2, 4, dtype=torch.bool)
    empty[0] = True
    x = torch.randn(2, 4, dtype=dtype, requires_grad=True)
    for weights in (None, torch.ones(2, 4, dtype=dtype)):
        found = operator(x, 0.3, regularization, weights, empty)
        assert (found[1] == 0).all()
        (gradient,) = torch.autograd.grad(found.pow(2).sum(), x)
        assert gradient.isfinite().all()


@operators
@regularizations
@pytest.mark.parametrize("weighted", [False, True])
def test_func(operator, regularization, weighted):
    x = torch.randn(3, 4, 7, **double)
    weights = torch.rand(3, 4, 7, **double) + 0.1

    def function(x, weights):
        return operator(x, 0.4, regularization, weights if weighted else None)

    whole = function(x, weights)
    torch.testing.assert_close(torch.func.vmap(function)(x, weights), whole, rtol=0, atol=0)
    shared = torch.func.vmap(function, (1, None))(x, weights[:, 0])
    torch.testing.assert_close(shared, torch.stack([function(x[:, i], weights[:, 0]) for i in range(4)]))

    def loss(x, weights):
        return function(x, weights).pow(2).sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, weights), leaf)
    each = torch.func.vmap(torch.func.vmap(torch.func.grad(loss)))(x, weights)
    torch.testing.assert_close(each, expected, rtol=1e-10, atol=1e-10)
    jacobian = torch.func.jacrev(function)(x[0, 0], weights[0, 0])
    reference = torch.autograd.functional.jacobian(lambda t: function(t, weights[0, 0]), x[0, 0])
    torch.testing.assert_close(jacobian, reference)
    hessian = torch.func.jacrev(torch.func.jacrev(loss))(x[0, 0], weights[0, 0])
    torch.testing.assert_close(hessian, hessian.mT, rtol=1e-8, atol=1e-8)


@operators
@regularizations
def test_compile(operator, regularization):
    x = torch.randn(3, 40, requires_grad=True)

    def function(x):
        return operator(x, 0.2, regularization)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, function(x), rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(out.pow(2).sum(), x)[0] for out in (compiled, function(x))]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_arguments():
    with pytest.raises(ValueError, match="regularization: expected one of"):
        ranks(torch.randn(3), 0.1, "l3")


def test_inputs_stay_as_they_are():
    x, weights = torch.randn(2, 300), torch.rand(2, 300)
    before = x.clone(), weights.clone()
    for operator, regularization in itertools.product((ranks, sort), projection.REGULARIZATIONS):
        operator(x, 0.1, regularization, weights)
    assert torch.equal(x, before[0])
    assert torch.equal(weights, before[1])
