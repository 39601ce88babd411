"""Rank correlations as losses: Spearman's rho and Kendall's tau."""

from __future__ import annotations

import torch
from torch import Tensor

from couplings import _checks
from couplings._rowwise import seen
from couplings._scale import inverse_power, mean_std
from couplings.losses.ranking import lists
from couplings.losses.ranking.lists import RANK_METHODS, Epsilon
from couplings.losses.ranking.pairs import agreement
from couplings.losses.ranking.ties import mid_ranks, untied_pairs
from couplings.ordering import soft_rank

KENDALL_EPSILON = 0.2
"""epsilon=None in ``kendall_loss``."""


def spearman_loss(
    x: Tensor,
    y: Tensor,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    soft_target: bool = False,
    epsilon: Epsilon = None,
    method: str = "transport",
    reduction: str = "mean",
) -> Tensor:
    r"""One minus Spearman's rank correlation of each list: 0 in equal order, 1 without relation, 2 in reverse order.

    The correlation is Pearson's, of the soft ranks of x with the ranks of y. The ranks of y are exact, and equal values
    share their average rank. At ``epsilon=0`` so do those of x, and the loss is ``1 - scipy.stats.spearmanr``, ties
    included; it is also the limit as epsilon falls (soft ranks of equal values are equal).

    A list has nothing to order if it has fewer than two valid entries, or equal y throughout: its loss is 0. Where
    x is constant and y is not, the correlation is undefined and taken as 0, with gradient 0: the loss is 1.

    Args:
        x: (\*batch, n) scores to be trained, any real floating dtype. Half precision is computed in float32.
        y: the values whose order x should have, any real or integer dtype, broadcasts to x.
        mask: bool, broadcasts to x, True = takes part.
        weights: non-negative, of x's dtype, broadcasts to x. A weight is a multiplicity, in ranks and in the
            correlation alike: at ``epsilon=0``, weights 2 and 0 are the same as repeating and as leaving out an entry.
            The soft ranks are those of ``soft_rank(x, weights=weights)``, whose evenly spaced milestones follow the
            repeated list's ranks to within half a rank.
        soft_target: whether the ranks of y are soft, too, with the same epsilon and method, so that y (then of x's
            dtype) is trained as well. Otherwise y gets no gradient.
        epsilon: smoothing of ``soft_rank``, in the method's units. None is its default for the method.
        method: any method of ``soft_rank``.
        reduction: "mean" over all lists, "sum", or "none" for (\*batch).

    Returns:
        A scalar, or (\*batch) with ``reduction="none"``, in [0, 2] and in the dtype of x. NaN in a list makes that
        list's loss NaN, and no other.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range; on an eager CPU also negative weights, which give
            NaN elsewhere.

    Reference:
        Spearman: The proof and measurement of association between two things, American Journal of Psychology, 1904.
        Soft ranks: Cuturi, Teboul, Vert: Differentiable Ranking and Sorting using Optimal Transport, NeurIPS 2019.

    Example:
        >>> import torch, couplings as cp
        >>> x, y = torch.tensor([1.0, 2.0, 2.0, 5.0]), torch.tensor([10, 30, 20, 40])
        >>> round(cp.losses.spearman_loss(x, y, epsilon=0).item(), 4)
        0.0513
        >>> round(cp.losses.spearman_loss(-x, y, epsilon=1e-3).item(), 4)
        1.9487
    """
    lists.check_lists("x", x)
    lists.check_options("x", x, mask, epsilon, reduction, RANK_METHODS, method)
    if soft_target:
        _checks.real_tensor("y", y)
        _checks.same_dtype("y", y, x)
    y = lists.check_beside("y", y, x, "x", "one target value per score")
    if weights is not None:
        _checks.real_tensor("weights", weights)
        _checks.same_dtype("weights", weights, x)
        weights = lists.check_beside("weights", weights, x, "x", "one weight per score")
        if seen(~((weights >= 0) & (weights < torch.inf))):
            _checks.reject("weights", "finite values >= 0", "some that are not", "Clamp or mask them.")

    dtype = x.dtype
    if weights is not None:
        weights, _ = lists.working(weights, mask)
        present = weights > 0
        mask = present if mask is None else mask & present
    x, mask = lists.working(x, mask)
    y, _ = lists.working(y if soft_target else y.detach(), mask)

    def ranks(a: Tensor, soft: bool) -> Tensor:
        if not soft:
            return mid_ranks(a, mask, weights, x.dtype)
        return soft_rank(a, epsilon=epsilon, method=method, weights=weights, mask=mask)

    soft = not lists.is_exact(epsilon)
    x_ranks = ranks(x, soft)
    y_ranks = ranks(y, soft and soft_target)
    correlation = _pearson(x_ranks, y_ranks, weights, mask, _constant(x, mask) | _constant(y, mask))
    loss = lists.where_defined(~_constant(y, mask), 1 - correlation, x) + lists.no_gradient(y).to(x.dtype)
    if weights is not None and seen(weights < 0) is None:
        loss = loss.masked_fill((weights < 0).any(-1), torch.nan)
    return lists.reduce(loss, reduction, dtype)


