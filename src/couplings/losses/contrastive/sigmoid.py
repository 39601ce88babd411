"""SigLIP's loss: every pair is a question of its own, answered by a sigmoid."""

from __future__ import annotations

from torch import Tensor

from couplings._autocast import full_precision
from couplings._checks import describe, real_tensor, reject
from couplings.losses.contrastive.engine import Plan
from couplings.losses.contrastive.prepare import (
    Both,
    check_number,
    check_options,
    check_scalar,
    evaluate,
    prepare,
    scale_of,
)
from couplings.losses.contrastive.scores import Similarity


def sigmoid_loss(
    x1: Tensor,
    x2: Tensor | None,
    *,
    temperature: float | Tensor = 0.1,
    bias: float | Tensor = -10.0,
    normalize: bool = True,
    groups: Both = None,
    positives: str = "each",
    mask: Both = None,
    negatives: Tensor | None = None,
    guide: Both = None,
    guide_margin: float = 0.0,
    similarity: Similarity | None = None,
    offset: int = 0,
    reduction: str = "mean",
) -> Tensor:
    """Is this a pair? The binary cross-entropy of every row of x1 with every row of x2 (SigLIP).

    sum_ij -log sigmoid(z_ij (s_ij / temperature + bias)) / n with z = 1 for pairs and -1 for all others.

    Args:
        x1: (n, d).
        x2: (m, d); row i + offset is the counterpart of row i of x1.
        temperature: positive; a float, or a tensor with one element, which gets a gradient. 0.1 and bias -10 are where
            SigLIP starts.
        bias: a float, or a tensor with one element, which gets a gradient.
        groups, positives: as in ``n_pairs_loss``; "each" makes every pair of one group a positive.
        negatives: (k, d) further negatives for all rows.
        guide, guide_margin: a pair is left out where the guide scores it above the own pair of its row or of its
            column, minus ``guide_margin``.
        normalize, mask, similarity, offset: as in ``n_pairs_loss``.
        reduction: "mean" over the rows of the sum over their pairs, "sum", or "none" for (n,).

    Returns:
        A scalar, or (n,) with ``reduction="none"``.

    Raises:
        TypeError, ValueError: as ``n_pairs_loss``.

    Reference:
        Zhai, Mustafa, Kolesnikov, Beyer: Sigmoid loss for language image pre-training, ICCV 2023.

    Example:
        >>> import torch
        >>> x = torch.eye(4)
        >>> round(sigmoid_loss(x, x).item(), 4)  # log 2 + 3 log(1 + e^-10)
        0.6933
    """
    check_options(reduction, positives, ("each", "own"))
    margin = check_number("guide_margin", guide_margin)
    real_tensor("x1", x1)
    if isinstance(bias, Tensor):
        check_scalar("bias", bias, x1)
    else:
        check_number("bias", bias)
    if isinstance(negatives, Tensor) and isinstance(x2, Tensor) and negatives.ndim != x2.ndim:
        reject("negatives", "shape (k, d), shared by all rows", describe(negatives), "Flatten them.")
    with full_precision(x1):
        batch = prepare(
            x1,
            x2,
            normalize=normalize,
            groups=groups,
            mask=mask,
            guide=guide,
            negatives=negatives,
            similarity=similarity,
            offset=offset,
        )
        plan = Plan("sigmoid", positives, margin, similarity=similarity)
        every = batch.valid()[0].to(batch.x1.dtype)
        mine = every if batch.pairs.row_ids is not None else batch.positives("own")[0].to(every.dtype)
        return evaluate(
            batch,
            plan,
            scale_of(temperature, batch),
            reduction,
            shift=batch.scalar(bias),
            shares=(mine, every, every.new_zeros(())),
        )
