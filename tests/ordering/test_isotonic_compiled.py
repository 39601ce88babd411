"""The compiled pooling: the same blocks as the torch path, scipy's values, and the torch path where numba fails."""

import sys
import warnings

import numba
import pytest
import torch
from scipy.optimize import isotonic_regression
from test_isotonic import block_mean, inputs, log_sum

import couplings as cp
from couplings.ordering import isotonic_compiled
from couplings.ordering.isotonic import pool, pool_entropic, rank_blocks, value_blocks


@pytest.fixture
def afresh():
    """The decision is made again in this test, and again after it."""
    isotonic_compiled._attempt.cache_clear()
    yield
    isotonic_compiled._attempt.cache_clear()


@pytest.fixture
def fast():
    """The compiled pooling is what runs: a numba that is installed must work."""
    assert isotonic_compiled.compiled() is not None, isotonic_compiled.status()


@pytest.fixture
def slow(monkeypatch):
    """Calls its argument without the compiled pooling."""

    def run(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(isotonic_compiled, "compiled", lambda: None)
            return function(*args)

    return run


def walls(shape):
    return [None, torch.rand(shape) < 0.1, torch.ones(shape, dtype=torch.bool)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 30, 700])
def test_least_squares(n, weighted, fast, slow):
    for name, y in inputs(n).items():
        weights = torch.rand_like(y) + 0.01 if weighted else None
        ones = torch.ones_like(y) if weights is None else weights
        for wall in walls(y.shape):
            blocks = pool(y, weights, wall)
            found, expected = (block_mean(y, ones, b) for b in (blocks, slow(pool, y, weights, wall)))
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-9, msg=name)
            if wall is not None:
                assert (blocks.last[wall] == torch.arange(n).expand(y.shape)[wall]).all()
            else:
                for row, weight, mine in zip(y, ones, found):
                    theirs = torch.from_numpy(isotonic_regression(row.numpy(), weights=weight.numpy()).x)
                    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-9, msg=name)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_same_partition(weighted, fast, slow):
    """Where sums are exact (small integers) or far from equal (noise), to the last index."""
    for y in (
        torch.randn(20, 300, dtype=torch.float64),
        torch.randint(-8, 9, (20, 300)).double(),
        torch.randint(-1, 2, (20, 300)).double().cumsum(-1),
    ):
        weights = torch.randint(1, 5, y.shape).double() if weighted else None
        for wall in walls(y.shape):
            for mine, theirs in zip(pool(y, weights, wall), slow(pool, y, weights, wall)):
                assert torch.equal(mine, theirs)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("n", [1, 2, 300])
def test_entropic(n, scale, weighted, fast, slow):
    targets = torch.arange(1, n + 1, dtype=torch.float64).log()
    for s in (
        (torch.randn(4, n, dtype=torch.float64) * scale).sort(-1).values,
        torch.randint(0, 9, (4, n)).double().sort(-1).values * scale / 9,
        torch.zeros(4, n, dtype=torch.float64),
    ):
        for w in (targets.expand_as(s), torch.randn_like(s).sort(-1).values * scale):
            weights = torch.rand_like(s) + 0.01 if weighted else None
            for wall in walls(s.shape):
                fits = []
                for blocks in (
                    pool_entropic(s, w, weights, wall),
                    slow(pool_entropic, s, w, weights, wall),
                ):
                    log_weights = 0 if weights is None else weights.log()
                    fits.append(log_sum(s + log_weights, blocks) - log_sum(w + log_weights, blocks))
                torch.testing.assert_close(fits[0], fits[1], rtol=1e-11, atol=1e-9)
                if wall is None:
                    assert (fits[0].diff(dim=-1) >= -1e-9 * scale).all()


@pytest.mark.parametrize("variant", ["l2", "kl"])
@pytest.mark.parametrize("function", [cp.soft_rank, cp.soft_sort])
def test_operators(function, variant, fast, slow):
    """Values, gradients, weights, masks, other layouts and vmap."""
    x = torch.randn(3, 200, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 200, 4, dtype=torch.float64) + 0.1
    mask = torch.rand(3, 200, 4) > 0.2
    cotangent = torch.randn_like(x)

    def both(options):
        out = function(x, dim=1, method="projection", variant=variant, **options)
        return out.detach(), *torch.autograd.grad(out, x, cotangent)

    for options in ({}, {"weights": weights}, {"mask": mask}, {"mask": mask, "weights": weights}):
        for mine, theirs in zip(both(options), slow(both, options)):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    rows = x.detach()[..., 0]

    def one(row):
        return function(row, method="projection", variant=variant)

    torch.testing.assert_close(torch.func.vmap(one)(rows), one(rows))


