"""Ranks and sorted values through moments against the whole plan, found by another algorithm in float64."""

import functools
import math

import pytest
import torch

from couplings.testing import score_rows
from couplings.testing.ordering import ordered_plan
from couplings.transport import moments
from couplings.transport.ordered import order

KINDS = (
    "uniform", "normal", "heavy", "cauchy", "clustered", "tied", "mostly_tied", "bimodal", "outlier", "geometric",
    "lattice", "offset", "constant",
)  # fmt: skip
EPSILONS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
DTYPES = (torch.float64, torch.float32)


def scores(kind, n, seed=0):
    if kind != "bimodal":
        return score_rows(kind, 1, n, seed=seed)[0]
    generator = torch.Generator().manual_seed(seed)
    side = (torch.rand(n, generator=generator) < 0.3).double()
    return torch.randn(n, generator=generator, dtype=torch.float64) + 12 * side


def squash(x, a=None):
    """The points of Cuturi, Teboul and Vert: logistic of the standardised scores."""
    a = torch.full_like(x, 1 / len(x)) if a is None else a
    mean = (a * x).sum()
    std = (a * (x - mean) ** 2).sum().sqrt()
    if (x == x[0]).all():
        return torch.full_like(x, 0.5), torch.ones_like(std)
    return torch.sigmoid((x - mean) / std * (math.pi / math.sqrt(3))), std


def even(m):
    return torch.arange(m, dtype=torch.float64) / max(1, m - 1), torch.full((m,), 1 / m, dtype=torch.float64)


@functools.lru_cache(maxsize=512)
def problem(kind, n, epsilon, p=2.0):
    """Scores, points, and what the whole plan makes of them; as many even targets."""
    x = scores(kind, n)
    points, std = squash(x)
    y, b = even(n)
    found = ordered_plan(points, b, y, b, epsilon, p=p)
    assert found.residual < 1e-11
    return x, points, std, n * (found.given_point @ b.cumsum(0)), n * (found.plan.mT @ x)


def solve(points, a, y, b, c, v, epsilon, p, dtype):
    """One problem through ``order``."""
    ranks, values = order(
        points[None],
        a[None],
        y[None],
        b[None],
        None if c is None else c[None],
        None if v is None else v[None, :, None],
        torch.tensor([[epsilon]], dtype=torch.float64),
        p,
        dtype,
    )
    return ranks[0].double(), values[0, :, 0].double() if v is not None else None


def compare(ranks, values, expected_ranks, expected_values, std, n, dtype):
    """Ranks to 2e-6 n, or 1e-6 in float64; sorted values to the same share of a standard deviation."""
    rank_bar = 1e-6 if dtype == torch.float64 else 2e-6 * n
    value_bar = 1e-6 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(ranks, expected_ranks, atol=rank_bar, rtol=0)
    # an outlier many deviations away is as good as its last digit
    rtol = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(values, expected_values, atol=value_bar * float(std), rtol=rtol)


def check(kind, n, epsilon, dtype, p=2.0):
    x, points, std, ranks, values = problem(kind, n, epsilon, p)
    y, b = even(n)
    found = solve(points, b, y, b, n * b.cumsum(0), x, epsilon, p, dtype)
    compare(*found, ranks, values, std, n, dtype)


SIZES = [
    *((50, epsilon) for epsilon in EPSILONS),
    *((400, epsilon) for epsilon in (1e-2, 1e-3, 1e-5)),
    *(pytest.param(400, epsilon, marks=pytest.mark.slow) for epsilon in (1.0, 1e-1, 1e-4)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "epsilon"), SIZES)
def test_against_the_whole_plan(n, kind, epsilon, dtype):
    check(kind, n, epsilon, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "epsilon"), [("normal", 1e-2), ("heavy", 1e-3)])
