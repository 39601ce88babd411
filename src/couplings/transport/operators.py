"""``spread`` and ``interpolate``: the two adjoint operators of nodes.py as functions of the points (ordering.md).

Each one's derivative is the other one, or itself of differentiated polynomials: on its box a polynomial below the
degree is its values at the nodes, and so is its derivative. Hence both are differentiable to any order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from couplings import _checks
from couplings._rowwise import RowFunction, apply, seen
from couplings.transport.nodes import Boxes, chebyshev


@dataclass(frozen=True)
class ChebyshevBoxes:
    """``count`` equal boxes that cover [low, high], with ``degree`` Chebyshev nodes of the first kind in each.

    Attributes:
        low, high: the ends, low < high.
        count: boxes, at least 1.
        degree: nodes a box, at least 2: polynomials below that degree are carried exactly.

    Raises:
        TypeError, ValueError: an attribute of the wrong type or range.

    Example:
        >>> from couplings.transport import ChebyshevBoxes
        >>> ChebyshevBoxes(0.0, 1.0, count=1, degree=2).nodes()
        tensor([0.8536, 0.1464], dtype=torch.float64)
    """

    low: float
    high: float
    count: int
    degree: int = 16

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("degree", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                _checks.reject(name, "an int", _checks.describe(value), "Pass a positive int.", TypeError)
            if value < least:
                _checks.reject(name, f"at least {least}", value, "Pass a larger int.")
        for name in ("low", "high"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                _checks.reject(name, "a float", _checks.describe(value), "Pass a number.", TypeError)
        if not -math.inf < self.low < self.high < math.inf:
            _checks.reject("high", f"a finite number above low = {self.low}", self.high, "Swap the ends.")

    def nodes(self, device: torch.device | None = None) -> Tensor:
        """(count * degree,) float64: where the nodes are, box after box, falling inside a box."""
        unit, _ = chebyshev(self.degree, torch.device("cpu") if device is None else device)
        left = torch.arange(self.count, dtype=torch.float64, device=device)[:, None]
        return (self.low + (self.high - self.low) / self.count * (left + (unit + 1) / 2)).reshape(-1)


def spread(points: Tensor, values: Tensor, boxes: ChebyshevBoxes) -> Tensor:
    r"""Moments of the points at the nodes: m_q = sum_i values_i l_q(points_i), l_q the cardinal polynomial of node q.

    Sums over the points become sums over the nodes: sum_i values_i f(points_i) = sum_q m_q f(nodes_q), for polynomials
    below the degree exactly and for a smooth f to the accuracy of its interpolation. ``interpolate`` is the
    adjoint. Time O(n degree d), memory O(n d).

    Args:
        points: (\*batch, n) in [low, high].
        values: (\*batch, n, d) of the same dtype.
        boxes: where the nodes are.

    Returns:
        (\*batch, count * degree, d) in that dtype, computed in float64; differentiable to any order in points and
        values. At a border of two boxes the derivative is that of the box on the right.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: one of the wrong shape or device; on an eager CPU also points outside (elsewhere these are NaN).

    Example:
        >>> import torch
        >>> from couplings.transport import ChebyshevBoxes, spread
        >>> boxes = ChebyshevBoxes(0.0, 1.0, count=2, degree=8)
        >>> points, ones = torch.rand(1000, dtype=torch.float64), torch.ones(1000, 1, dtype=torch.float64)
        >>> between_nodes = spread(points, ones, boxes)[:, 0] @ boxes.nodes() ** 3
        >>> torch.testing.assert_close(between_nodes, (points**3).sum())
    """
    points = _checked(points, values, boxes, "points", points.shape)
    out: Tensor = apply(_Spread, points, values.double(), *_numbers(boxes), 0)
    return out.to(values.dtype)


def interpolate(points: Tensor, values: Tensor, boxes: ChebyshevBoxes) -> Tensor:
    r"""A function's values at the points from those at the nodes: f(points_i) = sum_q values_q l_q(points_i).

    Args:
        points: (\*batch, n) in [low, high].
        values: (\*batch, count * degree, d) at ``boxes.nodes()``, of the same dtype.
        boxes: where the nodes are.

    Returns:
        (\*batch, n, d) in that dtype; otherwise as ``spread``, whose adjoint it is.

    Raises:
        TypeError, ValueError: as in ``spread``.

    Example:
        >>> import torch
        >>> from couplings.transport import ChebyshevBoxes, interpolate
        >>> boxes = ChebyshevBoxes(0.0, 1.0, count=2, degree=8)
        >>> interpolate(torch.tensor([0.25, 0.5]), boxes.nodes().float()[:, None] ** 2, boxes)
        tensor([[0.0625],
                [0.2500]])
    """
    points = _checked(points, values, boxes, "nodes", (boxes.count * boxes.degree,))
    out: Tensor = apply(_Interpolate, points, values.double(), *_numbers(boxes), 0)
    return out.to(values.dtype)


def _checked(
    points: Tensor, values: Tensor, boxes: ChebyshevBoxes, per: str, size: tuple[int, ...]
) -> Tensor:
    """The points in float64, NaN where they lie outside and nobody may look."""
    _checks.real_tensor("points", points)
    _checks.real_tensor("values", values)
    _checks.same_dtype("values", values, points, "points")
    _checks.same_device("values", values, points, "points")
    if not isinstance(boxes, ChebyshevBoxes):
        _checks.reject("boxes", "ChebyshevBoxes", _checks.describe(boxes), "Build them first.", TypeError)
    if points.dim() == 0:
        _checks.reject("points", "(*batch, n)", _checks.describe(points), "Reshape points to (1,).")
    shape = (*points.shape[:-1], size[-1])
    if values.shape[:-1] != shape:
        _checks.reject(
            "values",
            f"shape (*{shape}, d), one value per entry of {per}",
            _checks.describe(values),
            "Expand the batch, or call values.unsqueeze(-1) for d = 1.",
        )
    inside = (points >= boxes.low) & (points <= boxes.high)
    outside = seen(~inside)
    if outside:
        _checks.reject("points", f"places in [{boxes.low}, {boxes.high}]", "some outside", "Widen the boxes.")
    points = points.double()
    return torch.where(inside, points, math.nan) if outside is None else points


def _numbers(boxes: ChebyshevBoxes) -> tuple[float, float, int, int]:
    return float(boxes.low), float(boxes.high), boxes.count, boxes.degree


def _layout(points: Tensor, boxes: ChebyshevBoxes) -> Boxes:
    low = points.new_full((len(points), 1), boxes.low)
    return Boxes(points, (low, torch.full_like(low, boxes.high)), boxes.count, boxes.degree)


@lru_cache(maxsize=16)
def _derivative(degree: int, device: torch.device) -> Tensor:
    """From a polynomial's values at the nodes on [-1, 1] to those of its derivative, (degree, degree)."""
    order = torch.arange(degree, dtype=torch.float64, device=device)
    angle = (math.pi * (order + 0.5) / degree)[:, None]
    slopes = order * torch.sin(order * angle) / torch.sin(angle)  # T_k'(cos t) = k sin(k t) / sin t
    return slopes @ chebyshev(degree, device)[1]