def kendall_loss(
    x: Tensor,
    y: Tensor,
    *,
    mask: Tensor | None = None,
    epsilon: Epsilon = None,
    reduction: str = "mean",
) -> Tensor:
    r"""One minus Kendall's tau-b of each list: 0 in equal order, 1 without relation, 2 in reverse order.

    tau-b is the cosine between the signs of x_i - x_j and the signs of y_i - y_j over all pairs. The soft loss replaces
    the former by tanh((x_i - x_j) / (2 epsilon std)), which is twice a sigmoid minus one: the pairwise form of
    ``soft_rank(method="sigmoid")``. At ``epsilon=0`` it is ``1 - scipy.stats.kendalltau``, ties included, and it tends
    to that as epsilon falls. Time is O(n^2); pairs are worked through in tiles and again in the backward pass, so that
    memory is O(n) (second order included).

    A list has nothing to order if it has fewer than two valid entries, or equal y throughout: its loss is 0. Where
    x is constant and y is not, tau is undefined and taken as 0, with gradient 0: the loss is 1.

    Args:
        x: (\*batch, n) scores to be trained, any real floating dtype. Half precision is computed in float32.
        y: the values whose order x should have, any real or integer dtype, broadcasts to x; gets no gradient.
        mask: bool, broadcasts to x, True = takes part.
        epsilon: smoothing, in standard deviations of the list: a float, or a tensor with one value per list. None
            means 0.2.
        reduction: "mean" over all lists, "sum", or "none" for (\*batch).

    Returns:
        A scalar, or (\*batch) with ``reduction="none"``, in [0, 2] and in the dtype of x. NaN in a list makes that
        list's loss NaN, and no other.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range.

    Reference:
        Kendall: The treatment of ties in ranking problems, Biometrika, 1945.

    Example:
        >>> import torch, couplings as cp
        >>> x, y = torch.tensor([1.0, 2.0, 2.0, 5.0]), torch.tensor([10, 30, 20, 40])
        >>> round(cp.losses.kendall_loss(x, y, epsilon=0).item(), 4)
        0.0871
        >>> round(cp.losses.kendall_loss(-x, y, epsilon=1e-3).item(), 4)
        1.9129
    """
    lists.check_lists("x", x)
    lists.check_options("x", x, mask, epsilon, reduction, ("tanh",), "tanh")
    y = lists.check_beside("y", y, x, "x", "one target value per score")

    dtype = x.dtype
    x, mask = lists.working(x, mask)
    y, _ = lists.working(y.detach(), mask)
    if lists.is_exact(epsilon):
        z = 100 * mid_ranks(x, mask, None, x.dtype)  # tanh(50) is 1 in float64
        apart = z, torch.ones_like(z[..., :1])
    else:
        mean, std = mean_std(x, None, mask)
        half = _half_over(KENDALL_EPSILON if epsilon is None else epsilon, x)
        z = (x - mean) / std * half
        z = z if mask is None else z.masked_fill(~mask, 0)
        std = std.detach()
        scale = inverse_power(std)
        apart = x.detach() * scale, half / (std * scale)
    together, x_size = agreement(z, apart, 2 * mid_ranks(y, mask, None, x.dtype), mask)  # whole numbers
    y_size = untied_pairs(y, mask).to(x.dtype)
    undefined = (_constant(x, mask) | _constant(y, mask)).unsqueeze(-1) | (x_size.detach() <= 0)
    size = torch.where(undefined, 1, x_size).sqrt() * torch.where(undefined, 1, y_size).sqrt()
    tau = torch.where(undefined, 0, together / size).squeeze(-1)
    loss = lists.where_defined(~_constant(y, mask), 1 - tau, x) + lists.no_gradient(y).to(x.dtype)
    return lists.reduce(loss, reduction, dtype)


def _half_over(epsilon: float | Tensor, x: Tensor) -> float | Tensor:
    """1 / (2 epsilon), one per list, finite however small epsilon is."""
    largest = torch.finfo(x.dtype).max / 1e12
    if isinstance(epsilon, Tensor):
        return (0.5 / epsilon.to(x.dtype)).clamp_max(largest).expand(x.shape[:-1]).unsqueeze(-1)
    return min(0.5 / epsilon, largest)


def _constant(x: Tensor, mask: Tensor | None) -> Tensor:
    """Lists whose valid entries are all equal, or that have none; not those with NaN. (*batch)."""
    x = x.detach()
    if mask is None:
        return x.amax(-1) == x.amin(-1)
    most, least = x.masked_fill(~mask, -torch.inf).amax(-1), x.masked_fill(~mask, torch.inf).amin(-1)
    return (most == least) | ~mask.any(-1)


def _pearson(x: Tensor, y: Tensor, weights: Tensor | None, mask: Tensor | None, undefined: Tensor) -> Tensor:
    """Correlation of each list, (*batch); 0 where undefined."""
    if weights is None:
        weights = torch.ones_like(x) if mask is None else mask.to(x.dtype)
    elif mask is not None:
        weights = weights.masked_fill(~mask, 0)
    total = weights.sum(-1, keepdim=True)
    share = weights / torch.where(total > 0, total, 1)

    def centred(a: Tensor) -> Tensor:
        a = a / a.shape[-1]
        return a - (a * share).sum(-1, keepdim=True)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a * b * share).sum(-1)

    x, y = centred(x), centred(y)
    x_size, y_size = product(x, x), product(y, y)
    undefined = undefined | (x_size.detach() <= 0) | (y_size.detach() <= 0)
    size = torch.where(undefined, 1, x_size).sqrt() * torch.where(undefined, 1, y_size).sqrt()
    return torch.where(undefined, 0, product(x, y) / size)
