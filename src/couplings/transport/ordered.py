"""Ranks and sorted values of entropic transport between points and targets on a line, and their gradients.

    ranks           R_i = E[c_J | point i]         values of the targets, averaged by the plan's row i
    sorted values   S_j = E[v_I | target j]        values of the points, averaged by the plan's column j

Between nodes (moments.py) the plan is a density K; every function of a point that its gradient needs has the form
(K t)(X) = sum_r K(X, Y_r) t_r, and its derivative is exact (README.md, "Gradient of ranks and sorted values").
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from couplings._rowwise import RowFunction, apply
from couplings.transport import moments
from couplings.transport.moments import Problem, Solved

LARGEST_DENSE = 2**28
"""Entries of the plan beyond which second derivatives, which need it whole, are refused."""


def order(
    x: Tensor,
    a: Tensor,
    y: Tensor,
    b: Tensor,
    c: Tensor | None,
    v: Tensor | None,
    epsilon: Tensor,
    power: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Ranks and sorted values, differentiable twice in every argument.

    Args:
        x: (*batch, n) points, float64.
        a: (*batch, n) their masses, >= 0, of sum 1.
        y: (*batch, m) rising targets, float64.
        b: (*batch, m) their masses, >= 0, of sum 1.
        c: (*batch, m) values of the targets, or None if no ranks are wanted.
        v: (*batch, n, d) values of the points, or None if no sorted values are wanted.
        epsilon: (*batch, 1), positive.
        power: the cost is |x - y|^power, power >= 1.
        dtype: float32 or float64, the accuracy that is wanted.

    Returns:
        R (*batch, n) and S (*batch, m, d), float64; (*batch, 0) and (*batch, m, 0) where not wanted.
    """
    if c is None:
        c = y.new_empty((*y.shape[:-1], 0))
    if v is None:
        v = x.new_empty((*x.shape, 0))
    flat = v.reshape(*v.shape[:-2], -1)  # every argument a row: one batch, one last dimension
    ranks, values = apply(_Order, x, a, y, b, c, flat, epsilon, power, dtype == torch.float32, _Memory())
    return ranks, values.reshape(*values.shape[:-1], y.shape[-1], v.shape[-1])


class _Inputs(NamedTuple):
    """The arguments of ``order`` as rows of float64; v as (rows, n * d)."""

    x: Tensor
    a: Tensor
    y: Tensor
    b: Tensor
    c: Tensor
    v: Tensor
    epsilon: Tensor

    @classmethod
    def of(cls, *tensors: Tensor) -> _Inputs:
        return cls(*_as_rows(*tensors))

    def problem(self, power: float) -> Problem:
        return Problem(self.x, self.a, self.y, self.b, self.epsilon, power)


def _as_rows(*tensors: Tensor) -> list[Tensor]:
    rows = tensors[0].shape[:-1].numel()
    return [t.reshape(rows, t.shape[-1]).double() for t in tensors]


class _Memory:
    """The forward's solution, kept for its backward: it saves time and changes nothing."""

    def __init__(self) -> None:
        self.solved: list[Solved] | None = None
        self.rows = -1

    def keep(self, solved: list[Solved], rows: int) -> None:
        self.solved, self.rows = solved, rows

    def recall(self, rows: int) -> list[Solved] | None:
        return self.solved if self.rows == rows else None


def _accuracy(single: bool) -> torch.dtype:
    return torch.float32 if single else torch.float64


def _forward(
    x: Tensor,
    a: Tensor,
    y: Tensor,
    b: Tensor,
    c: Tensor,
    v: Tensor,
    epsilon: Tensor,
    power: float,
    single: bool,
) -> tuple[Tensor, Tensor]:
    return _solve(x, a, y, b, c, v, epsilon, power, single, _Memory())


def _solve(
    x: Tensor,
    a: Tensor,
    y: Tensor,
    b: Tensor,
    c: Tensor,
    v: Tensor,
    epsilon: Tensor,
    power: float,
    single: bool,
    memory: _Memory,
) -> tuple[Tensor, Tensor]:
    batch = x.shape[:-1]
    given = _Inputs.of(x, a, y, b, c, v, epsilon)
    rows, n, m = *given.x.shape, y.shape[-1]
    d = v.shape[-1] // n
    groups = moments.solve(given.problem(power), _accuracy(single)) if rows else []
    memory.keep(groups, rows)
    ranks, values = given.x.new_empty(rows, n if c.shape[-1] else 0), given.x.new_empty(rows, m, d)
    for group in groups:
        pick = slice(None) if len(group.rows) == rows else group.rows
        if c.shape[-1]:
            moment = group.y.spread((given.b[pick] * given.c[pick]).unsqueeze(-1))
            ranks[pick] = group.x.interpolate(group.kernel @ moment).squeeze(-1)
        if d:
            moment = group.x.spread(given.a[pick].unsqueeze(-1) * given.v[pick].reshape(-1, n, d))
            values[pick] = group.y.interpolate(group.kernel.mT @ moment)
    return ranks.reshape(*batch, -1), values.reshape(*batch, m * d)


