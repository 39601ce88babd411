"""The loss of a soft matching with dustbins against true matches."""

from __future__ import annotations

import torch
from torch import Tensor

from couplings import _checks
from couplings._rowwise import seen

UNMATCHED, IGNORED = -1, -2


def matching_loss(
    log_plan: Tensor,
    matches: Tensor,
    *,
    column_matches: Tensor | None = None,
    row_mask: Tensor | None = None,
    column_mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log plan at the true matches and, for what has none, at the dustbins (SuperGlue, eq. 13).

    Every valid row and column with a known truth is one term; a matched pair counts once.

    Args:
        log_plan: (\*batch, N + 1, M + 1), dustbins last, as ``match_with_dustbin(..).log_plan()`` returns it.
        matches: (\*batch, N) integers: the column of each row, -1 for a row without a partner (its dustbin is
            right), -2 for one whose partner is unknown (no term).
        column_matches: (\*batch, M) likewise: -1 for a column without a partner, -2 unknown, else its row. Only
            -1 adds a term (pairs are named by ``matches``). None: every column that no row names is without a
            partner.
        row_mask: (\*batch, N) bool, True = takes part; a masked row has no term.
        column_mask: (\*batch, M), likewise. A true match must not be masked.
        reduction: "mean": over the terms of each problem, then over the problems that have any; "sum" of all; "none":
            each problem's mean, (\*batch), 0 without terms.

    Returns:
        A scalar, or (\*batch), in the dtype of log_plan.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or name; on an eager CPU also matches that are out of range,
            masked, or name a column twice. Elsewhere those give NaN.

    Reference:
        Sarlin et al.: SuperGlue: Learning Feature Matching with Graph Neural Networks, CVPR 2020.

    Example:
        >>> import torch, couplings as cp
        >>> scores = torch.tensor([[8.0, 0.0], [0.0, 0.0], [0.0, 9.0]], requires_grad=True)
        >>> coupling = cp.match_with_dustbin(scores, 2.0)
        >>> cp.losses.matching_loss(coupling.log_plan(), torch.tensor([0, -1, 1])) < 0.2
        tensor(True)
    """
    _checks.real_tensor("log_plan", log_plan)
    if log_plan.dim() < 2 or log_plan.shape[-1] < 1 or log_plan.shape[-2] < 1:
        _checks.reject(
            "log_plan",
            "shape (*batch, N + 1, M + 1), the dustbins last",
            _checks.describe(log_plan),
            "Pass coupling.log_plan() of match_with_dustbin.",
        )
    _checks.choice("reduction", reduction, ("mean", "sum", "none"))
    batch, n, m = log_plan.shape[:-2], log_plan.shape[-2] - 1, log_plan.shape[-1] - 1
    matches = _indices("matches", matches, log_plan, (*batch, n))
    rows = _valid("row_mask", row_mask, log_plan, (*batch, n))
    columns = _valid("column_mask", column_mask, log_plan, (*batch, m))
    matched = rows & (matches >= 0)
    inside = matched & (matches < m)
    named = torch.zeros((*batch, m + 1), dtype=torch.int64, device=log_plan.device)
    named = named.scatter_add(-1, torch.where(inside, matches, m), inside.long())[..., :m]
    wrong = (rows & ((matches < IGNORED) | (matches >= m))).any(-1)
    wrong = wrong | (named > 1).any(-1) | ((named > 0) & ~columns).any(-1)
    if column_matches is None:
        alone = columns & (named == 0)
    else:
        column_matches = _indices("column_matches", column_matches, log_plan, (*batch, m))
        alone = columns & (column_matches == UNMATCHED)
        wrong = wrong | (alone & (named > 0)).any(-1)
        wrong = wrong | _contradicts(column_matches, matches, columns, n)
        wrong = wrong | _contradicts(matches, column_matches, rows, m)
        wrong = wrong | (columns & ((column_matches < IGNORED) | (column_matches >= n))).any(-1)
    if seen(wrong):
        _checks.reject(
            "matches",
            f"valid columns in [0, {m - 1}], each at most once, or -1 or -2",
            "some that are not",
            "Check matches, column_matches and the masks.",
        )
    row_term = rows & (matches != IGNORED)
    target = torch.where(inside, matches, m)
    row_log = log_plan[..., :-1, :].gather(-1, target[..., None])[..., 0]
    work = torch.promote_types(log_plan.dtype, torch.float32)  # a sum over a thousand terms overflows float16
    total = -torch.where(row_term, row_log, 0).sum(-1, dtype=work)
    total = total - torch.where(alone, log_plan[..., -1, :-1], 0).sum(-1, dtype=work)
    count = row_term.sum(-1) + alone.sum(-1)
    total = total.masked_fill(wrong, torch.nan)
    if reduction == "sum":
        return total.sum().to(log_plan.dtype)
    mean = total / count.clamp_min(1)
    if reduction == "none":
        return mean.to(log_plan.dtype)
    return (mean.sum() / (count > 0).sum().clamp_min(1)).to(log_plan.dtype)


def _contradicts(claims: Tensor, answers: Tensor, valid: Tensor, size: int) -> Tensor:
    """Whether some claimed partner claims another, or none, ``(*batch,)``; an unknown answer contradicts nothing."""
    claimed = valid & (claims >= 0) & (claims < size)
    if size == 0:
        return claimed.any(-1)
    answer = answers.gather(-1, torch.where(claimed, claims, 0))
    index = torch.arange(claims.shape[-1], device=claims.device)
    return (claimed & (answer != IGNORED) & (answer != index)).any(-1)


def _indices(name: str, value: object, log_plan: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
        _checks.reject(name, "an integer tensor", _checks.describe(value), "Pass indices.", TypeError)
    if value.dtype == torch.bool:
        _checks.reject(name, "an integer tensor", _checks.describe(value), "Pass indices.", TypeError)
    _checks.same_device(name, value, log_plan, "log_plan")
    _checks.broadcastable(name, value, shape, "one index per row or column")
    return value.long().expand(shape)


def _valid(name: str, mask: Tensor | None, log_plan: Tensor, shape: tuple[int, ...]) -> Tensor:
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=log_plan.device)
    _checks.bool_tensor(name, mask)
    _checks.same_device(name, mask, log_plan, "log_plan")
    _checks.broadcastable(name, mask, shape, "one flag per row or column")
    return mask.expand(shape)
