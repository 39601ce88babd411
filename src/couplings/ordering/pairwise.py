"""Sums over all pairs of a row, out_i = sum_j q_j f((z_i - z_j) / h), without ever holding n x n numbers.

The work is O(n^2), the memory O(n): blocks of pairs are computed, summed and forgotten. The derivative of such a sum is
a combination of sums of the same kind, with f' or u f'(u) in place of f, so that it is recomputed rather than kept, to
any order (relaxations.md, equation 2).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from couplings._rowwise import BLOCK, RowFunction, apply
from couplings.ordering.rows import Real, Rows

_FAR = {
    "logistic": {torch.float32: 87.0, torch.float64: 708.0},
    "normal": {torch.float32: 13.0, torch.float64: 37.0},
}
"""|u| beyond which f'(u) leaves the normal numbers of a dtype, where exp is slow; f is 0 or 1 long before."""


def mean_rank(rows: Rows, epsilon: Real, family: str, widening: float = 1.0) -> Tensor:
    """R_i = 1/2 + c sum_j a_j F((z_i - z_j) / (widening epsilon)), (*batch, n); 0 where masked.

    F is the distribution function of ``family``, c the count of valid entries and a = w / sum(w), 1/c without weights.
    """
    z, unit = rows.measured()
    if rows.weights is not None:
        total = rows.weights.sum(-1, keepdim=True)
        share = rows.weights * (rows.count / torch.where(total > 0, total, 1.0))
    else:
        share = torch.ones_like(z) if rows.mask is None else rows.mask.to(z.dtype)
    width = unit * ((epsilon * widening).to(z.dtype) if isinstance(epsilon, Tensor) else epsilon * widening)
    width = width.clamp_min(torch.finfo(z.dtype).tiny)
    rank = 0.5 + _sums(share.unsqueeze(-2), z, width, family, 0, 0).squeeze(-2)
    return rank if rows.mask is None else rank.masked_fill(~rows.mask, 0)


def _sums(q: Tensor, z: Tensor, width: Tensor, family: str, order: int, power: int) -> Tensor:
    """out_ki = sum_j q_kj u^power F^(order)(u), u = (z_i - z_j) / width; q and out (*batch, r, n).

    For order > 0 without j = i: an entry's slope against itself cancels in every gradient, and would bury the others.
    """
    out: Tensor = apply(_Sums, q, z, width, family, order, power)
    return out


def _polynomial(family: str, order: int) -> list[float]:
    """Coefficients of Q with F^(order) = F' Q: in tanh(u / 2) for the logistic family, in u for the normal one."""
    q = [1.0]
    for _ in range(order - 1):
        slope = [k * a for k, a in enumerate(q)][1:]
        if family == "logistic":  # Q <- -t Q + (1 - t^2) Q' / 2
            terms = [[0.0, *(-a for a in q)], [a / 2 for a in slope], [0.0, 0.0, *(-a / 2 for a in slope)]]
        else:  # Q <- -u Q + Q'
            terms = [[0.0, *(-a for a in q)], slope]
        longest = max(len(term) for term in terms)
        q = [sum(term[k] for term in terms if k < len(term)) for k in range(longest)]
    return q


def _evaluate(u: Tensor, family: str, order: int, power: int) -> Tensor:
    """u^power F^(order)(u)."""
    if order == 0:
        if family == "logistic":
            return u.sigmoid_()
        return u.mul_(math.sqrt(0.5)).erf_().mul_(0.5).add_(0.5)
    if family == "logistic":
        small = u.abs().neg_().sigmoid_()
        f = (1 - small).mul_(small)
    else:
        f = u.square().mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    if order > 1:
        t = torch.tanh(u / 2) if family == "logistic" else u
        coefficients = _polynomial(family, order)
        q = torch.full_like(t, coefficients[-1])
        for a in reversed(coefficients[:-1]):
            q.mul_(t).add_(a)
        f.mul_(q)
    for _ in range(power):
        f.mul_(u)
    return f


def _blocks(q: Tensor, z: Tensor, width: Tensor, family: str, order: int, power: int) -> Tensor:
    r, n = q.shape[-2:]
    rows = z.shape[:-1].numel()
    flat_q, flat_z, inverse = (
        q.reshape(rows, r, n),
        z.reshape(rows, n),
        width.reshape(rows, 1, 1).reciprocal(),
    )
    out = torch.empty_like(flat_q)
    far = _FAR[family][z.dtype]
    together = max(1, BLOCK // max(1, n * n))  # rows of the batch
    height = max(1, BLOCK // max(1, n))  # entries of one row
    for row in range(0, rows, together):
        part = slice(row, row + together)
        for start in range(0, n, height):
            block = slice(start, start + height)
            u = flat_z[part, block, None] - flat_z[part, None, :]
            f = _evaluate(u.mul_(inverse[part]).clamp_(-far, far), family, order, power)
            if order > 0:
                f.diagonal(start, -2, -1).zero_()
            if r == 1:
                out[part, 0, block] = f.mul_(flat_q[part]).sum(-1)
            else:
                out[part, :, block] = torch.matmul(flat_q[part], f.mT)
    return out.view(q.shape)


_blocks_op = torch.library.custom_op("couplings::pair_sums", _blocks, mutates_args=())


@_blocks_op.register_fake
def _(q: Tensor, z: Tensor, width: Tensor, family: str, order: int, power: int) -> Tensor:
    return q.new_empty(q.shape)


class _Sums(RowFunction):
    @staticmethod
    def forward(q: Tensor, z: Tensor, width: Tensor, family: str, order: int, power: int) -> Tensor:
        blocks = _blocks_op if torch.compiler.is_compiling() else _blocks
        out: Tensor = blocks(q, z, width, family, order, power)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, z, width, *rest = inputs
        ctx.save_for_backward(q, z, width)
        ctx.rest = rest

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Sums of the same kind again: u^m F^(d) is even or odd for d > 0, and F(-u) = 1 - F(u)."""
        q, z, width = ctx.saved_tensors
        family, d, m = ctx.rest
        q_grad = z_grad = width_grad = None
        if ctx.needs_input_grad[0]:
            across = _sums(grad, z, width, family, d, m)
            if d == 0:
                q_grad = grad.sum(-1, keepdim=True) - across
            else:
                q_grad = across if (d + m) % 2 else -across
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            both = torch.cat((q, grad), -2)
            slope = _sums(both, z, width, family, d + 1, m)
            if m > 0:
                slope = slope + m * _sums(both, z, width, family, d, m - 1)
            of_q, of_grad = slope.tensor_split(2, -2)
            theirs = q * of_grad
            z_grad = (grad * of_q + theirs if (d + m) % 2 else grad * of_q - theirs).sum(-2) / width
            if ctx.needs_input_grad[2]:
                # z and width in another unit, or z shifted, are the same sums: no further pass over the pairs
                size = z_grad.detach().abs()
                size = size / size.amax(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
                total = size.sum(-1, keepdim=True)
                middle = (size * z.detach()).sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0)
                width_grad = -(z_grad * (z - middle)).sum(-1, keepdim=True) / width
        return q_grad, z_grad, width_grad, None, None, None