def _pull_back(
    x: Tensor,
    a: Tensor,
    y: Tensor,
    b: Tensor,
    c: Tensor,
    v: Tensor,
    epsilon: Tensor,
    ranks: Tensor,
    values: Tensor,
    ranks_grad: Tensor,
    values_grad: Tensor,
    power: float,
    single: bool,
    targets: bool,
    memory: _Memory,
) -> tuple[Tensor, ...]:
    """Gradients with respect to x, a, y, b, c, v and epsilon; those of y, b, c and epsilon only if ``targets``."""
    inputs = (x, a, y, b, c, v, epsilon)
    given = _Inputs.of(*inputs)
    outer = _as_rows(ranks, values, ranks_grad, values_grad)
    rows, d = given.x.shape[0], v.shape[-1] // x.shape[-1]
    groups = memory.recall(rows)
    if groups is None:
        groups = moments.solve(given.problem(power), _accuracy(single)) if rows else []
    grads = [torch.zeros_like(t) for t in given]
    for group in groups:
        pick = slice(None) if len(group.rows) == rows else group.rows
        some = _Inputs(*(t[pick] for t in given))
        parts = _pull_back_group(group, some, [t[pick] for t in outer], d, power, targets)
        for whole, part in zip(grads, parts, strict=True):
            if part is not None:
                whole[pick] = part
    return tuple(grad.reshape(t.shape) for grad, t in zip(grads, inputs, strict=True))


def _pull_back_group(
    group: Solved, given: _Inputs, outer: list[Tensor], d: int, power: float, targets: bool
) -> tuple[Tensor | None, ...]:
    """README.md, "Gradient of ranks and sorted values"; its letters."""
    x, a, y, b, c, v, epsilon = given
    ranks_grad = outer[2]
    rows, n, m = *x.shape, y.shape[1]
    k, kt = group.kernel, group.kernel.mT
    mx, my = group.mx.unsqueeze(-1), group.my.unsqueeze(-1)
    v = v.reshape(rows, n, d)
    values, values_grad = (t.reshape(rows, m, d) for t in (outer[1], outer[3]))
    no = x.new_zeros(1, 1, 1)

    # the cotangents as measures at the nodes, and the right-hand side e
    pull = torch.zeros_like(mx)  # at X: what multiplies K in e, times my
    e = torch.zeros_like(my)
    rho = rank = mc = sigma = both = mv = no
    if c.shape[1]:
        mc = group.y.spread((b * c).unsqueeze(-1))
        rank = k @ mc
        rho = group.x.spread(ranks_grad.unsqueeze(-1))
        e = mc * (kt @ rho)
        pull = pull - rho * rank
    if d:
        sigma = group.y.spread(values_grad)
        both = group.y.spread((values_grad * values).sum(-1, keepdim=True))
        mv = group.x.spread(a.unsqueeze(-1) * v)
        pull = pull + mx * (k @ both) - (mv * (k @ sigma)).sum(-1, keepdim=True)
    e = e + my * (kt @ pull)
    share = my.abs() / my.abs().sum(-2, keepdim=True)
    matrix = share - my * (kt @ (mx * k))  # (I - V W)' made regular by what it does to constants
    matrix.diagonal(dim1=-2, dim2=-1).add_(1)
    price = torch.linalg.solve_ex(matrix, e)[0]

    # functions of a point X, (K t)(X), and their exact derivatives
    t = torch.cat(
        [price + both if d else price, *((mc,) if c.shape[1] else ()), *((sigma,) if d else ())], -1
    )
    at_x = k @ t
    bent = k * group.slope
    slope_x = bent @ t - at_x * (bent @ my)
    at_x, slope_x = group.x.interpolate(at_x), group.x.interpolate(slope_x)
    x_grad = -a * slope_x[..., 0]
    a_grad = -at_x[..., 0]
    v_grad = torch.zeros_like(v)
    first = 1
    if c.shape[1]:
        x_grad = x_grad + ranks_grad * slope_x[..., 1]
        first = 2
    if d:
        x_grad = x_grad + a * (v * slope_x[..., first:]).sum(-1)
        a_grad = a_grad + (v * at_x[..., first:]).sum(-1)
        v_grad = a.unsqueeze(-1) * at_x[..., first:]
    if not targets:
        return x_grad, a_grad, None, None, None, v_grad.reshape(rows, -1), None

    # functions of a target Y, (K' t)(Y)
    t = torch.cat([pull + mx * (k @ price), *((rho,) if c.shape[1] else ()), *((mv,) if d else ())], -1)
    at_y = kt @ t
    slope_y = at_y * (bent.mT @ mx) - bent.mT @ t
    at_y, slope_y = group.y.interpolate(at_y), group.y.interpolate(slope_y)
    y_grad, b_grad, c_grad = b * slope_y[..., 0], at_y[..., 0], torch.zeros_like(c)
    if c.shape[1]:
        y_grad = y_grad + b * c * slope_y[..., 1]
        b_grad = b_grad + c * at_y[..., 1]
        c_grad = b * at_y[..., 1]
    if d:
        y_grad = y_grad + (values_grad * slope_y[..., first:]).sum(-1)
    # points, targets and epsilon^(1 / power) in another unit: the same plan
    scaled = ((x - x[:, :1]) * x_grad).sum(-1, keepdim=True) + ((y - x[:, :1]) * y_grad).sum(-1, keepdim=True)
    epsilon_grad = scaled / (-power * epsilon)
    return x_grad, a_grad, y_grad, b_grad, c_grad, v_grad.reshape(rows, -1), epsilon_grad


