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
    scores = problem.scores.to(torch.float64)
    forbidden = scores == -torch.inf  # kept out of the division: epsilon has a derivative
    bordered = torch.where(forbidden, 0.0, scores) / eps[..., None, None]
    logits = bordered[..., :-1, :-1].masked_fill(forbidden[..., :-1, :-1], -torch.inf)
    rows, columns = problem.rows[..., :-1], problem.columns[..., :-1]
    pairs = rows[..., :, None] & columns[..., None, :]
    row_matchable, row_bins = _split(bordered[..., :-1, -1], forbidden[..., :-1, -1])
    column_matchable, column_bins = _split(bordered[..., -1, :-1], forbidden[..., -1, :-1])
    matchable = row_matchable[..., :, None] + column_matchable[..., None, :]
    pair = _log_softmax(logits, pairs, -1) + _log_softmax(logits, pairs, -2) + matchable
    # a row without any column to go to is left to its bin whole
    row_bin = torch.where(columns.any(-1, keepdim=True), row_bins, 0.0)
    column_bin = torch.where(rows.any(-1, keepdim=True), column_bins, 0.0)
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
    bad = log_plan.detach().isnan().flatten(-2).any(-1) | ~(eps.detach() > 0) | eps.detach().isinf()
    log_plan = log_plan.masked_fill(bad[..., None, None], torch.nan)
    nothing = log_plan == -torch.inf
    finite = torch.where(nothing, 0.0, log_plan)
    plan = torch.where(nothing, 0.0, finite.exp())
    scores = torch.where(nothing, 0.0, scores)
    return Coupling(
        log_plan=log_plan.to(work),
        plan=plan.to(work),
        a=plan.detach().sum(-1).to(dtype),
        b=plan.detach().sum(-2).to(dtype),
        epsilon=eps,
        potentials=None,
        value=(plan * (eps[..., None, None] * (finite - 1) - scores)).sum((-1, -2)),
        residual=torch.where(bad, torch.nan, torch.zeros_like(eps)),
        gap=None,
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


def _split(bin_logit: Tensor, without: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities of being matchable and of the bin; without a bin they are 0 and -inf."""
    matchable = torch.where(without, 0.0, logsigmoid(-bin_logit))
    return matchable, logsigmoid(bin_logit).masked_fill(without, -torch.inf)
