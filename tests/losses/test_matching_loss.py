"""matching_loss: against a loop over the definition, unknowns, masks, messages."""

from __future__ import annotations

import pytest
import torch

import couplings as cp
from couplings.losses import matching_loss


def log_plan(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MATCHES = torch.tensor([[2, -1, 0, -2], [-1, -1, 3, 1]])
ROWS = torch.tensor([[True, True, True, True], [False, True, True, True]])
COLUMNS = torch.tensor([[True, True, True, False, True], [True] * 5])
UNKNOWN = torch.tensor([[-1, -2, 0, -2, -1], [-2, 3, -1, 2, -1]])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_is_the_definition(given, masked):
    plan = log_plan(2, 5, 6)
    rows, columns = (ROWS, COLUMNS) if masked else (torch.ones(2, 4) > 0, torch.ones(2, 5) > 0)
    terms = []
    for b in range(2):
        known = [i for i in range(4) if rows[b, i] and MATCHES[b, i] != -2]
        these = [-plan[b, i, MATCHES[b, i] if MATCHES[b, i] >= 0 else 5] for i in known]
        for j in range(5):
            alone = UNKNOWN[b, j] == -1 if given else j not in MATCHES[b].tolist()
            if given and j in MATCHES[b].tolist():
                continue
            if columns[b, j] and alone:
                these.append(-plan[b, 4, j])
        terms.append(torch.stack(these))
    given_columns = torch.where(UNKNOWN == -1, -1, UNKNOWN)
    for b in range(2):  # a column that is named cannot be without a partner
        for j in MATCHES[b][MATCHES[b] >= 0]:
            given_columns[b, j] = int((MATCHES[b] == j).nonzero()[0, 0])
    options = {"row_mask": rows, "column_mask": columns} if masked else {}
    options["column_matches"] = given_columns if given else None
    means = torch.stack([t.mean() for t in terms])
    torch.testing.assert_close(matching_loss(plan, MATCHES, reduction="none", **options), means)
    torch.testing.assert_close(matching_loss(plan, MATCHES, **options), means.mean())
    torch.testing.assert_close(
        matching_loss(plan, MATCHES, reduction="sum", **options), torch.cat(terms).sum()
    )


def test_half_precision_does_not_overflow():
    plan = torch.full((1, 1025, 1025), -119.0, dtype=torch.float16)
    assert matching_loss(plan, torch.full((1, 1024), -1)) == 119


def test_no_terms_is_zero_with_zero_gradient():
    plan = log_plan(2, 3, 3).requires_grad_()
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    loss = matching_loss(plan, torch.full((2, 2), -1), row_mask=nothing, column_mask=nothing)
    assert loss == 0
    assert (torch.autograd.grad(loss, plan)[0] == 0).all()


def test_masked_infinities_stay_out():
    scores = torch.randn(2, 3, 4, requires_grad=True)
    rows = torch.tensor([[True, True, False], [True, False, False]])
    plan = cp.match_with_dustbin(scores, 1.0, row_mask=rows).log_plan()
    loss = matching_loss(plan, torch.tensor([[1, -1, -1], [0, -1, -1]]), row_mask=rows)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[~rows] == 0).all()


def test_training_finds_the_matches():
    torch.manual_seed(1)
    truth = torch.tensor([3, -1, 0, 1, -1])
    scores = torch.zeros(5, 4, requires_grad=True)
    dustbin = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([scores, dustbin], 0.3)
    for _ in range(60):
        plan = cp.match_with_dustbin(scores, dustbin).log_plan()
        loss = matching_loss(plan, truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert cp.mutual_matches(plan).indices.tolist() == truth.tolist()


PLAN = torch.zeros(2, 5, 6)
BAD = {
    "plan": (lambda: matching_loss(3, MATCHES), TypeError, "log_plan"),
    "plan shape": (lambda: matching_loss(torch.zeros(3), MATCHES), ValueError, "N \\+ 1"),
    "matches type": (lambda: matching_loss(PLAN, [1]), TypeError, "matches"),
    "matches dtype": (lambda: matching_loss(PLAN, MATCHES.double()), TypeError, "matches"),
    "matches bool": (lambda: matching_loss(PLAN, MATCHES > 0), TypeError, "matches"),
    "matches shape": (lambda: matching_loss(PLAN, MATCHES[:, :3]), ValueError, "matches"),
    "out of range": (lambda: matching_loss(PLAN, MATCHES + 3), ValueError, "columns in"),
    "twice": (lambda: matching_loss(PLAN, torch.zeros_like(MATCHES)), ValueError, "at most once"),
    "masked partner": (
        lambda: matching_loss(PLAN, MATCHES, column_mask=torch.zeros(2, 5) > 0),
        ValueError,
        "matches",
    ),
    "contradiction": (
        lambda: matching_loss(PLAN, MATCHES, column_matches=torch.full((2, 5), -1)),
        ValueError,
        "matches",
    ),
    "contradicted by a column": (
        lambda: matching_loss(PLAN, torch.full((2, 4), -1), column_matches=torch.tensor([0, 1, 2, 3, -1])),
        ValueError,
        "matches",
    ),
    "mask": (lambda: matching_loss(PLAN, MATCHES, row_mask=MATCHES), TypeError, "row_mask"),
    "reduction": (lambda: matching_loss(PLAN, MATCHES, reduction="avg"), ValueError, "reduction"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