@pytest.mark.parametrize("entropic", [False, True])
def test_blocks_of_ranks_and_values_in_one_go(entropic, fast, slow):
    """From scores to blocks, as in steps; rows far beyond what exponentials hold among them."""
    x = torch.randn(12, 300, dtype=torch.float64).sort(-1).values
    x[3] = x[3].round()
    x[4] = 0.5
    one = torch.ones(12, 1, dtype=torch.float64)
    place = torch.arange(1, 301, dtype=torch.float64)
    stretch = torch.logspace(-2, 4, 12, dtype=torch.float64).unsqueeze(-1)
    for mine, theirs in (
        [find(rank_blocks, x, stretch, place, None, None, entropic) for find in (call, slow)],
        [find(value_blocks, x * stretch, 2 * one, one / 30, None, entropic) for find in (call, slow)],
    ):
        for mean in (block_mean, log_sum):
            arguments = (x, torch.ones_like(x)) if mean is block_mean else (x,)
            torch.testing.assert_close(mean(*arguments, mine), mean(*arguments, theirs), rtol=1e-9, atol=1e-9)


def call(function, *args):
    return function(*args)


def test_not_a_number_and_infinity(fast):
    """Such rows end, and leave others alone."""
    y = torch.randn(4, 50, dtype=torch.float64)
    other = y.clone()
    other[1, 7], other[2, 3], other[3, ::5] = float("nan"), float("inf"), -float("inf")
    for mine, theirs in zip(pool(y), pool(other)):
        assert torch.equal(mine[0], theirs[0])
    for blocks in (pool_entropic(other, other), pool(other, torch.zeros_like(other))):
        assert ((blocks.first >= 0) & (blocks.last < 50)).all()


def test_on_the_cpu_whatever_the_default_device(fast):
    y = torch.randn(2, 9, dtype=torch.float64)
    expected = pool(y)
    with torch.device("meta"):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(pool(y), expected))


def fitted():
    y = torch.tensor([[3.0, 1.0, 2.0, 5.0]], dtype=torch.float64)
    assert pool(y).first.tolist() == [[0, 0, 0, 3]]


def test_absent(afresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    fitted()
    assert isotonic_compiled.compiled() is None
    assert "not installed" in isotonic_compiled.status()


class Broken:
    """A numba that fails in one way or another."""

    __version__ = "0"

    class config:
        DISABLE_JIT = 0

    def __init__(self, result):
        self.result = result

    def njit(self, *_, **__):
        if isinstance(self.result, Exception):
            raise self.result
        return lambda function: self.result


@pytest.mark.parametrize(
    "result",
    [
        RuntimeError("cannot cache function: no locator available"),
        ImportError("numba needs another numpy"),
        SystemError(""),
        UserWarning("turned into an error"),
        lambda *arrays: [array.fill(0) for array in arrays[4:6]],
    ],
)
def test_broken(result, afresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", Broken(result))
    fitted()
    assert isotonic_compiled.compiled() is None
    assert "plain torch (numba" in isotonic_compiled.status()


def test_decided_once(afresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    fitted()
    monkeypatch.setitem(sys.modules, "numba", Broken(AssertionError("imported again")))
    fitted()
    assert "not installed" in isotonic_compiled.status()


def test_interpreted_numba_is_not_used(afresh, monkeypatch):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    fitted()
    assert isotonic_compiled.compiled() is None


def test_as_interpreted(afresh, monkeypatch, slow):
    """The compiled function as plain Python: what it does can be tested, and covered, without numba."""
    identity = Broken(None)
    identity.njit = lambda *_, **__: lambda function: function
    monkeypatch.setitem(sys.modules, "numba", identity)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy says where numba says nothing
        assert isotonic_compiled.compiled() is not None
        for y in inputs(40).values():
            for wall in walls(y.shape):
                mine, theirs = pool(y, None, wall), slow(pool, y, None, wall)
                ones = torch.ones_like(y)
                torch.testing.assert_close(
                    block_mean(y, ones, mine), block_mean(y, ones, theirs), rtol=1e-11, atol=1e-9
                )
