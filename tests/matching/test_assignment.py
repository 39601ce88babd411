"""hard_assignment: brute force, scipy, forbidden pairs, masks, messages."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from couplings.matching.assignment import hard_assignment
from couplings.matching.normalize import sinkhorn_normalize

INF, NAN = float("inf"), float("nan")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def brute_force(wanted):
    """The most pairs, then the largest total, over every one-to-one matching."""
    n, m = wanted.shape
    best = (0, 0.0)
    slots = list(range(m)) + [-1] * n
    for columns in set(itertools.permutations(slots, n)):
        values = [float(wanted[i, j]) for i, j in enumerate(columns) if j >= 0]
        if -INF not in values:
            best = max(best, (len(values), sum(values)))
    return best


def outcome(wanted, columns):
    """Pairs and total of a matching, after checking that it is one."""
    used = columns[columns >= 0].tolist()
    assert len(set(used)) == len(used)
    values = [float(wanted[i, j]) for i, j in enumerate(columns.tolist()) if j >= 0]
    return len(values), sum(values)


@pytest.mark.parametrize("forbidden", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (4, 2), (1, 3), (3, 1), (1, 1)])
def test_against_brute_force(shape, forbidden):
    for seed in range(6):
        wanted = draw(*shape, seed=seed)
        wanted[torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < forbidden] = -INF
        for maximize in (True, False):
            columns = hard_assignment(wanted if maximize else -wanted, maximize=maximize)
            assert outcome(wanted, columns) == pytest.approx(brute_force(wanted))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 7, 7), (5, 6, 9), (4, 9, 6), (30, 30)])
def test_is_scipys_batched(shape, dtype):
    scores = draw(*shape, dtype=dtype)
    columns = hard_assignment(scores)
    assert columns.dtype == torch.int64
    assert columns.shape == shape[:-1]
    flat, found = scores.double().reshape(-1, *shape[-2:]), columns.reshape(-1, shape[-2])
    for matrix, ours in zip(flat, found, strict=True):
        rows, theirs = linear_sum_assignment(matrix.numpy(), maximize=True)
        assert ours[rows].tolist() == theirs.tolist()
        assert (ours >= 0).sum() == min(shape[-2:])
    assert torch.equal(hard_assignment(-scores, maximize=False), columns)


def test_reads_plans_and_log_plans():
    logits = 6 * draw(20, 5, 5)
    plan = sinkhorn_normalize(logits)
    expected = hard_assignment(logits)
    # the sharper the plan, the more its own best assignment is the scores'
    assert torch.equal(hard_assignment(sinkhorn_normalize(100 * logits)), expected)
    # adding potentials to the scores changes no assignment of all rows
    assert torch.equal(hard_assignment(plan.log()), expected)
    assert hard_assignment(plan.requires_grad_()).requires_grad is False


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31 - 1))
def test_masks_leave_the_unmasked_problem(n, m, seed):
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randn(3, n, m, generator=generator, dtype=torch.float64)
    rows, columns = (torch.rand(3, size, generator=generator) < 0.6 for size in (n, m))
    spoiled = torch.where(rows[:, :, None] & columns[:, None, :], wanted, NAN)
    found = hard_assignment(spoiled, row_mask=rows, column_mask=columns)
    for item in range(3):
        i, j = rows[item].nonzero()[:, 0], columns[item].nonzero()[:, 0]
        assert (found[item][~rows[item]] == -1).all()
        if len(i) and len(j):
            alone = hard_assignment(wanted[item][i][:, j])
            assert torch.equal(found[item][i], torch.where(alone >= 0, j[alone], -1))
        else:
            assert (found[item] == -1).all()


def test_broadcast_masks():
    wanted = draw(4, 3, 3)
    found = hard_assignment(
        wanted, row_mask=torch.tensor([True, False, True]), column_mask=torch.tensor([True])
    )
    assert (found[:, 1] == -1).all()
    assert (found[:, [0, 2]] >= 0).all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 0), (0, 3, 3), (2, 3, 0)])
def test_nothing_to_assign(shape):
    columns = hard_assignment(torch.zeros(shape))
    assert columns.shape == shape[:-1]
    assert (columns == -1).all()


def test_forbidden_everywhere_and_large_numbers():
    assert hard_assignment(torch.full((2, 2), -INF)).tolist() == [-1, -1]
    wanted = torch.tensor([[1e300, -INF], [1e300, 1.0]], dtype=torch.float64)
    assert hard_assignment(wanted).tolist() == [0, 1]
    equal = torch.tensor([[5.0, -INF, -INF], [5.0, -INF, -INF], [-INF, 5.0, 5.0]])
    assert outcome(equal, hard_assignment(equal)) == (2, 10.0)


@pytest.mark.parametrize(
    ("argument", "value", "options", "error"),
    [
        ("cost_or_plan", [[1.0]], {}, TypeError),
        ("cost_or_plan", torch.ones(2, 2, dtype=torch.int64), {}, TypeError),
        ("cost_or_plan", torch.ones(2), {}, ValueError),
        ("cost_or_plan", torch.tensor([[NAN, 1.0]]), {}, ValueError),
        ("cost_or_plan", torch.tensor([[INF, 1.0]]), {}, ValueError),
        ("cost_or_plan", torch.tensor([[-INF, 1.0]]), {"maximize": False}, ValueError),
        ("maximize", torch.ones(2, 2), {"maximize": 1}, TypeError),
        ("maximize", torch.ones(2, 2), {"maximize": None}, TypeError),
        ("row_mask", torch.ones(2, 2), {"row_mask": torch.ones(3, dtype=torch.bool)}, ValueError),
        ("row_mask", torch.ones(2, 2), {"row_mask": torch.ones(2)}, TypeError),
        ("row_mask", torch.ones(2, 2), {"row_mask": [True, True]}, TypeError),
        ("column_mask", torch.ones(2, 2), {"column_mask": torch.ones(5, 2, dtype=torch.bool)}, ValueError),
        (
            "column_mask",
            torch.ones(2, 2),
            {"column_mask": torch.ones(2, dtype=torch.bool, device="meta")},
            ValueError,
        ),
    ],
)
def test_bad_arguments(argument, value, options, error):
    with pytest.raises(error, match=f"^{argument}: expected .+, got ") as caught:
        hard_assignment(value, **options)
    assert type(caught.value) is error


def test_says_how_to_get_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"pip install 'couplings\[matching\]'"):
        hard_assignment(torch.ones(2, 2))
