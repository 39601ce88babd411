"""The k-nearest-neighbour classifier as a loss, and the plain classifier it is trained for."""

from __future__ import annotations

import torch
from torch import Tensor

from couplings._checks import (
    HALF,
    bool_tensor,
    broadcastable,
    describe,
    real_tensor,
    reject,
    same_device,
    same_dtype,
)
from couplings.selection import soft_topk_mask


def knn_loss(
    queries: Tensor,
    templates: Tensor,
    query_labels: Tensor,
    template_labels: Tensor,
    k: int,
    *,
    epsilon: float | None = None,
    method: str = "transport",
    mask: Tensor | None = None,
    exclude_self: bool = False,
    standardize: bool = True,
    hard: bool = False,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Minus the soft number of same-label templates among the k nearest ones to each query.

    The Euclidean distances (not squared) from a query to all templates go through
    ``soft_topk_mask(..., largest=False)``; the weights of the templates that share the query's label are added up.
    The loss therefore lies between ``-k`` (all neighbours agree) and 0.

    A query and a template at the same place have distance 0, where the distance has a kink. The gradient taken there
    is 0, the middle of the subdifferential, in every order; it is chosen, not produced by a clamp or an added
    constant, so every other distance and gradient is exact. The differences (\*batch, q, t, d) are formed explicitly:
    near-duplicates do not cancel, and memory is O(q t d).

    Args:
        queries: (\*batch, q, d) features, any real floating dtype. Half precision is computed in float32.
        templates: (t, d), or (\*batch, t, d) with batch dimensions that broadcast against those of ``queries``.
        query_labels: (\*batch, q), or any shape that broadcasts to it, integer (or bool).
        template_labels: (t,) or (\*batch, t), integer (or bool).
        k: how many neighbours, 1 <= k <= t.
        epsilon: smoothing of the selection, in standard deviations of a query's distances; None is the documented
            default of ``soft_topk_mask`` for the method.
        method: any method of ``soft_topk_mask``.
        mask: bool, broadcasts to (\*batch, q, t); True = this template may be a neighbour of this query. Where queries
            and templates are drawn from one training set, ``query_index[:, None] != template_index`` keeps a query
            from finding itself. A query with fewer than k templates left selects all of them.
        exclude_self: the queries *are* the templates (q == t, same order): template i is no neighbour of query i.
        standardize: as in ``soft_topk_mask``.
        hard: count the exact k nearest in the forward pass, with the soft gradient.
        generator: source of the noise, for ``method="gumbel"``.
        reduction: "mean" over all queries (the default), "sum", or "none" for (\*batch, q).

    Returns:
        A scalar, or (\*batch, q) with ``reduction="none"``, in the dtype of ``queries``.

    Raises:
        TypeError: features that are not floating point or differ in dtype, labels or k that are not integers.
        ValueError: shapes that do not fit, k out of range, an unknown reduction, tensors on different devices.

    Reference:
        Xie, Dai, Chen, Dai, Zhao, Zha, Wei, Pfister: Differentiable Top-k with Optimal Transport, NeurIPS 2020,
        section 4.

    Example:
        >>> import torch, couplings as cp
        >>> templates = torch.tensor([[0.0, 0.0], [0.0, 1.0], [5.0, 5.0], [5.0, 6.0]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> query, label = torch.tensor([[0.1, 0.2]]), torch.tensor([0])
        >>> round(cp.losses.knn_loss(query, templates, label, labels, k=2, epsilon=0).item(), 3)
        -2.0
        >>> cp.losses.knn_loss(templates, templates, labels, labels, k=1, epsilon=0, exclude_self=True).item()
        -1.0
    """
    _check_features("queries", queries, "templates", templates)
    *_, count, _ = queries.shape
    total = templates.shape[-2]
    _check_k("k", k, total, "templates")
    try:
        batch = torch.broadcast_shapes(queries.shape[:-2], templates.shape[:-2])
    except RuntimeError:
        batch = None
    if batch is None or batch != queries.shape[:-2]:
        reject(
            "templates",
            f"batch dimensions that broadcast to those of queries, {tuple(queries.shape[:-2])}",
            describe(templates),
            "Pass templates of shape (t, d) to share them between all queries.",
        )
    _check_labels("query_labels", query_labels, (*batch, count), "one label per query", queries)
    _check_labels("template_labels", template_labels, (*batch, total), "one label per template", queries)
    if mask is not None:
        bool_tensor("mask", mask)
        same_device("mask", mask, queries, "queries")
        broadcastable("mask", mask, (*batch, count, total), "one flag per query and template")
    if exclude_self and count != total:
        reject(
            "exclude_self",
            "as many templates as queries, in the same order",
            f"{count} queries and {total} templates",
            "Pass mask=query_index[:, None] != template_index instead.",
        )
    if reduction not in ("mean", "sum", "none"):
        reject("reduction", "one of 'mean', 'sum', 'none'", repr(reduction), "Pick one of these.")

    dtype = torch.float32 if queries.dtype in HALF else queries.dtype
    if exclude_self:
        others = ~torch.eye(count, dtype=torch.bool, device=queries.device)
        mask = others if mask is None else mask & others
    if mask is not None:
        mask = mask.expand(*batch, count, total)
        reached = mask.any(-2)  # a template that is nobody's neighbour may hold anything
        templates = torch.where(reached.unsqueeze(-1), templates, 0)
    weights = soft_topk_mask(
        _distances(queries.to(dtype), templates.to(dtype)),
        k,
        largest=False,
        epsilon=epsilon,
        method=method,
        mask=mask,
        standardize=standardize,
        hard=hard,
        generator=generator,
    )
    agree = query_labels.expand(*batch, count).unsqueeze(-1) == template_labels.unsqueeze(-2)
    loss = -(weights * agree).sum(-1)
    if reduction != "none":
        loss = loss.mean() if reduction == "mean" else loss.sum()
    return loss.to(queries.dtype)


def knn_predict(
    train_features: Tensor, train_labels: Tensor, queries: Tensor, k: int, *, chunk: int = 1024
) -> Tensor:
    """The label that most of the k nearest training points carry: the plain classifier, by exhaustive search.

    Distances are Euclidean, formed from differences (no expanded square, so duplicates are at distance exactly 0).
    Neighbours at equal distance are taken in the order of the training set. Where several labels have equally many
    votes, the one whose nearest neighbour comes first in that order wins; with k=2 that is the nearest neighbour's.

    Args:
        train_features: (n, d), any real floating dtype; half precision is computed in float32.
        train_labels: (n,) integer.
        queries: (q, d), same dtype and device.
        k: how many neighbours, 1 <= k <= n.
        chunk: how many queries are compared at a time; memory is O(chunk * n) whatever q is.

    Returns:
        (q,) predicted labels, in the dtype of ``train_labels``.

    Raises:
        TypeError: features that are not floating point or differ in dtype, labels, k or chunk that are not integers.
        ValueError: shapes that do not fit, k out of range, chunk < 1, tensors on different devices.

    Reference:
        Cover, Hart: Nearest neighbor pattern classification, IEEE Transactions on Information Theory, 1967.

    Example:
        >>> import torch, couplings as cp
        >>> train = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
        >>> cp.losses.knn_predict(train, torch.tensor([3, 3, 7, 7]), torch.tensor([[0.2], [9.0]]), k=3)
        tensor([3, 7])
    """
    _check_features("queries", queries, "train_features", train_features)
    for name, value in (("train_features", train_features), ("queries", queries)):
        if value.ndim != 2:
            reject(name, "two dimensions, (points, features)", describe(value), f"Call {name}.flatten(1).")
    total = train_features.shape[0]
    _check_k("k", k, total, "train_features")
    _check_labels("train_labels", train_labels, (total,), "one label per training point", queries)
    if train_labels.shape != (total,):
        reject(
            "train_labels", f"shape ({total},)", describe(train_labels), "Pass one label per training point."
        )
    if isinstance(chunk, bool) or not isinstance(chunk, int):
        reject("chunk", "an int", describe(chunk), "Pass the number of queries a step.", TypeError)
    if chunk < 1:
        reject("chunk", "at least 1", chunk, "Pass the number of queries a step.")

    with torch.no_grad():
        dtype = torch.float32 if queries.dtype in HALF else queries.dtype
        reference = train_features.to(dtype)
        classes, coded = torch.unique(train_labels, return_inverse=True)
        parts = [
            classes[_vote(coded[_nearest(part.to(dtype), reference, k)], len(classes))]
            for part in queries.split(chunk)
        ]
        return torch.cat(parts) if parts else train_labels.new_empty(0)


def _distances(queries: Tensor, templates: Tensor) -> Tensor:
    """Euclidean distances (*batch, q, t), differentiable to any order, with gradient 0 where two points coincide."""
    squared = (queries.unsqueeze(-2) - templates.unsqueeze(-3)).square().sum(-1)
    coincide = squared == 0
    return torch.where(coincide, 0, torch.where(coincide, 1, squared).sqrt())


def _nearest(queries: Tensor, reference: Tensor, k: int) -> Tensor:
    """Indices (q, k) of the k nearest rows of ``reference``, nearest first, equal distances by index."""
    distance = torch.cdist(queries, reference, compute_mode="donot_use_mm_for_euclid_dist")
    found = distance.topk(k, dim=-1, largest=False)
    index = found.indices.sort(dim=-1).values
    index = index.gather(-1, distance.gather(-1, index).sort(dim=-1, stable=True).indices)
    # topk takes any of several points tied at the k-th place: those rows need the stable order of all points
    tied = (distance <= found.values.amax(-1, keepdim=True)).sum(-1) != k
    if bool(tied.any()):
        index[tied] = distance[tied].sort(dim=-1, stable=True).indices[:, :k]
    return index


def _vote(labels: Tensor, classes: int) -> Tensor:
    """Majority of each row of (q, k) class codes; equal counts go to the class that comes first in the row."""
    votes = torch.nn.functional.one_hot(labels, classes)
    count = votes.sum(-2)
    best = count == count.amax(-1, keepdim=True)
    winning = best.gather(-1, labels).to(torch.uint8)
    return labels.gather(-1, winning.argmax(-1, keepdim=True)).squeeze(-1)


def _check_features(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    for name, value in ((first_name, first), (second_name, second)):
        real_tensor(name, value)
        if value.ndim < 2:
            reject(
                name, "at least two dimensions, (..., points, features)", describe(value), f"Reshape {name}."
            )
    same_dtype(second_name, second, first, first_name)
    same_device(second_name, second, first, first_name)
    if first.shape[-1] != second.shape[-1]:
        reject(
            second_name,
            f"{first.shape[-1]} features per point, as {first_name} has",
            describe(second),
            "Compute both with the same network.",
        )


def _check_k(name: str, k: object, available: int, of: str) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        reject(name, "an int", describe(k), "Pass the number of neighbours.", TypeError)
    if not 1 <= k <= available:
        reject(
            name, f"between 1 and {available}, the number of {of}", k, "Pass fewer neighbours or more points."
        )


def _check_labels(name: str, labels: object, shape: tuple[int, ...], meaning: str, reference: Tensor) -> None:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        remedy = f"Call {name}.long()." if isinstance(labels, Tensor) else "Pass a tensor of class numbers."
        reject(name, "an integer tensor", describe(labels), remedy, TypeError)
    same_device(name, labels, reference, "queries")
    broadcastable(name, labels, shape, meaning)