def test_against_the_whole_plan_1500(kind, epsilon, dtype):
    check(kind, 1500, epsilon, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_whole_plan_1500_all(kind, epsilon, dtype):
    check(kind, 1500, epsilon, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "epsilon"), [("normal", 1e-2), ("clustered", 1e-3), ("bimodal", 1e-4), ("outlier", 1e-5)]
)
def test_against_the_whole_plan_4000(kind, epsilon, dtype):
    check(kind, 4000, epsilon, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epsilon", [1e-1, 1e-3])
@pytest.mark.parametrize("kind", ["normal", "heavy", "clustered", "tied", "constant"])
def test_long_rows_against_the_whole_plan(kind, epsilon, dtype, monkeypatch):
    """Through fine boxes, even targets through a grid; the gradient as without them."""
    n = 700
    x, points, std, ranks, values = problem(kind, n, epsilon)
    points = points.clone().requires_grad_()
    y, b = even(n)
    ends = torch.tensor([[1.0, n]], dtype=torch.float64)
    width = torch.tensor([[epsilon]], dtype=torch.float64)

    def solved(precision):
        moments._even_targets.cache_clear()
        row = (t[None] for t in (points, b, y, b))
        return order(*row, ends, x[None, :, None], width, 2.0, precision, even=True, straight=True)

    exact = solved(torch.float64)
    monkeypatch.setattr(moments, "LONG", 500)
    monkeypatch.setattr(moments, "FINE", 1024)
    found = solved(dtype)
    moments._even_targets.cache_clear()
    compare(found[0][0].double(), found[1][0, :, 0].double(), ranks, values, std, n, dtype)
    cotangents = [torch.randn(t.shape, dtype=torch.float64) for t in exact]
    (mine,) = torch.autograd.grad(found, points, [t.to(dtype) for t in cotangents])
    (expected,) = torch.autograd.grad(exact, points, cotangents)
    bar = 1e-6 if dtype == torch.float64 else 2e-5
    assert float((mine - expected).abs().max()) <= bar * float(expected.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epsilon", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("kind", ["normal", "clustered", "tied", "outlier", "constant"])
@pytest.mark.parametrize("p", [1.0, 1.5, 3.0])
def test_other_costs(p, kind, epsilon, dtype):
    check(kind, 60, epsilon, dtype, p)


def masses(n, how, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if how == "zeros":
        a = torch.rand(n, generator=generator, dtype=torch.float64)
        a[torch.rand(n, generator=generator) < 0.4] = 0
        a[n // 2] = 1
    elif how == "one dominates":
        a = torch.rand(n, generator=generator, dtype=torch.float64)
        a[n // 3] = 1e3 * n
    elif how == "tiny":
        a = torch.ones(n, dtype=torch.float64)
        a[::3] = 1e-30
    else:
        a = (4 * torch.rand(n, generator=generator, dtype=torch.float64)).exp()
    return a / a.sum()


TARGETS = ("one", "two", "few", "more than points", "uneven places", "uneven masses", "outside", "repeated")


def targets(n, how, seed=2):
    generator = torch.Generator().manual_seed(seed)
    if how in ("one", "two", "few", "more than points"):
        return even({"one": 1, "two": 2, "few": 9, "more than points": 2 * n + 3}[how])
    y, b = even(n)
    if how == "uneven places":
        y = torch.rand(n, generator=generator, dtype=torch.float64).sort().values ** 2
    elif how == "outside":
        y = 5 * y - 2
    elif how == "repeated":
        y = (6 * y).round() / 6
    else:
        b = (5 * torch.rand(n, generator=generator, dtype=torch.float64)).exp()
        b = b / b.sum()
    return y, b


def check_uneven(x, a, y, b, epsilon, dtype):
    points, std = squash(x, a)
    c = len(x) * b.cumsum(0)
    plan = ordered_plan(points, a, y, b, epsilon)
    found = solve(points, a, y, b, c, x, epsilon, 2.0, dtype)
    values = (plan.plan.mT @ x) / b
    compare(*found, plan.given_point @ c, values, std, len(x), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epsilon", [1e-2, 1e-4])
@pytest.mark.parametrize("kind", ["normal", "clustered"])
@pytest.mark.parametrize("how", ["uneven", "zeros", "one dominates", "tiny"])
def test_weights(how, kind, epsilon, dtype):
    n = 200
    check_uneven(scores(kind, n), masses(n, how), *even(n), epsilon, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epsilon", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("kind", ["normal", "tied"])
@pytest.mark.parametrize("how", TARGETS)
def test_targets(how, kind, epsilon, dtype):
    n = 150
    x = scores(kind, n)
    check_uneven(x, torch.full_like(x, 1 / n), *targets(n, how), epsilon, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epsilon", [1e-1, 1e-3])
def test_weights_and_targets_together(epsilon, dtype):
    n = 300
    check_uneven(scores("normal", n), masses(n, "uneven"), *targets(n, "uneven masses"), epsilon, dtype)


def test_rows_of_all_kinds_in_one_batch():
    n, rows = 120, [(kind, epsilon) for kind in KINDS for epsilon in (1e-1, 1e-3, 1e-5)]
    together = [problem(kind, n, epsilon) for kind, epsilon in rows]
    y, b = (t.expand(len(rows), n) for t in even(n))
    epsilon = torch.tensor([[epsilon] for _, epsilon in rows], dtype=torch.float64)
    points, values = (torch.stack([t[place] for t in together]) for place in (1, 0))
    for dtype in DTYPES:
        found = order(points, b, y, b, n * b.cumsum(-1), values.unsqueeze(-1), epsilon, 2.0, dtype)
        for row, (_, _, std, ranks, expected) in enumerate(together):
            compare(found[0][row].double(), found[1][row, :, 0].double(), ranks, expected, std, n, dtype)


def test_the_oracle_against_textbook_sinkhorn():
    """The oracle itself: against a plain loop where that converges."""
    x = squash(scores("normal", 40))[0]
    a, (y, b) = masses(40, "uneven"), targets(40, "uneven masses")
    for p in (1.0, 1.5, 2.0, 3.0):
        cost = (x[:, None] - y).abs() ** p / 0.05
        f, g = torch.zeros_like(a), torch.zeros_like(b)
        for _ in range(3000):
            f = a.log() - torch.logsumexp(g - cost, -1)
            g = b.log() - torch.logsumexp(f[:, None] - cost, 0)
        found = ordered_plan(x, a, y, b, 0.05, p=p)
        torch.testing.assert_close(found.plan, (f[:, None] + g - cost).exp(), atol=1e-13, rtol=0)


def test_the_oracle_tends_to_the_staircase():
    x, (y, b) = torch.tensor([0.9, 0.1, 0.5], dtype=torch.float64), even(3)
    plan = ordered_plan(x, b, y, b, 1e-3).plan
    torch.testing.assert_close(plan, torch.eye(3, dtype=torch.float64)[[2, 0, 1]] / 3, atol=1e-12, rtol=0)
