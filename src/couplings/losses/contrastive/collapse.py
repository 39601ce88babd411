"""A term that pulls embeddings apart where all rows are equal, which no other loss of this folder does."""

from __future__ import annotations

import torch
from torch import Tensor

from couplings._autocast import full_precision
from couplings._checks import HALF, describe, real_tensor, reject
from couplings.losses.contrastive.prepare import check_number, unit

NOISE = 32
"""Spreads up to this many roundings are rounding: equal rows that took different paths through a matrix product."""


def collapse_guard(
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    threshold: float = 0.25,
    normalize: bool = True,
    seed: int = 0,
) -> Tensor:
    """Hinge on the spread of the rows, max(0, 1 - spread / threshold), with a gradient at exact collapse.

    The spread is the root mean square distance of the rows from their mean; of unit vectors it is between 0 (all
    equal) and 1. A healthy batch is above the threshold: there the guard is exactly 0 and changes nothing. Add it to a
    loss with a weight of about 1.

    Where all rows are equal, bit for bit, every smooth term that treats rows alike has the same gradient for all of
    them and so cannot part them. The spread is not smooth there: like a norm at 0 it has many subgradients. The one
    taken is a pseudo-random direction of mean 0, fixed by ``seed``; it, and only it, depends on the order of the rows.
    A pair (row i of x1, row i of x2) gets the same direction on both sides, so that pairs part together. A spread
    within rounding of 0 counts as 0.

    Args:
        x1: (n, d), n >= 2, any real floating dtype; half precision is computed in float32.
        x2: (m, d) or None; with it, the result is the mean over both sides.
        threshold: positive; with ``normalize`` less than 1, as no batch of unit vectors spreads more than 1.
        normalize: measure unit vectors (a row of zeros counts as it is). Otherwise the threshold is in units of x.
        seed: of the direction at zero spread.

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
        if x is not None and (x.ndim != 2 or x.shape[0] < 2):
            reject(name, "shape (n, d) with n >= 2", describe(x), "One row has no spread.")
    if check_number("threshold", threshold) <= 0 or (normalize and threshold >= 1):
        upper = "a number in (0, 1)" if normalize else "a positive number"
        reject("threshold", upper, threshold, "0.25 is far below the spread of a healthy batch.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        reject("seed", "an int", describe(seed), "Any will do.", TypeError)
    with full_precision(x1):
        sides = [x for x in (x1, x2) if x is not None]
        hinges = [(1 - _spread(x, normalize, seed) / threshold).clamp(min=0) for x in sides]
        return torch.stack(hinges).mean().to(x1.dtype)


def _spread(x: Tensor, normalize: bool, seed: int) -> Tensor:
    """Root mean square distance of the rows from their mean."""
    x = x.float() if x.dtype in HALF else x
    if normalize:
        # of a row of zeros the direction is anybody's guess: it is taken as it is, with derivative 1
        x = torch.where((x == 0).all(-1, keepdim=True), x, unit(x))
    from_first = x - x[:1]  # exactly 0 for equal rows, which the distance from a rounded mean is not
    centred = from_first - from_first.mean(0)
    squared = centred.square().sum(-1).mean()
    size = x.detach().abs().amax() if not normalize else 1
    noise = NOISE * torch.finfo(x.dtype).eps * size
    equal = squared <= noise * noise
    # of length sqrt(n) in all, as the gradient of the spread is at any other place; its value here is 0
    direction = _direction(x.shape[0], x.shape[1], seed, x)
    kink = (direction * (x - x.detach())).sum() / x.shape[0]
    return torch.where(equal, kink, torch.where(equal, 1, squared).sqrt())


def _direction(n: int, d: int, seed: int, like: Tensor) -> Tensor:
    """(n, d) pseudo-random numbers, centred over the rows, of mean squared length 1; the same on every device."""
    rows = torch.arange(n, device=like.device)[:, None]
    columns = torch.arange(d, device=like.device)
    bits = (rows * 0x9E3779B1 + columns * 0x85EBCA77 + seed * 0xC2B2AE3D) & 0xFFFFFFFF
    for factor in (0x7FEB352D, 0x2C1B3C6D):  # products below 2^63: the arithmetic is exact everywhere
        bits = ((bits ^ (bits >> 16)) * factor) & 0xFFFFFFFF
    bits = bits ^ (bits >> 16)
    noise = bits.to(torch.float64) / 2**31 - 1
    noise = noise - noise.mean(0)
    return (noise / noise.square().sum(-1).mean().sqrt()).to(like.dtype)
