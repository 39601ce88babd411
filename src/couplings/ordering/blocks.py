"""What ``method="projection"`` computes on sorted rows: the sort itself, and means and softmaxes over blocks.

Each is one ``autograd.Function`` whose backward is differentiable torch code and ``block_sum``, hence differentiable to
any order; the sort and the sums are compiled where numba is (``isotonic_compiled.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from couplings._rowwise import RowFunction, apply
from couplings.ordering import isotonic_compiled
from couplings.ordering.isotonic import Blocks


def sort_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Entries in rising order, (*batch, n) float64, and where each came from; ties keep their order, NaN comes last."""
    ordered, order = apply(_Sort, x)
    return ordered, order


def unsort(value: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor:
    """Entries in order, (*batch, n) float64, put back to where they came from, in that dtype."""
    found: Tensor = apply(_Unsort, value, order, dtype)
    return found


def block_sum(value: Tensor, blocks: Blocks) -> Tensor:
    """The sum over its block, at every entry; value (*batch, n) float64."""
    found: Tensor = apply(_BlockSum, value, *blocks, False)
    return found


def block_mean(value: Tensor, blocks: Blocks) -> Tensor:
    """The mean of its block, at every entry; value (*batch, n) float64."""
    found: Tensor = apply(_BlockSum, value, *blocks, True)
    return found


def centred(x: Tensor, rate: Tensor, weights: Tensor | None, blocks: Blocks) -> Tensor:
    """rate (x_i - mean_B(x)), the mean weighted; x (*batch, n) and rate (*batch, 1) float64. A block of one gives 0."""
    found: Tensor = apply(_Centred, x, rate, weights, *blocks)
    return found


def softmax(x: Tensor, rate: Tensor, weights: Tensor | None, blocks: Blocks) -> Tensor:
    """exp(rate x_i) / sum_B a exp(rate x), for x rising in each row; a block of one gives 1 / a."""
    found: Tensor = apply(_Softmax, x, rate, weights, *blocks)
    return found


def block_size(blocks: Blocks) -> Tensor:
    """Entries of the block, at every entry, float64."""
    return (blocks.last - blocks.first).add_(1).to(torch.float64)


class _Sort(RowFunction):
    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dtype == torch.float32 and (kernels := _kernels(x)) is not None:
            return kernels.sort(x)
        ordered, order = torch.sort(x, dim=-1, stable=True)
        return ordered.double(), order

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> Tensor:
        (order,) = ctx.saved_tensors
        return unsort(grad, order, ctx.dtype)


class _Unsort(RowFunction):
    @staticmethod
    def forward(value: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype == torch.float32 and (kernels := _kernels(value)) is not None:
            return kernels.unsort(value, order)
        value = value.to(dtype)
        return torch.zeros_like(value).scatter(-1, order, value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        if grad.dtype == torch.float32 and not torch.is_grad_enabled() and (kernels := _kernels(grad)):
            return kernels.resort(grad, order), None, None
        return grad.gather(-1, order).double(), None, None


def _kernels(like: Tensor) -> isotonic_compiled.Compiled | None:
    """The compiled functions where they can work on such a tensor."""
    if like.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return isotonic_compiled.compiled()


def _sums(value: Tensor, first: Tensor, last: Tensor, mean: bool) -> Tensor:
    kernels = _kernels(value)
    if kernels is not None:
        return kernels.block_sum(value, last, mean)
    found = torch.zeros_like(value).scatter_add_(-1, first, value).gather(-1, first)
    return found.div_(block_size(Blocks(first, last))) if mean else found


class _BlockSum(RowFunction):
    @staticmethod
    def forward(value: Tensor, first: Tensor, last: Tensor, mean: bool) -> Tensor:
        return _sums(value, first, last, mean)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:3])
        ctx.mean = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Symmetric: itself."""
        return apply(_BlockSum, grad, *ctx.saved_tensors, ctx.mean), None, None, None


class _Centred(RowFunction):
    @staticmethod
    def forward(x: Tensor, rate: Tensor, weights: Tensor | None, first: Tensor, last: Tensor) -> Tensor:
        if weights is None and (kernels := _kernels(x)) is not None:
            return kernels.centred(x, rate, last)
        offset = (x - x.gather(-1, first)).mul_(rate)  # where the scores lie costs no digits
        if weights is None:
            return offset.sub_(_sums(offset, first, last, True))
        total = _sums(weights, first, last, False)
        return offset.sub_(_sums(offset * weights, first, last, False).div_(total))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of the offset, g - a sum_B(g) / sum_B(a); the sum over a block of that is 0."""
        rate, weights, *pair, out = ctx.saved_tensors
        blocks = Blocks(*pair)
        if weights is None and not torch.is_grad_enabled() and (kernels := _kernels(grad)) is not None:
            return (*kernels.centred_back(grad, rate, blocks.last, out), None, None, None)
        if weights is None:
            shared = block_mean(grad, blocks)
        else:
            shared = block_sum(grad, blocks) / block_sum(weights, blocks)
        inner = grad - (shared if weights is None else shared * weights)
        rate_grad = weights_grad = None
        if ctx.needs_input_grad[1]:
            rate_grad = (inner * out).sum(-1, keepdim=True) / rate
        if ctx.needs_input_grad[2]:
            weights_grad = -shared * out
        return inner * rate, rate_grad, weights_grad, None, None


class _Softmax(RowFunction):
    @staticmethod
    def forward(x: Tensor, rate: Tensor, weights: Tensor | None, first: Tensor, last: Tensor) -> Tensor:
        if weights is None and (kernels := _kernels(x)) is not None:
            return kernels.softmax(x, rate, last)
        power = (x - x.gather(-1, last)).mul_(rate).exp_()
        return power.div_(_sums(power if weights is None else power * weights, first, last, False))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of the logits, q (g - a sum_B(g q)); the sum over a block of that is 0."""
        x, rate, weights, *pair, q = ctx.saved_tensors
        blocks = Blocks(*pair)
        if weights is None and not torch.is_grad_enabled() and (kernels := _kernels(grad)) is not None:
            return (*kernels.softmax_back(grad, x, rate, blocks.last, q), None, None, None)
        total = block_sum(grad * q, blocks)
        inner = q * (grad - (total if weights is None else total * weights))
        rate_grad = weights_grad = None
        if ctx.needs_input_grad[1]:
            base = x.detach().gather(-1, blocks.last)
            rate_grad = (inner * (x - base)).sum(-1, keepdim=True)
        if ctx.needs_input_grad[2]:
            weights_grad = -q * total
        return inner * rate, rate_grad, weights_grad, None, None
