"""What a batch of embeddings looks like, and whether it has collapsed: cheap enough for every step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from couplings._autocast import full_precision
from couplings._checks import HALF, describe, real_tensor, reject, same_device
from couplings.losses.contrastive.prepare import unit
from couplings.losses.contrastive.scores import blocks

SPREAD_TOLERANCE = 1e-3
"""A mean squared distance from the mean direction below this (mean cosine above 0.999) is a collapse to a point."""

RANK_TOLERANCE = 1.05
"""An effective rank below this is a collapse to a line."""

NEIGHBOURS = 10


class EmbeddingDiagnostics(NamedTuple):
    """Figures of a batch of pairs of unit vectors; floats, NaN where an input is not finite.

    Attributes:
        collapsed: whether one side is a point or a line.
        reason: which, and why; empty otherwise.
        rows: how many rows were looked at.
        alignment: mean squared distance between the two of a pair, in [0, 4]; 0 is perfect.
        uniformity1, uniformity2: log of the mean of exp(-2 distance^2) over different rows of x1, of x2; 0 where all
            are equal, about -4 where they are spread over a sphere of many dimensions. Finite for two rows already.
        effective_rank1, effective_rank2: exp of the entropy of the singular values (RankMe), in [1, min(rows, d)].
        spread1, spread2: mean squared distance of the rows from their mean, in [0, 1]; 0 where all are equal.
        diagonal: mean cosine of the pairs.
        off_diagonal: mean cosine of what is no pair.
        margin: mean of (cosine of the pair - highest cosine with another row of x2); positive is good.
        accuracy: share of rows whose counterpart has the highest cosine, ties counted against.
        hubness: skewness of how often a row of x2 is among the ten nearest; above 1 a few rows are near to all.
    """

    collapsed: bool
    reason: str
    rows: int
    alignment: float
    uniformity1: float
    uniformity2: float
    effective_rank1: float
    effective_rank2: float
    spread1: float
    spread2: float
    diagonal: float
    off_diagonal: float
    margin: float
    accuracy: float
    hubness: float


def diagnostics(x1: Tensor, x2: Tensor, *, rows: int | None = None) -> EmbeddingDiagnostics:
    """Alignment, uniformity, effective rank, margins and hubness of pairs of embeddings, and whether they collapsed.

    No contrastive loss can tell: with raw cosines it is log n for "all vectors equal" and for "all equal, x2 = -x1"
    alike, higher than for random vectors by a tenth, and its gradient there is zero. ``collapsed`` is True when all
    rows of one side are equal up to a mean squared distance of 0.001, or lie on one line; a batch that is only narrow,
    or of low rank, is not called collapsed, but its figures say so.

    All is measured on a sample of evenly spaced rows, so that it costs a few percent of the loss in a batch of a
    thousand or more. The figures are Python floats: on an accelerator reading them is one synchronisation.

    Args:
        x1: (n, d), n >= 2, any real floating dtype. Rows are normalised here.
        x2: (n, d).
        rows: size of the sample, at least 2; n or more takes all, in O(n) memory (and O(min(n, d)^3) time for the
            ranks). None: n / 16, but at least 64 and at most 256. An effective rank is at most the size of the sample.

    Returns:
        An ``EmbeddingDiagnostics``. Nothing is differentiated.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, fewer than two rows.

    Reference:
        Wang, Isola: Understanding contrastive representation learning through alignment and uniformity on the
        hypersphere, ICML 2020. Garrido, Balestriero, Najman, LeCun: RankMe, ICML 2023. Radovanovic, Nanopoulos,
        Ivanovic: Hubs in space, JMLR 2010.

    Example:
        >>> import torch
        >>> x = torch.ones(7, 768)
        >>> diagnostics(x, -x).collapsed
        True
        >>> diagnostics(x, -x).reason
        'x1: all rows point the same way (spread 0); x2: all rows point the same way (spread 0)'
        >>> healthy = diagnostics(torch.eye(8), torch.eye(8))
        >>> healthy.collapsed, round(healthy.effective_rank1, 2), healthy.margin
        (False, 8.0, 1.0)
    """
    for name, x in (("x1", x1), ("x2", x2)):
        real_tensor(name, x)
        if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] == 0:
            reject(name, "shape (n, d) with n >= 2 and d >= 1", describe(x), "One row has no neighbours.")
    if x1.shape != x2.shape:
        reject("x2", f"shape {tuple(x1.shape)}, as x1 has", describe(x2), "Row i of x2 is the pair of row i.")
    same_device("x2", x2, x1, "x1")
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int)):
        reject("rows", "an int or None", describe(rows), "None follows from n.", TypeError)
    if rows is not None and rows < 2:
        reject("rows", "at least 2", rows, "None follows from n.")
    with torch.no_grad(), full_precision(x1):
        n = x1.shape[0]
        count = min(n, min(256, max(64, n // 16)) if rows is None else rows)
        if count < n:
            chosen = torch.arange(count, device=x1.device) * n // count
            x1, x2 = x1[chosen], x2[chosen]
        return _measure(x1, x2)


def _measure(x1: Tensor, x2: Tensor) -> EmbeddingDiagnostics:
    count, d = x1.shape
    both = torch.stack([x1, x2])
    finite = torch.isfinite(both).all()
    both = unit(both.float() if both.dtype in HALF else both)
    u1, u2 = both
    diagonal = torch.linalg.vecdot(u1, u2)
    distance = (u1 - u2).square().sum(-1)  # not 2 - 2 cosine, which rounds to 1e-7 where it should be 0
    measured = (
        distance.mean(),
        _uniformity(both),
        _effective_rank(both, finite),
        _spread(both),
        diagonal.mean(),
        *_between(u1, u2),
    )
    values = torch.cat([value.double().view(-1) for value in (*measured, finite)]).tolist()
    if not values.pop():
        return EmbeddingDiagnostics(False, "not finite", count, *[math.nan] * len(values))
    reasons = []
    for side, (rank, spread) in enumerate(zip(values[3:5], values[5:7]), start=1):
        if spread <= SPREAD_TOLERANCE:
            reasons.append(f"x{side}: all rows point the same way (spread {spread:.2g})")
        elif d > 1 and rank <= RANK_TOLERANCE:
            reasons.append(f"x{side}: all rows lie on one line (effective rank {rank:.3f})")
    return EmbeddingDiagnostics(bool(reasons), "; ".join(reasons), count, *values)


def _spread(u: Tensor) -> Tensor:
    """Mean squared distance from the mean, (2,) of (2, n, d); exactly 0 for equal rows."""
    from_first = u - u[:, :1]
    return (from_first - from_first.mean(1, keepdim=True)).square().sum(-1).mean(-1)


def _uniformity(u: Tensor) -> Tensor:
    """Log of the mean of exp(-2 |u_i - u_j|^2) over i != j, (2,). The largest term is 1, the least exp(-8)."""
    n = u.shape[1]
    total = u.new_zeros(2, dtype=torch.float64)
    for part in blocks(n, n, u.device):
        kernel = (4 * (u[:, part] @ u.mT - 1)).clamp_(max=0).exp_()
        kernel.diagonal(part.start, -2, -1).fill_(0)
        total += kernel.sum(-1).sum(-1, dtype=torch.float64)
    return (total / (n * (n - 1))).log()


def _effective_rank(u: Tensor, finite: Tensor) -> Tensor:
    """Exp of the entropy of the singular values, (2,); their squares are eigenvalues of the smaller Gram matrix.

    In float64: a rounding error of 1e-7 in a Gram matrix is one of 3e-4 in every singular value that should be 0.
    """
    u = u.double()
    gram = u @ u.mT if u.shape[1] <= u.shape[2] else u.mT @ u
    gram = torch.where(finite, gram, torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()  # the least may be -1e-16
    total = singular.sum(-1, keepdim=True)
    share = singular / torch.where(total == 0, 1, total)
    rank: Tensor = torch.special.entr(share).sum(-1).exp()
    return rank


def _between(u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean off the diagonal, margin, accuracy, hubness."""
    n = u1.shape[0]
    k = min(NEIGHBOURS, n - 1)
    off, margin, right = (u1.new_zeros((), dtype=torch.float64) for _ in range(3))
    near = u1.new_zeros(n, dtype=torch.float64)
    for part in blocks(n, n, u1.device):
        scores = u1[part] @ u2.mT
        nearest = scores.topk(k, -1).indices.flatten()
        near.scatter_add_(0, nearest, torch.ones_like(nearest, dtype=near.dtype))
        own = scores.diagonal(part.start).clone()
        off += scores.sum(1).sum(dtype=torch.float64) - own.sum()
        scores.diagonal(part.start).fill_(-torch.inf)
        best = scores.amax(1)
        margin += (own - best).sum()
        right += (own > best).sum()
    deviation = near - near.mean()
    variance = deviation.square().mean()
    flat = variance == 0  # all equally often: no skew
    skew = torch.where(flat, 0, deviation.pow(3).mean() / torch.where(flat, 1, variance).pow(1.5))
    return off / (n * (n - 1)), margin / n, right / n, skew
