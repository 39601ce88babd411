"""Reading a soft matching: the pairs that choose each other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from couplings import _checks
from couplings._rowwise import seen
from couplings.transport import Coupling

_ROUNDING = 0.05  # of the logarithm of 1, in half precision, too


class Matches(NamedTuple):
    """For every row its partner and how sure that is."""

    indices: Tensor  #: ``(*batch, N)`` int64, the column matched to a row, -1 for none
    confidence: Tensor  #: ``(*batch, N)``, the plan's entry of the pair, 0 for none


def mutual_matches(log_plan: Tensor, threshold: float = 0.2) -> Matches:
    r"""The pairs of a plan with dustbins that are each other's best, and better than a threshold.

    Row i is matched to column j if j is the largest of row i and i the largest of column j, both among the true rows
    and columns (not the dustbins), and ``exp(log_plan_ij) > threshold`` (Sarlin et al., SuperGlue, CVPR 2020). Of equal
    entries the first counts.

    Args:
        log_plan: (\*batch, N + 1, M + 1) logarithm of the plan, dustbins last, as ``match_with_dustbin(..).log_plan()``
            and ``log_optimal_transport`` return it.
        threshold: least confidence, at least 0.

    Returns:
        ``Matches(indices, confidence)``, both (\*batch, N). To read it from the columns' side, pass ``log_plan.mT``.
        NaN matches nothing. The confidence is differentiable.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or threshold; on an eager CPU, entries above 0, which are not logarithms of a plan.

    Example:
        >>> import torch, couplings as cp
        >>> scores = torch.tensor([[5.0, 0.0, 0.0], [0.0, -5.0, 6.0]])
        >>> coupling = cp.match_with_dustbin(scores, 1.0)
        >>> cp.mutual_matches(coupling.log_plan()).indices
        tensor([0, 2])
    """
    if isinstance(log_plan, Coupling):
        _checks.reject("log_plan", "a tensor", "a Coupling", "Pass coupling.log_plan().", TypeError)
    _checks.real_tensor("log_plan", log_plan)
    if log_plan.dim() < 2 or log_plan.shape[-1] < 1 or log_plan.shape[-2] < 1:
        _checks.reject(
            "log_plan",
            "shape (*batch, N + 1, M + 1), the dustbins last",
            _checks.describe(log_plan),
            "Pass coupling.log_plan() of match_with_dustbin.",
        )
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        _checks.reject("threshold", "a number", _checks.describe(threshold), "Pass a float.", TypeError)
    if not threshold >= 0:
        _checks.reject("threshold", "a number >= 0", threshold, "Pass 0 to keep all mutual pairs.")
    inner = log_plan[..., :-1, :-1]
    n, m = inner.shape[-2:]
    if n == 0 or m == 0:
        none = torch.full(inner.shape[:-1], -1, dtype=torch.int64, device=inner.device)
        return Matches(none, inner.new_zeros(inner.shape[:-1]))
    best, column = inner.max(-1)
    if seen(best > _ROUNDING):
        _checks.reject(
            "log_plan",
            "logarithms of a plan's entries, which are at most 1",
            f"an entry of {float(best.detach().amax()):.3g}",
            "Pass coupling.log_plan(), not coupling.plan().",
        )
    row = inner.detach().argmax(-2)
    mutual = row.gather(-1, column) == torch.arange(n, device=inner.device)
    confidence = best.exp()
    chosen = mutual & (confidence.detach() > threshold)  # NaN is never greater
    return Matches(torch.where(chosen, column, -1), torch.where(chosen, confidence, 0))
