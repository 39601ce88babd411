"""Retrieval metrics as losses: NDCG, average precision, recall at k."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from couplings import _checks
from couplings._rowwise import seen
from couplings._scale import mean_std
from couplings.losses.ranking import lists
from couplings.losses.ranking.lists import MASK_METHODS, RANK_METHODS, Epsilon
from couplings.losses.ranking.ties import places
from couplings.ordering import soft_rank
from couplings.selection import soft_topk_mask

Gains = str | Callable[[Tensor], Tensor]


def ndcg_loss(
    scores: Tensor,
    relevance: Tensor,
    *,
    k: int | None = None,
    gains: Gains = "exponential",
    mask: Tensor | None = None,
    epsilon: Epsilon = None,
    method: str = "transport",
    reduction: str = "mean",
) -> Tensor:
    r"""One minus the normalised discounted cumulative gain of each list.

    DCG = sum_i gain_i / log2(1 + R_i), with R_i the descending soft rank of score i, divided by the DCG of the best
    order. With a cut-off k, each summand is multiplied by the entry's share in the soft top k,
    ``soft_topk_mask(scores, k, epsilon=epsilon)``, which is always the transport one, whatever the method of the ranks.

    At ``epsilon=0`` the loss is the metric: ``1 - sklearn.metrics.ndcg_score`` with linear gains, equal scores sharing
    the mean discount of their places. (Soft ranks of equal scores tend to the discount of their mean place instead.) A
    list without any gain has nothing to rank: its loss is 0.

    Args:
        scores: (\*batch, n), any real floating dtype. Half precision is computed in float32.
        relevance: how relevant each entry is, non-negative, any real or integer dtype, broadcasts to scores.
        k: only the first k places count; None, or k >= n: all.
        gains: "exponential" (2^relevance - 1), "linear" (relevance), or a function of the relevance in the scores'
            working dtype, returning the same shape.
        mask: bool, broadcasts to scores, True = takes part.
        epsilon: smoothing of ``soft_rank``, and of ``soft_topk_mask`` for the cut-off. None is the default of each.
        method: any method of ``soft_rank``.
        reduction: "mean" over all lists, "sum", or "none" for (\*batch).

    Returns:
        A scalar, or (\*batch) with ``reduction="none"``, in the dtype of scores; at most 1, and at least 0 up to what
        the smoothing of the cut-off adds. NaN in a list makes that list's loss NaN, and no other.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range; on an eager CPU also negative gains, which give
            NaN elsewhere.

    Reference:
        Järvelin, Kekäläinen: Cumulated gain-based evaluation of IR techniques, ACM Transactions on Information
        Systems, 2002. Soft ranks in it: Qin, Liu, Li: A general approximation framework for direct optimization of
        information retrieval measures, Information Retrieval, 2010, section 4.

    Example:
        >>> import torch, couplings as cp
        >>> scores, relevance = torch.tensor([0.3, 2.0, 1.0]), torch.tensor([2, 1, 0])
        >>> round(cp.losses.ndcg_loss(scores, relevance, epsilon=0).item(), 4)
        0.3115
        >>> round(cp.losses.ndcg_loss(scores, relevance, k=1, gains="linear", epsilon=0).item(), 4)
        0.5
    """
    lists.check_lists("scores", scores)
    lists.check_options("scores", scores, mask, epsilon, reduction, RANK_METHODS, method)
    relevance = lists.check_beside("relevance", relevance, scores, "scores", "one relevance per score")
    if k is not None:
        k = lists.check_count("k", k, None, "how many places count, or None for all")
    if not callable(gains):
        _checks.choice("gains", gains, ("exponential", "linear"))

    dtype, n = scores.dtype, scores.shape[-1]
    x, mask = lists.working(scores, mask)
    relevance = relevance.to(x.dtype)
    if mask is not None:
        relevance = relevance.masked_fill(~mask, 0)
    if callable(gains):
        gain = gains(relevance)
        if getattr(gain, "shape", None) != x.shape:
            _checks.reject(
                "gains",
                f"a function that keeps the shape {tuple(x.shape)}",
                _checks.describe(gain),
                "Return one gain for each entry.",
            )
        gain = gain.to(x.dtype)
    else:
        gain = relevance if gains == "linear" else torch.exp2(relevance) - 1
    if mask is not None:
        gain = gain.masked_fill(~mask, 0)
    if seen(gain < 0):
        _checks.reject(
            "relevance", "gains >= 0", "some below 0", "Shift the relevance so that the least is 0."
        )

    cut = n if k is None else min(k, n)
    discounts = 1 / torch.arange(2, n + 2, device=x.device, dtype=x.dtype).log2()
    discounts = discounts.masked_fill(torch.arange(n, device=x.device) >= cut, 0)
    ideal = (gain.sort(dim=-1, descending=True).values * discounts).sum(-1)
    if lists.is_exact(epsilon):
        share = places(x, mask, descending=True).shared_mean(discounts.expand(x.shape))
    else:
        rank = soft_rank(x, descending=True, epsilon=epsilon, method=method, mask=mask)
        if mask is not None:
            rank = rank.masked_fill(~mask, 1)
        share = 1 / (1 + rank).log2()
        if cut < n:
            share = share * soft_topk_mask(x, cut, epsilon=epsilon, mask=mask)
    some = ideal != 0
    loss = 1 - (gain * share).sum(-1) / torch.where(some, ideal, 1)
    loss = lists.where_defined(some, loss, x)
    if seen(gain < 0) is None:
        loss = loss.masked_fill((gain < 0).any(-1), torch.nan)
    return lists.reduce(loss, reduction, dtype)


def average_precision_loss(
    scores: Tensor,
    relevance: Tensor,
    *,
    mask: Tensor | None = None,
    epsilon: Epsilon = None,
    method: str = "transport",
    reduction: str = "mean",
) -> Tensor:
    r"""One minus the average precision of each list.

    The precision at a relevant entry is its rank among the relevant entries over its rank among all, both descending
    and soft, and AP is the mean of that over the relevant entries. The two soft ranks share one unit: scores are
    standardised once, over all valid entries. With ``method="sigmoid"`` this is the smooth AP of Qin et al. and of
    Brown et al., pair by pair, and lies in [0, 1]; the other methods smooth the two ranks apart, and a precision may
    exceed 1.

    At ``epsilon=0`` the loss is ``1 - sklearn.metrics.average_precision_score``: equal scores are taken together, the
    precision being that at the end of their group. (Soft ranks tend to the middle of the group instead.) A list without
    a relevant entry has nothing to rank: its loss is 0.

    Args:
        scores: (\*batch, n), any real floating dtype. Half precision is computed in float32.
        relevance: bool, broadcasts to scores, True = relevant.
        mask: bool, broadcasts to scores, True = takes part.
        epsilon: smoothing of ``soft_rank``, in the method's units. None is its default for the method.
        method: any method of ``soft_rank``.
        reduction: "mean" over all lists (mean average precision), "sum", or "none" for (\*batch).

    Returns:
        A scalar, or (\*batch) with ``reduction="none"``, in the dtype of scores. NaN in a list makes that list's loss
        NaN, and no other.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range.

    Reference:
        Qin, Liu, Li: A general approximation framework for direct optimization of information retrieval measures,
        Information Retrieval, 2010, section 4. Brown, Xie, Kalogeiton, Zisserman: Smooth-AP: Smoothing the Path
        Towards Large-Scale Image Retrieval, ECCV 2020.

    Example:
        >>> import torch, couplings as cp
        >>> scores, relevant = torch.tensor([0.3, 2.0, 1.0]), torch.tensor([True, True, False])
        >>> round(cp.losses.average_precision_loss(scores, relevant, epsilon=0).item(), 4)
        0.1667
    """
    lists.check_lists("scores", scores)
    lists.check_options("scores", scores, mask, epsilon, reduction, RANK_METHODS, method)
    relevance = lists.check_flags("relevance", relevance, scores, "scores")

    dtype = scores.dtype
    x, mask = lists.working(scores, mask)
    if mask is not None:
        relevance = relevance & mask
    if lists.is_exact(epsilon):
        place = places(x, mask, descending=True)
        found = relevance.gather(-1, place.order).cumsum(-1).gather(-1, place.last)
        precision = place.to_entries(found.to(x.dtype) / (place.last + 1))
    else:
        mean, std = mean_std(x, None, mask)
        z = (x - mean) / std

        def rank(among: Tensor | None) -> Tensor:
            return soft_rank(
                z, descending=True, epsilon=epsilon, method=method, mask=among, standardize=False
            )

        precision = rank(relevance) / torch.where(relevance, rank(mask), 1)
    count = relevance.sum(-1)
    loss = 1 - torch.where(relevance, precision, 0).sum(-1) / count.clamp_min(1)
    return lists.reduce(lists.where_defined(count > 0, loss, x), reduction, dtype)


def recall_at_k_loss(
    scores: Tensor,
    relevance: Tensor,
    k: int | Sequence[int],
    *,
    mask: Tensor | None = None,
    epsilon: Epsilon = None,
    method: str = "transport",
    reduction: str = "mean",
) -> Tensor:
    r"""One minus the recall at k: the part of the relevant entries that the k highest scores miss.

    The soft top k is ``soft_topk_mask(scores, k)``, whose values at the relevant entries are added up and divided by
    their number. A list with more than k relevant entries cannot reach 0. At ``epsilon=0`` the loss is exact, equal
    scores at the cut being taken first index first. A list without a relevant entry has nothing to find: its loss is 0.

    Args:
        scores: (\*batch, n), any real floating dtype. Half precision is computed in float32.
        relevance: bool, broadcasts to scores, True = relevant.
        k: an int in [1, n]; or several, over which the loss is averaged. In a list with fewer than k valid entries, all
            are found.
        mask: bool, broadcasts to scores, True = takes part.
        epsilon: smoothing of ``soft_topk_mask``, in standard deviations of the list. None: its default.
        method: any deterministic method of ``soft_topk_mask``.
        reduction: "mean" over all lists, "sum", or "none" for (\*batch).

    Returns:
        A scalar, or (\*batch) with ``reduction="none"``, in [0, 1] and in the dtype of scores. NaN in a list makes that
        list's loss NaN, and no other.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range.

    Reference:
        Averaged over several k: Patel, Tolias, Matas: Recall@k Surrogate Loss with Large Batches and Similarity Mixup,
        CVPR 2022. Soft top k: Xie et al.: Differentiable Top-k with Optimal Transport, NeurIPS 2020.

    Example:
        >>> import torch, couplings as cp
        >>> scores, relevant = torch.tensor([0.3, 2.0, 1.0]), torch.tensor([True, True, False])
        >>> cp.losses.recall_at_k_loss(scores, relevant, 1, epsilon=0)
        tensor(0.5000)
        >>> cp.losses.recall_at_k_loss(scores, relevant, [1, 3], epsilon=0)
        tensor(0.2500)
    """
    lists.check_lists("scores", scores)
    lists.check_options("scores", scores, mask, epsilon, reduction, MASK_METHODS, method)
    relevance = lists.check_flags("relevance", relevance, scores, "scores")
    several = list(k) if isinstance(k, Sequence) and not isinstance(k, str) else [k]
    if not several:
        _checks.reject("k", "at least one number", "an empty list", "Pass how many entries are looked at.")
    for one in several:
        lists.check_count("k", one, scores.shape[-1], "how many entries are looked at")

    dtype = scores.dtype
    x, mask = lists.working(scores, mask)
    if mask is not None:
        relevance = relevance & mask
    count = relevance.sum(-1)
    found = x.new_zeros(count.shape)
    for one in several:
        chosen = soft_topk_mask(x, one, epsilon=epsilon, method=method, mask=mask)
        found = found + torch.where(relevance, chosen, 0).sum(-1)
    loss = 1 - found / (len(several) * count.clamp_min(1))
    return lists.reduce(lists.where_defined(count > 0, loss, x), reduction, dtype)
