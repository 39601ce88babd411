"""The dual softmax: a closed form in place of a transport plan, with dustbins read as matchabilities."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from couplings.matching.dustbin import Bordered
from couplings.transport import Coupling, Status


def dual_softmax(
    problem: Bordered, epsilon: float | Tensor, work: torch.dtype, dtype: torch.dtype
) -> Coupling:
    """``P_ij = matchable_i matchable_j softmax_j(S / eps)_ij softmax_i(S / eps)_ij`` as a coupling.

    Args:
        problem: Scores with dustbins and masks. The dustbin score d of a row or column, over epsilon, is minus its
            logit of being matchable: ``sigmoid(-d / eps)``; the bin gets the rest.
        epsilon: Temperature, a float or ``(*batch,)``.
        work: dtype of the arithmetic.
        dtype: dtype in which plans are returned.

    Returns:
        A coupling whose marginals are those that the plan has: nothing was asked of them, so its residual is 0. It has
        no potentials.
    """
    eps = torch.as_tensor(epsilon, dtype=torch.float64, device=problem.scores.device)
    eps = eps.expand(problem.scores.shape[:-2])
    logits = (problem.scores.to(torch.float64) / eps[..., None, None])[..., :-1, :-1]
    row_bins = problem.scores[..., :-1, -1].to(torch.float64) / eps[..., None]
    column_bins = problem.scores[..., -1, :-1].to(torch.float64) / eps[..., None]
    rows, columns = problem.rows[..., :-1], problem.columns[..., :-1]
    pairs = rows[..., :, None] & columns[..., None, :]
    matchable = logsigmoid(-row_bins)[..., :, None] + logsigmoid(-column_bins)[..., None, :]
    pair = _log_softmax(logits, pairs, -1) + _log_softmax(logits, pairs, -2) + matchable
    # a row without any column to go to is left to its bin whole
    row_bin = torch.where(columns.any(-1, keepdim=True), logsigmoid(row_bins), 0.0)
    column_bin = torch.where(rows.any(-1, keepdim=True), logsigmoid(column_bins), 0.0)
    top = torch.cat(
        [
            pair.masked_fill(~pairs, -torch.inf),
            row_bin.masked_fill(~rows, -torch.inf)[..., None],
        ],
        -1,
    )
    corner = torch.full_like(eps, -torch.inf)[..., None]
    bottom = torch.cat([column_bin.masked_fill(~columns, -torch.inf), corner], -1)
    log_plan = torch.cat([top, bottom[..., None, :]], -2)
    finite = torch.where(log_plan == -torch.inf, 0.0, log_plan)
    plan = torch.where(log_plan == -torch.inf, 0.0, finite.exp())
    scores = torch.where(log_plan == -torch.inf, 0.0, problem.scores.to(torch.float64))
    bad = log_plan.detach().isnan().flatten(-2).any(-1)
    return Coupling(
        log_plan=log_plan.to(work),
        plan=plan.to(work),
        a=plan.detach().sum(-1).to(dtype),
        b=plan.detach().sum(-2).to(dtype),
        epsilon=eps,
        potentials=_no_potentials,
        value=(plan * (eps[..., None, None] * (finite - 1) - scores)).sum((-1, -2)),
        residual=torch.where(bad, torch.nan, torch.zeros_like(eps)),
        gap=_no_gap,
        iterations=torch.zeros_like(eps, dtype=torch.int64),
        status=torch.where(bad, int(Status.NONFINITE), int(Status.CONVERGED)),
        dtype=dtype,
    )


def _log_softmax(logits: Tensor, valid: Tensor, dim: int) -> Tensor:
    """Along ``dim`` over the valid entries; a line without any gives finite numbers that no one reads."""
    if logits.shape[dim] == 0:
        return logits
    logits = logits.masked_fill(~valid & valid.any(dim, keepdim=True), -torch.inf)
    forbidden = (logits == -torch.inf).all(dim, keepdim=True)
    out = torch.where(forbidden, 0.0, logits).log_softmax(dim)
    return torch.where(forbidden, -torch.inf, out)


def _no_potentials() -> tuple[Tensor, Tensor]:
    raise AttributeError(
        "potentials: expected a transport plan, got method='dual_softmax', which solves no dual problem. "
        "Pass method='transport'."
    )


def _no_gap() -> Tensor:
    raise AttributeError(
        "gap: expected a transport plan, got method='dual_softmax', which minimises nothing. "
        "Pass method='transport'."
    )
