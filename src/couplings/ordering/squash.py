"""Standardised logistic squash of long float32 rows, in blocks that stay in cache: u = sigmoid(s (x - mean) / std)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from couplings._rowwise import RowFunction, apply

STEEPNESS = math.pi / math.sqrt(3)
"""s: with it the logistic distribution has standard deviation 1."""

CHUNK = 2**15


def logistic(x: Tensor) -> Tensor:
    """sigmoid(s (x - mean) / std) of each row in float64, for x (*batch, n) float32; a constant row is 1/2.

    In float64 the squares of float32 numbers neither overflow nor vanish, so that one pass each for mean and deviation
    is exact enough.
    """
    u: Tensor = apply(_Logistic, x)[0]
    return u


def _forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    n = rows.shape[-1]
    u = torch.empty_like(rows, dtype=torch.float64)
    mean, rate = rows.new_empty(2, len(rows), dtype=torch.float64)
    for row, (source, target) in enumerate(zip(rows, u, strict=True)):
        origin = source[0].double()  # exact for a constant row
        total = square = torch.zeros_like(origin)
        for start in range(0, n, CHUNK):
            block = target[start : start + CHUNK]
            torch.sub(source[start : start + CHUNK].double(), origin, out=block)
            total = total + block.sum()
        shift = total / n
        for start in range(0, n, CHUNK):
            block = target[start : start + CHUNK].sub_(shift)
            square = square + torch.dot(block, block)
        std = (square / n).sqrt()
        mean[row], rate[row] = origin + shift, STEEPNESS / torch.where(std == 0, 1.0, std)
        for start in range(0, n, CHUNK):
            target[start : start + CHUNK].mul_(rate[row]).sigmoid_()
    batch = x.shape[:-1]
    return u.reshape(x.shape), mean.reshape(*batch, 1), rate.reshape(*batch, 1)


_forward_op = torch.library.custom_op("couplings::logistic", _forward, mutates_args=())


@_forward_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    one = x.new_empty((*x.shape[:-1], 1), dtype=torch.float64)
    return torch.empty_like(x, dtype=torch.float64), one, torch.empty_like(one)


def _pull_back(
    x: Tensor,
    u: Tensor,
    mean: Tensor,
    rate: Tensor,
    u_grad: Tensor,
    mean_grad: Tensor | None,
    rate_grad: Tensor | None,
) -> Tensor:
    """rate (t - mean(t) - (x - mean) mean(t (x - mean)) / var), t = u (1 - u) u_grad and 1 / var = (rate / s)^2."""
    n = x.shape[-1]
    if torch.is_grad_enabled() or mean_grad is not None or rate_grad is not None:
        t = u * (1 - u) * u_grad
        away = x - mean
        of_rate = (t * away).sum(-1, keepdim=True)
        if rate_grad is not None:
            of_rate = of_rate + rate_grad
        of_mean = -(rate * t).sum(-1, keepdim=True)
        if mean_grad is not None:
            of_mean = of_mean + mean_grad
        return (rate * t + (of_mean - away * of_rate * rate**3 / STEEPNESS**2) / n).to(x.dtype)
    out = torch.empty_like(x)
    parts = (t.reshape(-1, n) for t in (out, x, u, u_grad))
    for row, (target, source, value, grad) in enumerate(zip(*parts, strict=True)):
        middle, steep = mean.reshape(-1)[row], rate.reshape(-1)[row]
        total = moment = torch.zeros_like(middle)
        for start in range(0, n, CHUNK):
            place = slice(start, start + CHUNK)
            t = torch.addcmul(value[place], value[place], value[place], value=-1).mul_(grad[place])
            total = total + t.sum()
            moment = moment + torch.dot(t, source[place].double() - middle)
            target[place] = t
        tilt = moment / n * (steep / STEEPNESS) ** 2
        for start in range(0, n, CHUNK):
            place = slice(start, start + CHUNK)
            away = (source[place].double() - middle).mul_(-tilt).sub_(total / n)
            target[place] = away.add_(target[place]).mul_(steep)
    return out


class _Logistic(RowFunction):
    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _forward_op(x) if torch.compiler.is_compiling() else _forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, u_grad: Tensor | None, mean_grad: Tensor | None, rate_grad: Tensor | None
    ) -> Tensor:
        """Differentiable in the outputs themselves, hence to any order."""
        x, u, mean, rate = ctx.saved_tensors
        if u_grad is None:
            u_grad = torch.zeros_like(u)
        return _pull_back(x, u, mean, rate, u_grad, mean_grad, rate_grad)
