"""``hard_assignment``: the discrete matching, for evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from couplings._checks import bool_tensor, broadcastable, describe, real_tensor, reject, same_device


def hard_assignment(
    cost_or_plan: Tensor,
    *,
    maximize: bool = True,
    row_mask: Tensor | None = None,
    column_mask: Tensor | None = None,
) -> Tensor:
    r"""The one-to-one matching of rows to columns with the largest total (or the smallest, of a cost).

    What counts as good is never guessed from the values: entries are how much a pair is *wanted* (a plan, a log plan,
    scores) unless ``maximize=False`` says that they are a *cost*. Exact, by scipy's ``linear_sum_assignment`` on
    the CPU: data on an accelerator are copied to the host and waited for. It has no gradient and does not work
    under ``torch.func`` transforms.

    Args:
        cost_or_plan: (\*batch, n, m), any real floating dtype. An entry of -inf (of +inf, with ``maximize=False``)
            forbids the pair. n and m may differ and may be 0. Of a plan with dustbins pass the part without them,
            ``coupling.plan()[..., :-1, :-1]``: a dustbin is a row or column like any other here.
        maximize: True for plans, log plans and scores; False for costs.
        row_mask: (\*batch, n) bool or broadcastable, True = takes part. A masked row is not assigned, and its
            values are not looked at.
        column_mask: (\*batch, m), likewise.

    Returns:
        (\*batch, n) int64 on the device of the input, the column of each row, -1 where it has none. As many pairs are
        made as the allowed ones admit, min(n, m) if none is forbidden or masked; of all such matchings the best.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device; NaN, or an infinity that would force a pair, among the valid entries.
        ImportError: scipy is not installed.

    Example:
        >>> import torch
        >>> plan = torch.tensor([[0.6, 0.4, 0.0], [0.7, 0.2, 0.1]])
        >>> hard_assignment(plan)
        tensor([1, 0])
        >>> hard_assignment(plan, maximize=False)
        tensor([2, 1])
    """
    real_tensor("cost_or_plan", cost_or_plan)
    if cost_or_plan.dim() < 2:
        reject("cost_or_plan", "shape (*batch, n, m)", describe(cost_or_plan), "Add the missing dimensions.")
    if not isinstance(maximize, bool):
        reject("maximize", "a bool", describe(maximize), "Pass False for costs, True for plans.", TypeError)
    *batch, n, m = cost_or_plan.shape
    for name, mask, size in (("row_mask", row_mask, n), ("column_mask", column_mask, m)):
        if mask is not None:
            bool_tensor(name, mask)
            same_device(name, mask, cost_or_plan, "cost_or_plan")
            broadcastable(name, mask, (*batch, size), "one flag per row or column")
    assign = _scipy()

    wanted = cost_or_plan.detach().to("cpu", torch.float64)
    wanted = wanted if maximize else -wanted
    count = math.prod(batch)
    rows = _mask(row_mask, (*batch, n)).reshape(count, n)
    columns = _mask(column_mask, (*batch, m)).reshape(count, m)
    valid = rows[:, :, None] & columns[:, None, :]
    wanted = torch.where(valid, wanted.reshape(count, n, m), -torch.inf)
    if bool((wanted.isnan() | (wanted == torch.inf)).any()):
        forbids, forces = ("-inf", "+inf") if maximize else ("+inf", "-inf")
        reject(
            "cost_or_plan",
            f"finite numbers, or {forbids} where a pair is forbidden",
            f"NaN or {forces}",
            "Look for its origin, mask its row or column, or pass another value of maximize.",
        )
    found = torch.full((count, n), -1, device="cpu")
    for matrix, chosen, r, c in zip(wanted, found, rows, columns, strict=True):
        i, j = r.nonzero()[:, 0], c.nonzero()[:, 0]
        if len(i) and len(j):
            _assign(assign, matrix, chosen, i, j)
    return found.reshape(*batch, n).to(cost_or_plan.device)


def _assign(assign: Callable[..., Any], matrix: Tensor, chosen: Tensor, i: Tensor, j: Tensor) -> None:
    """Write the matching of the rows i with the columns j into ``chosen``."""
    part = matrix[i][:, j]
    allowed = part.isfinite()
    if not bool(allowed.any()):
        return
    if not bool(allowed.all()):
        # an allowed pair is worth 0 to 1, a forbidden one costs more than all of them: first many pairs, then good ones
        low, high = part[allowed].min(), part[allowed].max()
        span = high - low if high > low else torch.ones_like(high)
        part = torch.where(allowed, (part - low) / span, -1.0 - min(part.shape))
    at, to = (torch.as_tensor(index) for index in assign(part.numpy(), maximize=True))
    kept = allowed[at, to]
    chosen[i[at[kept]]] = j[to[kept]]


def _mask(mask: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    return torch.ones(shape, dtype=torch.bool, device="cpu") if mask is None else mask.cpu().expand(shape)


def _scipy() -> Callable[..., Any]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("hard_assignment needs scipy: pip install 'couplings[matching]'") from error
    solver: Callable[..., Any] = linear_sum_assignment
    return solver