def _dense(given: _Inputs, power: float) -> tuple[Tensor, Tensor]:
    """The same with the whole plan in plain torch: two Newton steps with a frozen matrix carry two derivatives."""
    x, a, y, b, c, v, epsilon = given
    rows, n, m = *x.shape, y.shape[1]
    if rows * n * m > LARGEST_DENSE:
        raise RuntimeError(
            f"second derivatives: expected at most {LARGEST_DENSE} pairs of a point and a target, got {rows} x {n} x "
            f"{m}. They need the whole plan: differentiate fewer or shorter rows twice, or use num_targets=."
        )
    with torch.no_grad():
        solution = moments.solve_exactly(given.problem(power))
        k = solution.kernel
        matrix = b.unsqueeze(-2) - k.mT @ (a.unsqueeze(-1) * k * b.unsqueeze(-2))
        matrix.diagonal(dim1=-2, dim2=-1).add_(1)
        factor = torch.linalg.lu_factor_ex(matrix)[:2]
        gamma = solution.gamma
    apart = x.unsqueeze(-1) - y.unsqueeze(-2)
    cost = apart.square() if power == 2 else apart.abs().pow(power)
    exponent = cost / -epsilon.unsqueeze(-1)

    def log_sums(gamma: Tensor) -> tuple[Tensor, Tensor]:
        over_y = _log_sum(exponent + gamma.unsqueeze(-2), b.unsqueeze(-2), -1)
        return over_y, _log_sum(exponent - over_y.unsqueeze(-1), a.unsqueeze(-1), -2)

    for _ in range(2):
        balance = gamma + log_sums(gamma)[1]
        balance = balance - (b * balance).sum(-1, keepdim=True)
        gamma = gamma - torch.linalg.lu_solve(*factor, balance.unsqueeze(-1)).squeeze(-1)
    over_y, over_x = log_sums(gamma)
    ranks = x.new_empty(rows, 0)
    if c.shape[1]:
        density = (exponent + (gamma.unsqueeze(-2) - over_y.unsqueeze(-1))).exp()
        ranks = (density @ (b * c).unsqueeze(-1)).squeeze(-1)
    density = (exponent - over_y.unsqueeze(-1) - over_x.unsqueeze(-2)).exp()
    values = density.mT @ (a.unsqueeze(-1) * v.reshape(rows, n, -1))
    return ranks, values.reshape(rows, -1)


def _log_sum(z: Tensor, weight: Tensor, dim: int) -> Tensor:
    most = z.detach().amax(dim, keepdim=True)
    total = ((z - most).exp() * weight).sum(dim, keepdim=True)
    return (most + total.log()).squeeze(dim)


_forward_op = torch.library.custom_op("couplings::order", _forward, mutates_args=())


