"""Losses that leave outliers out: a quantile of the losses, or the mean of the smallest."""

from __future__ import annotations

import torch
from torch import Tensor

from couplings import _checks
from couplings.losses.ranking import lists
from couplings.losses.ranking.lists import MASK_METHODS, Epsilon
from couplings.ordering import soft_quantile
from couplings.selection import soft_topk_mask


def least_quantile_loss(
    losses: Tensor,
    q: float = 0.5,
    *,
    mask: Tensor | None = None,
    epsilon: Epsilon = None,
    reduction: str = "mean",
) -> Tensor:
    r"""The soft q-quantile of the losses of each list: with q = 1/2 and squared residuals, least median of squares.

    What lies above the quantile, by however much, has next to no part in the loss, so that up to n (1 - q) outliers do
    not bend the fit. At ``epsilon=0`` the loss is ``torch.quantile`` of each list, linear between neighbours, with the
    gradient of the one or two entries that it is made of. A list without valid entries has loss 0.

    Args:
        losses: (\*batch, n), the loss of each sample (a squared or absolute residual, a cross-entropy), any real
            floating dtype. Half precision is computed in float32.
        q: which quantile, in [0, 1].
        mask: bool, broadcasts to losses, True = takes part.
        epsilon: smoothing of ``soft_quantile``, whose scale is standardised: an outlier raises the list's deviation, so
            that a soft quantile then averages over more of the inliers. None is its default.
        reduction: "mean" over all lists, "sum", or "none" for (\*batch).

    Returns:
        A scalar, or (\*batch) with ``reduction="none"``, in the dtype of losses. NaN in a list makes that list's loss
        NaN, and no other.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range.

    Reference:
        Rousseeuw: Least median of squares regression, Journal of the American Statistical Association, 1984. Soft:
        Cuturi, Teboul, Vert: Differentiable Ranking and Sorting using Optimal Transport, NeurIPS 2019, section 4.

    Example:
        >>> import torch, couplings as cp
        >>> residuals = torch.tensor([0.1, -0.2, 0.3, 50.0, 0.0])
        >>> round(cp.losses.least_quantile_loss(residuals.square(), epsilon=0).item(), 4)
        0.04
    """
    lists.check_lists("losses", losses)
    lists.check_options("losses", losses, mask, epsilon, reduction)
    _check_fraction("q", q, "Pass 0.5 for the median.", zero=True)

    dtype = losses.dtype
    x, mask = lists.working(losses, mask)
    loss = soft_quantile(x, float(q), epsilon=epsilon, mask=mask)
    if mask is not None:
        loss = torch.where(mask.any(-1), loss, 0)
    return lists.reduce(loss, reduction, dtype)


def trimmed_loss(
    losses: Tensor,
    keep: float,
    *,
    average: bool = True,
    detach_weights: bool = False,
    mask: Tensor | None = None,
    epsilon: Epsilon = None,
    method: str = "transport",
    reduction: str = "mean",
) -> Tensor:
    r"""The mean, or sum, of the smallest losses of each list: least trimmed squares, for squared residuals.

    The losses are weighted by A = ``soft_topk_mask(losses, k, largest=False)``, whose values in [0, 1] sum to k. The
    gradient passes through the losses and through A. With ``detach_weights=True`` it stops at A: d loss / d losses = A,
    never negative; for the transport method that is the gradient of the regularised optimum, min over plans of cost
    plus entropy, whose plan does not contribute at first order.

    At ``epsilon=0`` the loss is exact and its gradient is A, 0 or 1 (equal losses: first index first). A loss of +inf
    is never kept. A list without valid entries has loss 0.

    Args:
        losses: (\*batch, n), the loss of each sample, any real floating dtype. Half precision is computed in float32.
        keep: a float in (0, 1] is the part of the valid entries that is kept (a fraction of an entry counts as such:
            0.5 of 3 keeps the smallest and half of the next); an int in [1, n] is their number (all, where fewer are
            valid). Hence 1.0 keeps all and 1 the smallest.
        average: the mean of the kept losses, or else their sum.
        detach_weights: whether the weights count as constants in the gradient.
        mask: bool, broadcasts to losses, True = takes part.
        epsilon: smoothing of ``soft_topk_mask``, in standard deviations of the list. None: its default.
        method: any deterministic method of ``soft_topk_mask``; those made of k steps need an int ``keep``.
        reduction: "mean" over all lists, "sum", or "none" for (\*batch).

    Returns:
        A scalar, or (\*batch) with ``reduction="none"``, in the dtype of losses. NaN in a list makes that list's loss
        NaN, and no other.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range.

    Reference:
        Rousseeuw: Least median of squares regression, Journal of the American Statistical Association, 1984 (least
        trimmed squares). Soft top k: Xie et al.: Differentiable Top-k with Optimal Transport, NeurIPS 2020.

    Example:
        >>> import torch, couplings as cp
        >>> losses = torch.tensor([1.0, 50.0, 3.0, 2.0])
        >>> cp.losses.trimmed_loss(losses, 0.75, epsilon=0)
        tensor(2.)
        >>> cp.losses.trimmed_loss(losses, 2, average=False, epsilon=0)
        tensor(3.)
    """
    lists.check_lists("losses", losses)
    lists.check_options("losses", losses, mask, epsilon, reduction, MASK_METHODS, method)
    if isinstance(keep, int) and not isinstance(keep, bool):
        lists.check_count("keep", keep, losses.shape[-1], "how many losses are kept, or a part such as 0.9")
    else:
        _check_fraction("keep", keep, "Pass 0.9 to leave a tenth out, or an int number.", zero=False)

    dtype = losses.dtype
    x, mask = lists.working(losses, mask)
    endless = x == torch.inf  # masked by soft_topk_mask, too
    count = lists.count_valid(x, mask)
    kept = count.clamp_max(keep) if isinstance(keep, int) else count * keep
    kept = torch.minimum(kept, count - endless.sum(-1))
    weights = soft_topk_mask(
        x,
        keep if isinstance(keep, int) else count * keep,
        largest=False,
        epsilon=epsilon,
        method=method,
        mask=mask,
    )
    if detach_weights:
        weights = weights.detach()
    x = x.masked_fill(endless, 0)
    # The weights' sum is a constant: measured from the cut, losses far from 0 do not cancel in the weights' gradient.
    cut = _cut(x.detach(), weights.detach())
    loss = (weights * (x - cut)).sum(-1)
    loss = loss + ((weights * x).sum(-1) - loss).detach()
    if average:
        loss = loss / torch.where(kept > 0, kept, 1)
    return lists.reduce(loss, reduction, dtype)


def _cut(x: Tensor, weights: Tensor) -> Tensor:
    """The entry whose weight can change most, (*batch, 1)."""
    return x.gather(-1, (weights * (1 - weights)).argmax(-1, keepdim=True))


def _check_fraction(name: str, value: object, remedy: str, *, zero: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _checks.reject(name, "a float", _checks.describe(value), remedy, TypeError)
    if not 0 <= value <= 1 or (value == 0 and not zero):
        _checks.reject(name, f"a number in {'[' if zero else '('}0, 1]", value, remedy)
