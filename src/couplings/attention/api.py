"""``topk_attention``: checks, scores, weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import dropout

from couplings import _checks
from couplings.selection import soft_topk_mask


def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: int | float | Tensor,
    *,
    epsilon: float | Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    method: str = "transport",
    hard: bool = False,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Scaled dot-product attention in which each query attends to its ``topk`` best sources, softly.

    The weights are ``softmax(scores + log A)`` with ``A = soft_topk_mask(scores, topk)``, that is ``A_j exp(scores_j)``
    divided by its sum over j: computed so, no logarithm of a mask that underflows is needed. With topk = S they are
    those of ordinary attention.

    Args:
        q: (\*batch, L, d) queries, any real floating dtype; batch holds the heads, too.
        k: (\*batch, S, d) keys. The batches of q, k and v broadcast.
        v: (\*batch, S, e) values.
        topk: how many sources, a number >= 0 or a tensor that broadcasts to (\*batch, L), such as one per head
            (H, 1). More than S, or more than a query may see, is all of them.
        epsilon: of ``soft_topk_mask``, on scores standardised over what the query may see. None is its default; 0
            selects exactly, with the gradient of attention to the selected.
        mask: bool, broadcasts to (\*batch, L, S), True = may be attended to. A query that may attend to nothing
            gives 0.
        causal: query i may attend to source j only if j <= i + S - L.
        bias: float, broadcasts to (\*batch, L, S), added to the scores before selection; -inf masks.
        scale: factor of q k'; None is 1 / sqrt(d).
        dropout_p: probability of dropping a weight, in [0, 1).
        method: of ``soft_topk_mask``.
        hard: exactly topk sources are used in the forward pass, with the soft gradient. Without a gradient to
            record, and with one int topk, only their values are read.
        return_weights: also return the weights, (\*batch, L, S), before dropout.

    Returns:
        (\*batch, L, e), in the dtype of q; with ``return_weights`` a pair.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range.

    Reference:
        Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, section 6.

    Example:
        >>> import torch, couplings as cp
        >>> q, k, v = torch.eye(3)[:1] * 9, torch.eye(3), torch.tensor([[1.0], [2.0], [3.0]])
        >>> cp.topk_attention(q, k, v, 1, epsilon=0)
        tensor([[1.]])
    """
    batch = _check_metadata(q, k, v, topk, mask, bias, scale, dropout_p)
    length, sources = q.shape[-2], k.shape[-2]
    if mask is not None and mask.dim() > 1 and mask.shape[-1] == sources:
        used = mask.any(-2).unsqueeze(
            -1
        )  # a source that no query may attend to, padding for one, may hold anything
        k, v = torch.where(used, k, 0), torch.where(used, v, 0)
    scores = (q * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)) @ k.mT
    shape = (*batch, length, sources)
    scores = scores.expand(shape) if bias is None else (scores + bias).expand(shape)
    if sources == 0:
        out = q.new_zeros((*batch, length, v.shape[-1]))
        return (out, scores.to(q.dtype)) if return_weights else out
    seen = _visible(scores, mask, causal)
    if not isinstance(topk, Tensor):
        topk = min(topk, sources)
    else:
        topk = topk.clamp(max=sources)
    few = isinstance(topk, int) and hard and not scores.requires_grad and method == "transport"
    if few and not return_weights and dropout_p == 0 and isinstance(topk, int) and topk > 0:
        return _attend_to_few(scores, seen, v, topk, batch).to(q.dtype)
    weights = _weights(scores, seen, topk, epsilon, method, hard)
    dropped = dropout(weights, dropout_p) if dropout_p else weights
    out = (dropped.to(v.dtype) @ v).to(q.dtype)
    return (out, weights) if return_weights else out


def _visible(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    r"""What may be attended to, (\*batch, L, S) bool, or None for everything but scores of -inf."""
    if causal:
        length, sources = scores.shape[-2:]
        lower = torch.ones(length, sources, dtype=torch.bool, device=scores.device).tril(sources - length)
        mask = lower if mask is None else mask & lower
    return mask


def _weights(
    scores: Tensor,
    seen: Tensor | None,
    topk: int | float | Tensor,
    epsilon: float | Tensor | None,
    method: str,
    hard: bool,
) -> Tensor:
    selected = soft_topk_mask(scores, topk, epsilon=epsilon, method=method, mask=seen, hard=hard)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    nothing = (scores.detach() == -torch.inf).all(-1, keepdim=True)
    plain = torch.where(nothing, 0, scores).softmax(-1)
    product = selected * plain
    total = product.sum(-1, keepdim=True)
    empty = nothing | (total.detach() == 0)  # nothing to see, or topk = 0
    return product / torch.where(empty, 1, total)


def _attend_to_few(scores: Tensor, seen: Tensor | None, v: Tensor, topk: int, batch: torch.Size) -> Tensor:
    """Softmax over the topk best, reading only their values."""
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    best, index = scores.topk(topk, -1)
    nothing = best[..., :1] == -torch.inf
    weights = torch.where(nothing, 0, torch.where(nothing, 0, best).softmax(-1))
    width = v.shape[-1]
    values = v.expand(*batch, *v.shape[-2:]).reshape(-1, v.shape[-2], width)
    rows = index.reshape(values.shape[0], -1, 1).expand(-1, -1, width)
    picked = values.gather(1, rows).view(*scores.shape[:-1], topk, width)
    return (weights.unsqueeze(-2).to(v.dtype) @ picked)[..., 0, :]


def _check_metadata(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: int | float | Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    dropout_p: float,
) -> torch.Size:
    for name, value in (("q", q), ("k", k), ("v", v)):
        _checks.real_tensor(name, value)
        if value.dim() < 2:
            _checks.reject(
                name, "shape (*batch, length, d)", _checks.describe(value), "Add the missing dimensions."
            )
    for name, value in (("k", k), ("v", v)):
        _checks.same_dtype(name, value, q, "q")
        _checks.same_device(name, value, q, "q")
    if q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
        _checks.reject("k", f"d = {q.shape[-1]} as q has", _checks.describe(k), "Project them to one width.")
    if k.shape[-2] != v.shape[-2]:
        _checks.reject("v", f"{k.shape[-2]} sources as k has", _checks.describe(v), "One value per key.")
    try:
        batch: torch.Size = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    except RuntimeError:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        _checks.reject("q, k, v", "batch dimensions that broadcast", shapes, "Expand or transpose them.")
    shape = (*batch, q.shape[-2], k.shape[-2])
    if mask is not None:
        _checks.bool_tensor("mask", mask)
        _checks.same_device("mask", mask, q, "q")
        _checks.broadcastable("mask", mask, shape, "(*batch, L, S)")
    if bias is not None:
        _checks.real_tensor("bias", bias)
        _checks.same_device("bias", bias, q, "q")
        _checks.broadcastable("bias", bias, shape, "(*batch, L, S)")
    if not isinstance(topk, Tensor):
        if isinstance(topk, bool) or not isinstance(topk, (int, float)):
            _checks.reject("topk", "a number or a tensor", _checks.describe(topk), "Pass an int.", TypeError)
        if not topk >= 0:
            _checks.reject("topk", "a number >= 0", topk, "Raise it.")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        _checks.reject("scale", "a number or None", _checks.describe(scale), "Pass a float.", TypeError)
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        _checks.reject("dropout_p", "a number in [0, 1)", _checks.describe(dropout_p), "", TypeError)
    if not 0 <= dropout_p < 1:
        _checks.reject("dropout_p", "a number in [0, 1)", dropout_p, "0 switches it off.")
    return batch
