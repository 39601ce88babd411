"""Pooling of adjacent violators in torch: against scipy, sequential pooling, and inputs made to be slow."""

import math

import pytest
import torch
from scipy.optimize import isotonic_regression

from couplings.ordering import isotonic, isotonic_compiled
from couplings.ordering.isotonic import Blocks, pool, pool_entropic


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    """Not the compiled pooling: test_isotonic_compiled.py."""
    monkeypatch.setattr(isotonic_compiled, "compiled", lambda: None)


def inputs(n, rows=4):
    place = torch.arange(n, dtype=torch.float64)
    noise = torch.randn(rows, n, dtype=torch.float64)
    last = torch.zeros(n, dtype=torch.float64)
    last[-1] = -3.0 * n
    return {
        "noise": noise,
        "walk": noise.cumsum(-1),
        "trend": place + 3 * noise,
        "rising": (place + 0 * noise),
        "falling": (-place + 0 * noise),
        "one at a time": (place + last + 0 * noise),
        "peak": torch.where(place > n / 2, -((n - place) ** 2), place**2) + 0 * noise,
        "geometric": torch.cat(
            (noise[:, :1] + 2.0 ** min(n, 60), 2.0 ** (place[1:] % 60) + 0 * noise[:, 1:]), -1
        ),
        "sawtooth": place - 3 * (place % 2) + 0 * noise,
        "ties": noise.round(),
    }


def block_mean(value, weights, blocks):
    total = torch.zeros_like(value).scatter_add(-1, blocks.first, value * weights).gather(-1, blocks.first)
    return total / torch.zeros_like(value).scatter_add(-1, blocks.first, weights).gather(-1, blocks.first)


def log_sum(s, blocks):
    """Block by block, naively."""
    out = torch.empty_like(s)
    for row, first, last, result in zip(s, blocks.first, blocks.last, out):
        for i in range(len(row)):
            result[i] = row[first[i] : last[i] + 1].logsumexp(0)
    return out


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 30, 700])
@pytest.mark.parametrize("rounds", [0, 1, 7, None])
def test_agrees_with_scipy(n, weighted, rounds, monkeypatch):
    if rounds is not None:
        monkeypatch.setattr(isotonic, "ROUNDS", rounds)
        monkeypatch.setattr(isotonic, "SMALL", 0)
    for y in inputs(n).values():
        weights = torch.rand_like(y) + 0.01 if weighted else torch.ones_like(y)
        found = block_mean(y, weights, pool(y, weights if weighted else None))
        for row, weight, mine in zip(y, weights, found):
            expected = torch.from_numpy(isotonic_regression(row.numpy(), weights=weight.numpy()).x)
            torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-9)


def test_wide_walks_apart_find_the_same_blocks(monkeypatch):
    problems = [y for n in (300, 700) for y in inputs(n).values()]
    together = [pool(y) for y in problems]
    monkeypatch.setattr(isotonic, "WINDOWS", 64)
    for y, (first, last) in zip(problems, together):
        apart = pool(y)
        assert torch.equal(apart.first, first)
        assert torch.equal(apart.last, last)


def test_a_partition_is_consistent():
    y = torch.randn(3, 400, dtype=torch.float64).cumsum(-1)
    first, last = pool(y)
    place = torch.arange(400)
    assert ((first <= place) & (place <= last)).all()
    assert torch.equal(first.gather(-1, last), first)
    assert torch.equal(last.gather(-1, first), last)


@pytest.mark.parametrize("rounds", [0, 3, None])
def test_entropic_blocks_satisfy_the_optimality_conditions(rounds, monkeypatch):
    """Rising values, and within a block no prefix lies below it: what makes a fit optimal."""
    if rounds is not None:
        monkeypatch.setattr(isotonic, "ROUNDS", rounds)
        monkeypatch.setattr(isotonic, "SMALL", 0)
    s = (torch.randn(3, 300, dtype=torch.float64) * 4).sort(-1).values
    for w in (torch.arange(1, 301).double().log().expand_as(s), torch.randn_like(s).sort(-1).values):
        blocks = pool_entropic(s, w)
        fit = log_sum(s, blocks) - log_sum(w, blocks)
        assert (fit.diff(dim=-1) >= -1e-12).all()
        place = torch.arange(300)
        prefix = Blocks(blocks.first, place.expand_as(blocks.first))
        assert (log_sum(s, prefix) - log_sum(w, prefix) >= fit - 1e-10).all()


def test_walls_are_never_crossed():
    y = -torch.arange(12, dtype=torch.float64).expand(2, 12)
    wall = torch.zeros(2, 12, dtype=torch.bool)
    wall[0, 4] = wall[1, 9] = True
    first, last = pool(y, None, wall)
    assert first[0].tolist() == [0] * 5 + [5] * 7
    assert last[1].tolist() == [9] * 10 + [11] * 2


@pytest.mark.parametrize("name", ["one at a time", "peak", "walk", "falling"])
def test_bad_inputs_need_few_rounds(name, monkeypatch):
    """None of them reaches the fallback, which would raise."""

    def forbidden(*_):
        raise AssertionError

    monkeypatch.setattr(isotonic._Problem, "finish", forbidden)
    pool(inputs(20_000, rows=2)[name])


def test_the_rows_of_a_batch_do_not_meet():
    y = torch.randn(6, 300, dtype=torch.float64).cumsum(-1)
    other = y.clone()
    other[::2] = 1e6 * torch.randn(3, 300, dtype=torch.float64)
    other[4] = math.nan
    for mine, theirs in zip(pool(y), pool(other)):
        assert torch.equal(mine[1::2], theirs[1::2])


def test_empty():
    assert pool(torch.zeros(0, 5, dtype=torch.float64)).first.shape == (0, 5)
    assert pool(torch.zeros(3, 0, dtype=torch.float64)).last.shape == (3, 0)
