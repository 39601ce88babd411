"""Values of soft indicators, measured from an origin of their own, without a temporary as large as the indicators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from couplings._rowwise import RowFunction
from couplings.transport.cuts import column_blocks


class WeightedValues(RowFunction):
    """sum_i weights_li (x_i - origin_l), (*batch, k), for weights (*batch, k, n), x (*batch, n), origin (*batch, k, 1).

    The gradient of ``weights`` is a difference of scores, hence exact where ``weights @ x`` would subtract two products
    that nearly agree. The origin is a constant.
    """

    @staticmethod
    def forward(weights: Tensor, x: Tensor, origin: Tensor) -> Tensor:
        whole = torch.compiler.is_compiling() or x.device.type != "cpu"
        values = torch.zeros_like(origin)
        for columns in column_blocks(x.shape[-1], weights.shape[:-1].numel(), whole):
            distance = (x.unsqueeze(-2).narrow(-1, *columns) - origin).mul_(weights.narrow(-1, *columns))
            values = values + distance.sum(-1, keepdim=True)
        return values.squeeze(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiable to any order."""
        weights, x, origin = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        origin = origin + torch.zeros_like(grad)  # batched by vmap where the cotangent is
        distance = x.unsqueeze(-2) - origin
        weights_grad = distance * grad if torch.is_grad_enabled() else distance.mul_(grad)
        return weights_grad, (grad.mT @ weights).squeeze(-2), None
