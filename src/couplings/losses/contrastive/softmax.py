"""Losses that pick the counterpart out of all candidates by a softmax: N-pairs, InfoNCE, CLIP, NT-Xent."""

from __future__ import annotations

import torch
from torch import Tensor

from couplings._autocast import full_precision
from couplings._checks import describe, real_tensor, reject, same_device, same_dtype
from couplings.losses.contrastive.engine import Plan
from couplings.losses.contrastive.prepare import (
    Batch,
    Both,
    check_number,
    check_options,
    evaluate,
    prepare,
    scale_of,
    unit,
)
from couplings.losses.contrastive.scores import Similarity


def n_pairs_loss(
    x1: Tensor,
    x2: Tensor | None,
    *,
    temperature: float | Tensor,
    symmetric: bool = True,
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
    """The N-pairs loss in its corrected form: with a temperature, on unit vectors, in both directions.

    log(1 + sum_j exp((s_ij - s_ii) / temperature)), averaged over rows and (``symmetric``) over columns. On raw cosines
    (temperature 1) it lies between two narrow bounds, whatever the embeddings are: the temperature is no option.

    At collapse (all rows equal) its value is log n and its gradient is exactly zero, as for every loss of this kind:
    watch ``couplings.diagnostics`` and add ``collapse_guard``.

    Args:
        x1: (n, d) anchors, any real floating dtype; half precision is computed in float32. With ``similarity``
            (n, ...).
        x2: (m, d), m >= n: row i + offset is the counterpart of row i of x1, all others are negatives. None: x1 is the
            (n, m) matrix of scores itself (then ``normalize=False``).
        temperature: positive; a float, or a tensor with one element, which gets a gradient.
        symmetric: average with the loss of the columns (those that have a counterpart).
        normalize: divide rows by their length (last dimension). A row of zeros stays zero, with gradient zero.
        groups: (n,) integer ids, or (ids of x1, ids of x2). Equal ids are never negatives of each other.
        positives: what equal ids are. "each": every one is a positive, set against the negatives only, and the mean
            is taken. "mean": the same with all positives in the denominator (SupCon's L_out). "own": only the
            counterpart is, and the rest of the group plays no part (duplicates in a batch).
        mask: (n,) bool, or (of x1, of x2), True = takes part. What is masked gets gradient zero.
        negatives: further negatives: (k, d) for all rows, or (n, k, d), k for each row.
        guide: scores of another model: (n, m), or its embeddings of both sides (n, e), (m, e), compared by cosine. A
            pair that it scores above the own pair's score minus ``guide_margin`` is no negative (GISTEmbed).
        guide_margin: see there.
        similarity: a function (rows of x1, x2) -> (rows, m) to take the scores from, e.g. MaxSim; its inputs are
            blocks of rows, and it may hold no parameters of its own. Under ``torch.compile`` it gets all rows at once.
        offset: where the counterparts begin in x2.
        reduction: "mean" over all rows (and columns) with a positive, "sum", or "none" for one value per row.

    Returns:
        A scalar, or (n,) with ``reduction="none"``, in the dtype of x1.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, a temperature that is not positive, an unknown name.

    Reference:
        Sohn: Improved deep metric learning with multi-class N-pair loss objective, NeurIPS 2016.

    Example:
        >>> import torch
        >>> x = torch.eye(4)
        >>> round(n_pairs_loss(x, x, temperature=1.0).item(), 4)  # log(1 + 3 / e)
        0.7437
        >>> round(n_pairs_loss(x, x, temperature=0.05).item(), 4)
        0.0
    """
    return _softmax_loss(
        x1,
        x2,
        temperature,
        symmetric,
        normalize,
        groups,
        positives,
        mask,
        negatives,
        guide,
        guide_margin,
        similarity,
        offset,
        reduction,
    )


def info_nce_loss(
    x1: Tensor,
    x2: Tensor | None,
    *,
    temperature: float | Tensor = 0.07,
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
    """InfoNCE in one direction: each row of x1 picks its counterpart among the rows of x2.

    Args:
        x1: (n, d) queries.
        x2: (m, d) candidates; row i + offset is the counterpart of query i.
        temperature: positive; a float, or a tensor with one element, which gets a gradient.
        normalize, groups, positives, mask, negatives, guide, guide_margin, similarity, offset, reduction: as in
            ``n_pairs_loss``.

    Returns:
        A scalar, or (n,) with ``reduction="none"``.

    Raises:
        TypeError, ValueError: as ``n_pairs_loss``.

    Reference:
        van den Oord, Li, Vinyals: Representation learning with contrastive predictive coding, 2018.

    Example:
        >>> import torch
        >>> query, key = torch.eye(3), torch.eye(3)
        >>> hard = torch.tensor([[1.0, 1.0, 0.0]])
        >>> info_nce_loss(query, key, temperature=0.5, negatives=hard, reduction="none").round(decimals=2)
        tensor([0.6000, 0.6000, 0.3400])
    """
    return _softmax_loss(
        x1,
        x2,
        temperature,
        False,
        normalize,
        groups,
        positives,
        mask,
        negatives,
        guide,
        guide_margin,
        similarity,
        offset,
        reduction,
    )


def clip_loss(
    x1: Tensor,
    x2: Tensor | None,
    *,
    temperature: float | Tensor = 0.07,
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
    """CLIP's loss: InfoNCE from x1 to x2 and from x2 to x1, averaged, from one matrix of scores.

    The matrix is never stored: blocks of rows, each one matrix product in the forward pass and three in the backward.

    Args:
        x1: (n, d), for instance images.
        x2: (m, d), for instance texts; row i + offset is the counterpart of row i of x1. Rows without a counterpart
            are negatives of the rows of x1 and have no loss of their own.
        temperature: positive; a float, or a tensor with one element, which gets a gradient (CLIP's logit scale is its
            reciprocal).
        normalize, groups, positives, mask, negatives, guide, guide_margin, similarity, offset, reduction: as in
            ``n_pairs_loss``.

    Returns:
        A scalar, or (n,) with ``reduction="none"``, the mean of both directions for each pair.

    Raises:
        TypeError, ValueError: as ``n_pairs_loss``.

    Reference:
        Radford et al.: Learning transferable visual models from natural language supervision, ICML 2021.

    Example:
        >>> import torch
        >>> images = texts = torch.eye(3)[[0, 1, 1]]
        >>> round(clip_loss(images, texts, temperature=0.5).item(), 4)
        0.5856
        >>> ids = torch.tensor([0, 1, 1])  # the third pair is a duplicate of the second
        >>> round(clip_loss(images, texts, temperature=0.5, groups=ids, positives="own").item(), 4)
        0.1645
    """
    return _softmax_loss(
        x1,
        x2,
        temperature,
        True,
        normalize,
        groups,
        positives,
        mask,
        negatives,
        guide,
        guide_margin,
        similarity,
        offset,
        reduction,
    )


def nt_xent_loss(
    x1: Tensor,
    x2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    normalize: bool = True,
    groups: Tensor | None = None,
    positives: str = "each",
    mask: Tensor | None = None,
    negatives: Tensor | None = None,
    similarity: Similarity | None = None,
    reduction: str = "mean",
) -> Tensor:
    """NT-Xent (SimCLR): all 2n views of n items, each picking its other view among the 2n - 1 others.

    Args:
        x1: (n, d) first views.
        x2: (n, d) second views.
        temperature: positive; a float, or a tensor with one element, which gets a gradient.
        groups: (n,) integer ids of the items; both views have their item's id.
        mask: (n,) bool, True = takes part.
        negatives: (k, d), further negatives for all views.
        normalize, positives, similarity, reduction: as in ``n_pairs_loss``; ``similarity`` compares views with views.

    Returns:
        A scalar, or (2n,) with ``reduction="none"``: first views, then second views.

    Raises:
        TypeError, ValueError: as ``n_pairs_loss``.

    Reference:
        Chen, Kornblith, Norouzi, Hinton: A simple framework for contrastive learning of visual representations, ICML
        2020.

    Example:
        >>> import torch
        >>> views = torch.eye(4)
        >>> round(nt_xent_loss(views, views).item(), 4)  # log(1 + 6 / e^2)
        0.5944
    """
    check_options(reduction, positives)
    for name, x in (("x1", x1), ("x2", x2)):
        real_tensor(name, x)
    if x1.shape != x2.shape:
        reject("x2", f"shape {tuple(x1.shape)}, as x1 has", describe(x2), "Pass two views of each item.")
    same_dtype("x2", x2, x1, "x1")
    same_device("x2", x2, x1, "x1")
    n = x1.shape[0]
    for name, given in (("groups", groups), ("mask", mask)):
        if given is not None and getattr(given, "shape", None) != (n,):
            reject(name, f"a tensor of shape ({n},), one for each item", describe(given), "")
    with full_precision(x1):
        views = torch.cat((x1, x2))
        batch = prepare(
            views,
            views,
            normalize=normalize,
            groups=None if groups is None else torch.cat((groups, groups)),
            mask=None if mask is None else torch.cat((mask, mask)),
            negatives=negatives,
            similarity=similarity,
        )
        itself = batch.pairs.own
        if itself is None:
            raise RuntimeError("prepare always sets the counterparts")
        ids = torch.arange(n, device=x1.device)
        batch.pairs = batch.pairs._replace(own=torch.cat((ids + n, ids)), itself=itself)
        plan = Plan("softmax", positives=positives, similarity=similarity)
        return evaluate(batch, plan, scale_of(temperature, batch), reduction)


def _softmax_loss(
    x1: Tensor,
    x2: Tensor | None,
    temperature: float | Tensor,
    columns: bool,
    normalize: bool,
    groups: Both,
    positives: str,
    mask: Both,
    negatives: Tensor | None,
    guide: Both,
    guide_margin: float,
    similarity: Similarity | None,
    offset: int,
    reduction: str,
) -> Tensor:
    check_options(reduction, positives)
    margin = check_number("guide_margin", guide_margin)
    each = negatives if isinstance(negatives, Tensor) and negatives.ndim == 3 and similarity is None else None
    real_tensor("x1", x1)
    with full_precision(x1):
        batch = prepare(
            x1,
            x2,
            normalize=normalize,
            groups=groups,
            mask=mask,
            guide=guide,
            negatives=negatives if each is None else None,
            similarity=similarity,
            offset=offset,
        )
        scale = scale_of(temperature, batch)
        extra = None if each is None else _own_negatives(each, x1, batch, scale, normalize)
        plan = Plan("softmax", positives, margin, columns, similarity)
        return evaluate(batch, plan, scale, reduction, extra=extra)


def _own_negatives(negatives: Tensor, x1: Tensor, batch: Batch, scale: Tensor, normalize: bool) -> Tensor:
    """Log-sum-exp over each row's own negatives, (n,)."""
    real_tensor("negatives", negatives)
    same_dtype("negatives", negatives, x1, "x1")
    same_device("negatives", negatives, x1, "x1")
    if batch.x2 is None or negatives.shape[0] != x1.shape[0] or negatives.shape[2] != x1.shape[1]:
        reject(
            "negatives",
            f"shape ({x1.shape[0]}, k, d), k negatives for each row of x1, which is (n, d)",
            describe(negatives),
            "Negatives that all rows share have shape (k, d).",
        )
    if negatives.shape[1] == 0:
        reject("negatives", "at least one for each row", describe(negatives), "Pass None.")
    others = negatives.to(batch.x1.dtype)
    if normalize:
        others = unit(others)
    logits = torch.linalg.vecdot(others, batch.x1.unsqueeze(1)) * scale
    sums = torch.logsumexp(logits, 1)
    valid = batch.pairs.row_valid
    return sums if valid is None else torch.where(valid, sums, -torch.inf)
