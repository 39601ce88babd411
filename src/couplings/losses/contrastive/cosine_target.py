"""Squares to a target: the diagonal of the similarity matrix to 1, the rest to what unit vectors can reach."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from couplings._autocast import full_precision
from couplings._checks import real_tensor, reject
from couplings.losses.contrastive.engine import Plan
from couplings.losses.contrastive.prepare import Both, check_number, check_options, evaluate, prepare
from couplings.losses.contrastive.scores import Similarity


def cosine_target_loss(
    x1: Tensor,
    x2: Tensor | None,
    *,
    target: float | None = None,
    balance: float = 0.5,
    normalize: bool = True,
    groups: Both = None,
    positives: str = "each",
    mask: Both = None,
    similarity: Similarity | None = None,
    offset: int = 0,
    reduction: str = "mean",
) -> Tensor:
    """Mean squared distance of the similarity matrix from its ideal: 1 for pairs, ``target`` for all others.

    balance * mean over pairs of (s - 1)^2 + (1 - balance) * mean over the others of (s - target)^2, less its floor.
    n unit vectors have a mean cosine of at least -1/(n-1) with each other, and the simplex attains it: that is the
    default target. A lower one, down to -1, cannot be reached; what then remains at the best place (which gives up some
    of the diagonal, README.md) is subtracted, so that 0 is always the best value.

    Args:
        x1: (n, d).
        x2: (m, d); row i + offset is the counterpart of row i of x1.
        target: in [-1, 1], where the others should be; None is -1 / (n - 1), n the number of rows that take part.
        balance: share of the pairs in the loss, in (0, 1). Without it, n pairs would drown in n (n - 1) others.
        groups, positives: as in ``n_pairs_loss``; "each" gives every pair of one group the target 1. No floor is
            subtracted where there are groups.
        normalize, mask, similarity, offset: as in ``n_pairs_loss``. Without ``normalize`` scores are no cosines, and no
            floor is subtracted.
        reduction: "mean", "sum" (n times the mean over n rows) or "none" for (n,).

    Returns:
        A scalar, or (n,) with ``reduction="none"``, whose mean is the loss.

    Raises:
        TypeError, ValueError: as ``n_pairs_loss``; also a target or a balance out of range.

    Example:
        >>> import torch
        >>> simplex = torch.eye(4) - 0.25
        >>> abs(round(cosine_target_loss(simplex, simplex).item(), 4))
        0.0
        >>> round(cosine_target_loss(torch.eye(4), torch.eye(4)).item(), 4)  # half of (1/3)^2
        0.0556
    """
    check_options(reduction, positives, ("each", "own"))
    real_tensor("x1", x1)
    if target is not None and not -1 <= check_number("target", target) <= 1:
        reject("target", "a number in [-1, 1]", target, "None is the lowest that can be reached.")
    if not 0 < check_number("balance", balance) < 1:
        reject("balance", "a number between 0 and 1", balance, "0.5 weighs pairs and others alike.")
    with full_precision(x1):
        batch = prepare(
            x1,
            x2,
            normalize=normalize,
            groups=groups,
            mask=mask,
            similarity=similarity,
            offset=offset,
        )
        n, m = batch.shape
        valid, there = batch.valid()
        up = batch.positives(positives)[0]
        same = batch.positives("each")[0]  # with or without being positives, they are no negatives
        down = valid * (there.sum() - same)
        count = there.sum().to(batch.x1.dtype)
        aim = -1 / (count - 1).clamp(min=1) if target is None else batch.scalar(target)
        # each row's share of a mean over all pairs, times the number of rows: evaluate takes the mean over rows
        rows = valid.sum()
        mine, others = (
            (valid * (weight * rows.double() / number.sum().clamp(min=1))).to(count.dtype)
            for weight, number in ((balance, up), (1 - balance, down))
        )
        plan = Plan("square", positives, similarity=similarity)
        wide = replace(batch, dtype=count.dtype)
        loss = evaluate(wide, plan, batch.scalar(1.0), reduction, shares=(mine, others, aim))
        if target is not None and groups is None and n == m and normalize and similarity is None:
            least = floor(aim, count, balance)
            loss = loss - (least * rows if reduction == "sum" else least)
        return loss.to(batch.dtype)


def floor(target: Tensor, count: Tensor, balance: float) -> Tensor:
    """The least value of the loss over unit vectors; 0 where the target can be reached. README.md derives it."""
    missed = (-2 - 2 * (count - 1) * target).clamp(min=0)
    size = (count - 2).square() / balance + 4 * (count - 1).square() / (1 - balance)
    return missed.square() / size
