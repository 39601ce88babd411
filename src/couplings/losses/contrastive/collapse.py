"""A term that parts embeddings where all rows are equal, in all directions, which no other loss of this folder does."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from couplings._autocast import full_precision
from couplings._checks import HALF, describe, real_tensor, reject
from couplings.losses.contrastive.prepare import check_number, unit

NOISE = 32
"""Spreads up to this many roundings are rounding: equal rows that took different paths through a matrix product."""

DIRECTIONS = 64
"""The spread is measured in so many directions at most; singular values of more would cost as much as the loss."""


def collapse_guard(
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    threshold: float = 0.25,
    normalize: bool = True,
    seed: int = 0,
) -> Tensor:
    """Hinge on the spread of the rows in all directions, max(0, 1 - spread / threshold), with a gradient at collapse.

    The spread is the sum of the singular values of the rows less their mean, divided by sqrt(n min(n - 1, d)): the root
    mean square distance from the mean, times the root of the share of the directions that are in use. Of unit vectors
    it is between 0 (all equal) and 1 (a simplex). Most healthy batches are above the threshold: there the guard is
    exactly 0 and changes nothing. Every direction is pushed with the same force, so that the rows leave the point in
    all directions, not only in the strongest one, where a loss would have to find the others.

    Losses of differences of scores (cross-entropies, triplets) have no gradient at collapse: add the guard, with a
    weight of about 1. Losses of scores themselves (``sigmoid_loss``, ``cosine_target_loss``) do have one, which moves
    all rows together and trains a network for what they share. There follow the guard alone until it is 0, with a
    weight of about the size of the loss::

        total = torch.where(guard > 0, weight * guard, loss)

    Where all rows are equal, bit for bit, every smooth term that treats rows alike has the same gradient for all of
    them and so cannot part them. The spread is not smooth there: like a norm at 0 it has many subgradients. The one
    taken is a pseudo-random direction of mean 0, fixed by ``seed``; it, and only it, depends on the order of the rows.
    So it is for directions in which there is nothing, as where all rows lie on a line. A pair (row i of x1, row i of
    x2) gets the same direction on both sides, so that pairs part together. A spread within rounding of 0 counts as 0.
    Of more than 64 rows in more than 64 dimensions it is measured in 64 random directions, which ``seed`` fixes, too:
    some tenth less, and only these are pushed.

    Args:
        x1: (n, d), n >= 2, any real floating dtype; half precision is computed in float32.
        x2: (m, d) or None; with it, the result is the mean over both sides.
        threshold: positive; with ``normalize`` less than 1, as no batch of unit vectors spreads more than 1.
        normalize: measure unit vectors (a row of zeros counts as it is). Otherwise the threshold is in units of x.
        seed: of the direction at zero spread, and of the 64 in more dimensions.

    Returns:
        A scalar in [0, 1], in the dtype of x1.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: fewer than two rows, a threshold out of range.

    Example:
        >>> import torch
        >>> x = torch.ones(4, 3, requires_grad=True)
        >>> collapse_guard(x).backward()
        >>> len({tuple(row) for row in x.grad.tolist()})  # each row is sent elsewhere
        4
        >>> collapse_guard(torch.eye(4)).item()
        0.0
    """
    for name, x in (("x1", x1), ("x2", x2)):
        if x is None and name == "x2":
            continue
        real_tensor(name, x)
        if x is not None and (x.ndim != 2 or x.shape[0] < 2 or x.shape[1] < 1):
            reject(name, "shape (n, d) with n >= 2 and d >= 1", describe(x), "One row has no spread.")
    if check_number("threshold", threshold) <= 0 or (normalize and threshold >= 1):
        upper = "a number in (0, 1)" if normalize else "a positive number"
        reject("threshold", upper, threshold, "0.25 is below the spread of most healthy batches.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        reject("seed", "an int", describe(seed), "Any will do.", TypeError)
    with full_precision(x1):
        sides = [x for x in (x1, x2) if x is not None]
        hinges = [(1 - _spread(x, normalize, seed) / threshold).clamp(min=0) for x in sides]
        return torch.stack(hinges).mean().to(x1.dtype)


def _spread(x: Tensor, normalize: bool, seed: int) -> Tensor:
    """Sum of the singular values of the centred rows, divided by what it is at most for unit vectors."""
    x = x.float() if x.dtype in HALF else x
    if normalize:
        # of a row of zeros the direction is anybody's guess: it is taken as it is, with derivative 1
        x = torch.where((x == 0).all(-1, keepdim=True), x, unit(x))
    size = x.detach().abs().amax().double() if not normalize else 1
    noise = NOISE * torch.finfo(x.dtype).eps * size
    from_first = x - x[:1]  # exactly 0 for equal rows, which the distance from a rounded mean is not
    # in float64: singular values are roots of a Gram matrix's eigenvalues, which doubles the digits that are lost
    centred = _sketched(from_first - from_first.mean(0), seed).double()
    n, d = centred.shape
    largest = centred.detach().abs().amax()
    finite = largest.isfinite()
    unit_of = torch.where(
        finite & (largest > 0), largest, 1
    )  # squares of the rest neither over- nor underflow
    total = unit_of * _nuclear(centred / unit_of, finite, noise * math.sqrt(n) / unit_of, seed)
    return (torch.where(finite, total, torch.nan) / math.sqrt(n * min(n - 1, d))).to(x.dtype)


def _sketched(centred: Tensor, seed: int) -> Tensor:
    """At most `DIRECTIONS` rows or columns: random projections keep lengths and directions, up to so many."""
    d = centred.shape[1]
    if min(centred.shape) <= DIRECTIONS:
        return centred
    return centred @ (_noise(d, DIRECTIONS, -1 - seed, centred) * math.sqrt(3 / DIRECTIONS))


def _nuclear(x: Tensor, finite: Tensor, noise: Tensor, seed: int) -> Tensor:
    """Sum of the singular values, those up to ``noise`` counted as 0; README.md derives the expansion.

    Value and two derivatives are exact, whether or not singular values coincide, where the derivative of an
    eigenvector has no limit.
    """
    missing = _direction(x.shape[0], x.shape[1], seed, x)
    if x.shape[0] < x.shape[1]:
        x, missing = x.mT, missing.mT
    fixed, gram = x.detach(), x.mT @ x
    count = gram.shape[0]
    at = torch.where(finite, gram.detach(), torch.eye(count, dtype=x.dtype, device=x.device))
    values, vectors = torch.linalg.eigh(at)
    singular = values.clamp(min=0).sqrt()
    lost = math.sqrt(count * torch.finfo(x.dtype).eps) * singular.amax()
    there = (singular > noise) & (singular > lost)
    inverse = torch.where(there, 1 / torch.where(there, singular, 1), 0)
    change = vectors.mT @ (gram - gram.detach()) @ vectors  # 0, with the derivatives of the Gram matrix
    sums = singular[:, None] + singular
    pairs = inverse[:, None] * inverse / torch.where(sums > 0, sums, 1)
    smooth = (change.diagonal() * inverse).sum() / 2 - (change.square() * pairs).sum() / 4
    # directions that are not there yet: one subgradient, orthogonal on both sides to those that are
    left = fixed @ (vectors * inverse)
    missing = missing - left @ (left.mT @ missing)
    missing = missing - (missing @ vectors * there) @ vectors.mT
    kink = (missing * (x - fixed)).sum()
    total: Tensor = torch.where(there, singular, 0).sum() + smooth + kink
    return total


def _direction(n: int, d: int, seed: int, like: Tensor) -> Tensor:
    """(n, d) pseudo-random numbers, centred over the rows, with largest singular value 1; the same on every device."""
    noise = _noise(n, d, seed, like)
    noise = noise - noise.mean(0)
    gram = noise @ noise.mT if n <= d else noise.mT @ noise
    largest: Tensor = torch.linalg.eigvalsh(gram)[-1].sqrt()
    return noise / largest


def _noise(n: int, d: int, seed: int, like: Tensor) -> Tensor:
    """(n, d) pseudo-random numbers, uniform on [-1, 1), from a hash of (row, column, seed)."""
    rows = torch.arange(n, device=like.device)[:, None]
    columns = torch.arange(d, device=like.device)
    bits = (rows * 0x9E3779B1 + columns * 0x85EBCA77 + (seed & 0xFFFFFFFF) * 0xC2B2AE3D) & 0xFFFFFFFF
    for factor in (0x7FEB352D, 0x2C1B3C6D):  # products below 2^63: the arithmetic is exact everywhere
        bits = ((bits ^ (bits >> 16)) * factor) & 0xFFFFFFFF
    bits = bits ^ (bits >> 16)
    return bits.to(like.dtype) / 2**31 - 1
