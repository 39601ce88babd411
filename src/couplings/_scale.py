"""Mean and standard deviation of each row: what makes epsilon dimensionless."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from couplings._rowwise import RowFunction, apply, by_rows, extent


def mean_std(
    x: Tensor, weights: Tensor | None = None, mask: Tensor | None = None, *, constant: bool = False
) -> tuple[Tensor, Tensor]:
    """Weighted mean and standard deviation (ddof 0) of the valid entries of each row.

    Args:
        x: (*batch, n); finite where masked.
        weights: (*batch, n), non-negative, or None.
        mask: (*batch, n) bool, True = valid, or None.
        constant: whether no gradient is to pass through them.

    Returns:
        mean and std, both (*batch, 1), differentiable to any order unless ``constant``. A row whose valid entries are
        all equal has std 1, with zero gradient.
    """
    if constant:
        with torch.no_grad():
            mean, std = by_rows(_measure, x, weights, mask)
    else:
        mean, std = apply(_MeanStd, x, weights, mask)
    return mean, std  # type: ignore[return-value]


def inverse_power(std: Tensor) -> Tensor:
    """A power of two p with std p in [1/2, 1): scores times p lose no digit, whatever their deviation. No gradient."""
    std = std.detach()
    return torch.ldexp(torch.ones_like(std), torch.frexp(std).exponent.neg().clamp(-126, 126))


def _total(x: Tensor, weights: Tensor | None, mask: Tensor | None) -> Tensor:
    """Total weight of the valid entries, (*batch, 1); 1 where there is none."""
    if weights is None and mask is None:
        return x.new_full((*x.shape[:-1], 1), x.shape[-1])
    counted = mask.to(x.dtype) if weights is None else weights if mask is None else weights * mask  # type: ignore[union-attr]
    total = counted.sum(-1, keepdim=True)
    return torch.where(total > 0, total, torch.ones_like(total))


def _moments(x: Tensor, total: Tensor, weights: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation; rounding of the mean is as large as that of its terms."""
    if mask is not None:
        x = x.masked_fill(~mask, 0)
    mean = (x if weights is None else x * weights).sum(-1, keepdim=True) / total
    square = x - mean
    if mask is not None:
        square.masked_fill_(~mask, 0)
    square.mul_(square)
    if weights is not None:
        square.mul_(weights)
    # sum, not vector_norm: that one adds up in plain float32 and loses everything beside an outlier
    return mean, (square.sum(-1, keepdim=True) / total).sqrt_()


def _measure(x: Tensor, weights: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    total = _total(x, weights, mask)
    mean, std = _moments(x, total, weights, mask)
    info = torch.finfo(x.dtype)
    least, most = info.tiny**0.4, info.max**0.4
    bounds, places = extent(std), extent(mean)
    if (
        bounds
        and places
        and least < bounds[0]
        and bounds[1] < most
        and max(-places[0], places[1]) < _FAR * bounds[0]
    ):
        return mean, std
    # Constant rows, rows far from 0, and rows whose squares leave the dtype's range: measure from one of the entries,
    # which is exact for a constant row, in units of the largest deviation.
    if weights is not None:  # an entry without weight may lie anywhere
        origin = x.gather(-1, (weights if mask is None else weights * mask).argmax(-1, keepdim=True))
    elif mask is None:
        origin = x[..., :1]
    else:
        origin = x.gather(-1, mask.to(torch.uint8).argmax(-1, keepdim=True))
    deviation = x - origin
    if mask is not None:
        deviation.masked_fill_(~mask, 0)
    size = deviation.abs()
    if weights is not None:
        size.masked_fill_(weights == 0, 0)
    unit = size.amax(-1, keepdim=True)
    constant = unit == 0
    unit = torch.where(constant, torch.ones_like(unit), unit)
    shift, scaled = _moments(deviation.div_(unit), total, weights, mask)
    scaled = torch.where(constant, torch.ones_like(std), scaled * unit)
    plain = (std > least) & (std < most) & (mean.abs() < _FAR * std)
    return torch.where(plain, mean, origin + shift * unit), torch.where(plain, std, scaled)


_FAR = 32
"""A mean of more standard deviations than this costs digits."""


def _pull_back(
    x: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    std: Tensor,
    mean_grad: Tensor | None,
    std_grad: Tensor | None,
    wanted: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Of mean: w_i / W; of std: w_i u_i / W with u = (x - mean) / std, which is 0 in a constant row."""
    total = _total(x, weights, mask)
    per_entry: Tensor | None = None
    u = (x - mean) / std  # first: std_grad / std overflows in float32 from a deviation of 1e-19 down
    if mask is not None:
        u = u.masked_fill(~mask, 0)
    if std_grad is not None:
        per_entry = u * (std_grad / total)
    if mean_grad is not None:
        shared = mean_grad / total
        if mask is not None:
            shared = shared * mask
        per_entry = shared.expand_as(x) if per_entry is None else per_entry + shared
    if per_entry is None or weights is None:
        return per_entry, None
    weights_grad: Tensor | None = None
    if wanted is not None:
        weights_grad = torch.zeros_like(u)
        if mean_grad is not None:
            weights_grad = weights_grad + u * (std * mean_grad / total)
        if std_grad is not None:
            square = u * u
            spread = square - (square * weights).sum(-1, keepdim=True) / total
            weights_grad = weights_grad + spread * (std * std_grad / (2 * total))
        if mask is not None:
            weights_grad = weights_grad.masked_fill(~mask, 0)
    return per_entry * weights, weights_grad


class _MeanStd(RowFunction):
    @staticmethod
    def forward(x: Tensor, weights: Tensor | None, mask: Tensor | None) -> tuple[Tensor, ...]:
        return by_rows(_measure, x, weights, mask)  # type: ignore[return-value]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, mean_grad: Tensor | None, std_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Differentiable in the outputs themselves, hence to any order."""
        if mean_grad is None and std_grad is None:
            return None, None, None
        x, weights, mask, mean, std = ctx.saved_tensors
        wanted = weights if ctx.needs_input_grad[1] else None
        return (*by_rows(_pull_back, x, weights, mask, mean, std, mean_grad, std_grad, wanted), None)