def _differentiated(values: Tensor, boxes: ChebyshevBoxes, order: int, adjoint: bool) -> Tensor:
    """The matrix of ``order`` derivatives in each box, or its transpose, times values (rows, q, d)."""
    if not order:
        return values
    matrix = _derivative(boxes.degree, values.device) * (2 * boxes.count / (boxes.high - boxes.low))
    matrix = torch.linalg.matrix_power(matrix.mT if adjoint else matrix, order)
    rows, q, d = values.shape
    found: Tensor = matrix @ values.reshape(rows * boxes.count, boxes.degree, d)
    return found.reshape(rows, q, d)


def _spread(
    points: Tensor, values: Tensor, low: float, high: float, count: int, degree: int, order: int
) -> Tensor:
    """sum_i values_i l_q(points_i), with l_q differentiated ``order`` times."""
    boxes = ChebyshevBoxes(low, high, count, degree)
    *batch, n, d = values.shape
    if not values.numel():
        return values.new_zeros(*batch, count * degree, d)
    found = _layout(points.reshape(-1, n), boxes).spread(values.reshape(-1, n, d))
    return _differentiated(found, boxes, order, True).reshape(*batch, count * degree, d)


def _interpolate(
    points: Tensor, values: Tensor, low: float, high: float, count: int, degree: int, order: int
) -> Tensor:
    """sum_q values_q l_q(points_i), with l_q differentiated ``order`` times."""
    boxes = ChebyshevBoxes(low, high, count, degree)
    *batch, q, d = values.shape
    n = points.shape[-1]
    if not values.numel() or not points.numel():
        return values.new_zeros(*batch, n, d)
    values = _differentiated(values.reshape(-1, q, d), boxes, order, False)
    return _layout(points.reshape(-1, n), boxes).interpolate(values).reshape(*batch, n, d)


# opaque under torch.compile: it would trace the loop over pieces of points
_spread_op = torch.library.custom_op("couplings::spread", _spread, mutates_args=())
_interpolate_op = torch.library.custom_op("couplings::interpolate", _interpolate, mutates_args=())


@_spread_op.register_fake
def _(points: Tensor, values: Tensor, low: float, high: float, count: int, degree: int, order: int) -> Tensor:
    return values.new_empty(*values.shape[:-2], count * degree, values.shape[-1])


@_interpolate_op.register_fake
def _(points: Tensor, values: Tensor, low: float, high: float, count: int, degree: int, order: int) -> Tensor:
    return values.new_empty(*points.shape, values.shape[-1])


class _Spread(RowFunction):
    @staticmethod
    def forward(
        points: Tensor, values: Tensor, low: float, high: float, count: int, degree: int, order: int
    ) -> Tensor:
        function = _spread_op if torch.compiler.is_compiling() else _spread
        return function(points, values, low, high, count, degree, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.boxes, ctx.order = inputs[2:6], inputs[6]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        points, values = ctx.saved_tensors
        points_grad = values_grad = None
        if ctx.needs_input_grad[0]:
            slope = apply(_Interpolate, points, grad, *ctx.boxes, ctx.order + 1)
            points_grad = (slope * values).sum(-1)
        if ctx.needs_input_grad[1]:
            values_grad = apply(_Interpolate, points, grad, *ctx.boxes, ctx.order)
        return points_grad, values_grad, *(None,) * 5


class _Interpolate(RowFunction):
    @staticmethod
    def forward(
        points: Tensor, values: Tensor, low: float, high: float, count: int, degree: int, order: int
    ) -> Tensor:
        function = _interpolate_op if torch.compiler.is_compiling() else _interpolate
        return function(points, values, low, high, count, degree, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.boxes, ctx.order = inputs[2:6], inputs[6]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        points, values = ctx.saved_tensors
        points_grad = values_grad = None
        if ctx.needs_input_grad[0]:
            slope = apply(_Interpolate, points, values, *ctx.boxes, ctx.order + 1)
            points_grad = (slope * grad).sum(-1)
        if ctx.needs_input_grad[1]:
            values_grad = apply(_Spread, points, grad, *ctx.boxes, ctx.order)
        return points_grad, values_grad, *(None,) * 5
