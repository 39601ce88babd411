"""The soft 0/1 and top-k classification losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from couplings import _checks
from couplings._rowwise import seen
from couplings.losses.ranking import lists
from couplings.losses.ranking.lists import RANK_METHODS, Epsilon
from couplings.ordering import soft_rank


def topk_loss(
    scores: Tensor,
    labels: Tensor,
    k: int = 1,
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
    mask: Tensor | None = None,
    epsilon: Epsilon = None,
    method: str = "transport",
    reduction: str = "mean",
) -> Tensor:
    r"""How far the true class is from the k best ones: J_k(L - R_l), with R_l the soft rank of the label's score.

    Ranks are ascending, 1..L over the L classes (the c valid ones, where some are masked), so L - R_l counts the
    classes that score higher than the true one. By default J_k(u) = max(0, u - k + 1): the loss is 0 where fewer than k
    classes score higher, and k = 1 is the soft 0/1 loss. With ``transform=lambda u: (u >= k).to(u.dtype)`` and
    ``epsilon=0`` it is the top-k error.

    With several labels, the loss is the mean over the true ones of J_k(L - R_l). They count as competitors of each
    other, so that m of them reach at best the mean of J_k(0), .., J_k(m - 1). A list without a label has loss 0.

    Args:
        scores: (\*batch, L) class scores, any real floating dtype. Half precision is computed in float32.
        labels: (\*batch), the class of each list, integer; or (\*batch, L), bool or 0 and 1, for several.
        k: an int in [1, L].
        transform: the function J_k, from u = L - R of the true classes, in [0, L), to a tensor of the same shape;
            replaces the default and k.
        mask: bool, broadcasts to scores, True = takes part. The true classes must.
        epsilon: smoothing of ``soft_rank``. None is its default for the method; 0 is the exact loss (equal scores: the
            class of lower index has the lower rank), with zero gradient.
        method: any method of ``soft_rank``.
        reduction: "mean" over all lists, "sum", or "none" for (\*batch).

    Returns:
        A scalar, or (\*batch) with ``reduction="none"``, in the dtype of scores. NaN in a list makes that list's loss
        NaN, and no other.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range; on an eager CPU also labels out of range or
            masked. Elsewhere those give NaN.

    Reference:
        Cuturi, Teboul, Vert: Differentiable Ranking and Sorting using Optimal Transport, NeurIPS 2019, section 4.

    Example:
        >>> import torch, couplings as cp
        >>> scores = torch.tensor([[0.1, 2.0, 1.0, -1.0], [0.1, 2.0, 1.0, -1.0]])
        >>> cp.losses.topk_loss(scores, torch.tensor([1, 0]), epsilon=0, reduction="none")
        tensor([0., 2.])
        >>> cp.losses.topk_loss(scores, torch.tensor([1, 0]), 2, epsilon=0, reduction="none")
        tensor([0., 1.])
    """
    lists.check_lists("scores", scores)
    classes = scores.shape[-1]
    lists.check_count("k", k, classes, "how many classes may be named")
    lists.check_options("scores", scores, mask, epsilon, reduction, RANK_METHODS, method)
    if transform is not None and not callable(transform):
        _checks.reject(
            "transform", "a function", _checks.describe(transform), "Pass J_k, or None.", TypeError
        )
    labels, several = _check_labels(labels, scores)

    dtype = scores.dtype
    x, mask = lists.working(scores, mask)
    if several:
        true, wrong = labels == 1, (labels != 1) & (labels != 0)
        if mask is not None:
            wrong = wrong | (true & ~mask)
    else:
        wrong = (labels < 0) | (labels >= classes)
        labels = labels.long().clamp(0, classes - 1).unsqueeze(-1)
        wrong = wrong.unsqueeze(-1)
        if mask is not None:
            wrong = wrong | ~mask.gather(-1, labels)
    if seen(wrong):
        expected = "0 and 1" if several else f"classes in [0, {classes - 1}]"
        _checks.reject(
            "labels", f"{expected}, all of them valid", "some that are not", "Check the labels and the mask."
        )

    ranks = soft_rank(x, epsilon=epsilon, method=method, mask=mask)
    behind = lists.count_valid(x, mask).unsqueeze(-1) - ranks
    if not several:
        behind = behind.gather(-1, labels).squeeze(-1)
    loss = (behind - (k - 1)).clamp_min(0) if transform is None else transform(behind)
    if getattr(loss, "shape", None) != behind.shape:
        _checks.reject(
            "transform",
            f"a function that keeps the shape {tuple(behind.shape)}",
            _checks.describe(loss),
            "Leave the reduction over lists to reduction=.",
        )
    if several:
        loss = torch.where(true, loss, 0).sum(-1) / true.sum(-1).clamp_min(1)
    loss = loss.to(x.dtype) + lists.no_gradient(x)
    if seen(wrong) is None:
        loss = loss.masked_fill(wrong.any(-1), torch.nan)
    return lists.reduce(loss, reduction, dtype)


def _check_labels(labels: object, scores: Tensor) -> tuple[Tensor, bool]:
    """The labels in the shape (*batch), or (*batch, L) for several; and whether there are several."""
    if not isinstance(labels, Tensor) or labels.is_complex():
        _checks.reject(
            "labels", "an integer tensor", _checks.describe(labels), "Pass the class numbers.", TypeError
        )
    _checks.same_device("labels", labels, scores, "scores")
    if labels.dim() == scores.dim():
        _checks.broadcastable("labels", labels, scores.shape, "one flag per class")
        return labels.expand(scores.shape), True
    if labels.is_floating_point() or labels.dtype == torch.bool:
        _checks.reject(
            "labels",
            f"integers of shape {tuple(scores.shape[:-1])}, or flags of shape {tuple(scores.shape)}",
            _checks.describe(labels),
            "Pass the class numbers, or one flag for each class.",
            TypeError,
        )
    _checks.broadcastable("labels", labels, scores.shape[:-1], "one class per list")
    return labels.expand(scores.shape[:-1]), False