@_forward_op.register_fake
def _(
    x: Tensor,
    a: Tensor,
    y: Tensor,
    b: Tensor,
    c: Tensor,
    v: Tensor,
    epsilon: Tensor,
    power: float,
    single: bool,
) -> tuple[Tensor, Tensor]:
    batch, n, m = x.shape[:-1], x.shape[-1], y.shape[-1]
    return (
        x.new_empty((*batch, n if c.shape[-1] else 0), dtype=torch.float64),
        x.new_empty((*batch, m * (v.shape[-1] // n)), dtype=torch.float64),
    )


def _backward(
    x: Tensor,
    a: Tensor,
    y: Tensor,
    b: Tensor,
    c: Tensor,
    v: Tensor,
    epsilon: Tensor,
    ranks: Tensor,
    values: Tensor,
    ranks_grad: Tensor,
    values_grad: Tensor,
    power: float,
    single: bool,
    targets: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = (x, a, y, b, c, v, epsilon, ranks, values, ranks_grad, values_grad)
    return _pull_back(*given, power, single, targets, _Memory())  # type: ignore[return-value]


_backward_op = torch.library.custom_op("couplings::order_backward", _backward, mutates_args=())


@_backward_op.register_fake
def _(
    x: Tensor,
    a: Tensor,
    y: Tensor,
    b: Tensor,
    c: Tensor,
    v: Tensor,
    epsilon: Tensor,
    ranks: Tensor,
    values: Tensor,
    ranks_grad: Tensor,
    values_grad: Tensor,
    power: float,
    single: bool,
    targets: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(t) for t in (x, a, y, b, c, v, epsilon))  # type: ignore[return-value]


class _Order(RowFunction):
    @staticmethod
    def forward(
        x: Tensor,
        a: Tensor,
        y: Tensor,
        b: Tensor,
        c: Tensor,
        v: Tensor,
        epsilon: Tensor,
        power: float,
        single: bool,
        memory: _Memory,
    ) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            return _forward_op(x, a, y, b, c, v, epsilon, power, single)  # type: ignore[no-any-return]
        return _solve(x, a, y, b, c, v, epsilon, power, single, memory)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:7], *output)
        ctx.power, ctx.single, ctx.memory = inputs[7:]

    @staticmethod
    def backward(ctx: Any, ranks_grad: Tensor, values_grad: Tensor) -> tuple[Tensor | None, ...]:
        targets = any(ctx.needs_input_grad[place] for place in (2, 3, 4, 6))
        given = (*ctx.saved_tensors, ranks_grad, values_grad)
        grads = apply(_OrderGradient, *given, ctx.power, ctx.single, targets, ctx.memory)
        wanted = zip(grads, ctx.needs_input_grad, strict=False)
        return *(grad if need else None for grad, need in wanted), None, None, None


class _OrderGradient(RowFunction):
    @staticmethod
    def forward(
        x: Tensor,
        a: Tensor,
        y: Tensor,
        b: Tensor,
        c: Tensor,
        v: Tensor,
        epsilon: Tensor,
        ranks: Tensor,
        values: Tensor,
        ranks_grad: Tensor,
        values_grad: Tensor,
        power: float,
        single: bool,
        targets: bool,
        memory: _Memory,
    ) -> tuple[Tensor, ...]:
        given = (x, a, y, b, c, v, epsilon, ranks, values, ranks_grad, values_grad)
        if torch.compiler.is_compiling():
            return _backward_op(*given, power, single, targets)  # type: ignore[no-any-return]
        return _pull_back(*given, power, single, targets, memory)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:7], *inputs[9:11])
        ctx.power = inputs[11]

    @staticmethod
    def backward(ctx: Any, *second: Tensor) -> tuple[Tensor | None, ...]:
        grads = apply(_SecondDerivative, *ctx.saved_tensors, *second, ctx.power)
        # ranks and values are functions of the inputs, which the second derivative goes through already
        return *grads[:7], None, None, *grads[7:], *(None,) * 4


class _SecondDerivative(RowFunction):
    """Of the gradient, with respect to the inputs and to the cotangents; the last one."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        *tensors, power = args
        inputs, cotangents, second = tensors[:7], tensors[7:9], tensors[9:]
        flat = [t.detach().requires_grad_() for t in _as_rows(*inputs, *cotangents)]
        with torch.enable_grad():
            outputs = _dense(_Inputs(*flat[:7]), power)
            first = torch.autograd.grad(
                outputs, flat[:7], flat[7:], create_graph=True, materialize_grads=True
            )
            found = torch.autograd.grad(first, flat, _as_rows(*second), materialize_grads=True)
        return tuple(
            grad.detach().reshape(t.shape) for grad, t in zip(found, (*inputs, *cotangents), strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *third: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "ordering: expected at most two derivatives, got a third. Differentiate twice at most."
        )
