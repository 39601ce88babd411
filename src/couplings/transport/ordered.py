"""Ranks and sorted values of entropic transport between points and targets on a line, and their gradients.

    ranks           R_i = E[c_J | point i]         values of the targets, averaged by the plan's row i
    sorted values   S_j = E[v_I | target j]        values of the points, averaged by the plan's column j

Between nodes (moments.py) the plan is a density K; every function of a point that its gradient needs has the form
(K t)(X) = sum_r K(X, Y_r) t_r, and its derivative is exact (ordering.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from couplings._rowwise import RowFunction, apply
from couplings.transport import moments
from couplings.transport.moments import Problem, Solved


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
    even: bool = False,
    straight: bool = False,
) -> tuple[Tensor, Tensor]:
    """Ranks and sorted values, differentiable twice in every argument.

    Args:
        x: (*batch, n) points, float64.
        a: (*batch, n) their masses, >= 0, of sum 1.
        y: (*batch, m) rising targets, float64.
        b: (*batch, m) their masses, >= 0, of sum 1.
        c: (*batch, m) values of the targets, or None if no ranks are wanted.
        v: (*batch, n, d) values of the points, of any dtype, or None if no sorted values are wanted.
        epsilon: (*batch, 1), positive.
        power: the cost is |x - y|^power, power >= 1.
        dtype: float32 or float64, the accuracy that is wanted.
        even: every row has the same m even targets of equal mass on [0, 1], constants.
        straight: c (*batch, 2) are the values of the first and the last of even targets, affine between them, and
            constants.

    Returns:
        R (*batch, n) and S (*batch, m, d) in ``dtype``; (*batch, 0) and (*batch, m, 0) where not wanted.
    """
    if c is None:
        c = y.new_empty((*y.shape[:-1], 0))
    if v is None:
        v = x.new_empty((*x.shape, 0))
    flat = v.reshape(
        *v.shape[:-2], v.shape[-2] * v.shape[-1]
    )  # every argument a row: one batch, one last dimension
    ranks, values = apply(
        _Order, x, a, y, b, c, flat, epsilon, power, dtype == torch.float32, even, straight, _Memory()
    )
    return ranks, values.reshape(*values.shape[:-1], y.shape[-1], v.shape[-1])


class Setting(NamedTuple):
    """What no gradient passes through.

    Attributes:
        power: the cost is |x - y|^power.
        single: whether float32 accuracy is enough.
        even: whether every row has the same even targets of equal mass on [0, 1], constants.
        straight: whether c is given by its ends, affine in even y between them, and a constant.
    """

    power: float
    single: bool
    even: bool
    straight: bool


class _Inputs(NamedTuple):
    """The arguments of ``order`` as rows; v as (rows, n * d)."""

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

    def rows(self, pick: Tensor | slice) -> _Inputs:
        return _Inputs(*(t[pick] for t in self))

    def problem(self, setting: Setting) -> Problem:
        return Problem(self.x, self.a, self.y, self.b, self.epsilon, setting.power, setting.even)

    def solve(self, setting: Setting) -> Iterator[Solved]:
        if not len(self.x):
            return iter(())
        accuracies = moments.FOR_VALUES if self.v.shape[-1] else moments.ACCURACY
        return moments.solve(
            self.problem(setting), accuracies[torch.float32 if setting.single else torch.float64]
        )


def _as_rows(*tensors: Tensor) -> list[Tensor]:
    rows = tensors[0].shape[:-1].numel()
    return [t.reshape(rows, t.shape[-1]) for t in tensors]


class _Memory:
    """The forward's solution, kept for its backward if it is small: it saves time and changes nothing."""

    def __init__(self) -> None:
        self.solved: list[Solved] | None = []
        self.rows = -1

    def passing(self, groups: Iterator[Solved], rows: int) -> Iterator[Solved]:
        """The groups, noted as they pass."""
        self.rows, pairs = rows, 0
        for group in groups:
            pairs += group.kernel.numel()
            if self.solved is not None:
                self.solved = [*self.solved, group] if pairs <= 2 * moments.PAIRS else None
            yield group

    def recall(self, rows: int) -> list[Solved] | None:
        """What was kept, if it is of so many rows."""
        return self.solved if self.rows == rows else None


def _forward(inputs: Sequence[Tensor], setting: Setting, memory: _Memory) -> tuple[Tensor, Tensor]:
    batch = inputs[0].shape[:-1]
    given = _Inputs.of(*inputs)
    rows, n, m = *given.x.shape, given.y.shape[-1]
    d = given.v.shape[-1] // n
    work = torch.float32 if setting.single else torch.float64
    ranks = given.x.new_empty(rows, n if given.c.shape[-1] else 0, dtype=work)
    values = given.x.new_empty(rows, m, d, dtype=work)
    for group in memory.passing(given.solve(setting), rows):
        whole = group.every
        some = given if whole else given.rows(group.rows)
        if given.c.shape[-1]:
            found = group.x.interpolate(group.kernel @ _target_moments(group, some, setting)).squeeze(-1)
            if whole:
                ranks = found.to(work)
            else:
                ranks[group.rows] = found.to(work)
        if d:
            found = group.y.interpolate(group.kernel.mT @ _point_moments(group, some))
            if whole:
                values = found.to(work)
            else:
                values[group.rows] = found.to(work)
    return ranks.reshape(*batch, ranks.shape[-1]), values.reshape(*batch, m * d)


def _point_moments(group: Solved, given: _Inputs) -> Tensor:
    """Moments of a v at the points' nodes, (rows, qx, d)."""
    rows, n = given.x.shape
    v = given.v.reshape(rows, n, given.v.shape[1] // n)
    if given.a.stride(-1) == 0:  # all weigh the same
        return group.x.spread(v) * given.a[:, :1, None]
    return group.x.spread(given.a.unsqueeze(-1) * v)


def _target_moments(group: Solved, given: _Inputs, setting: Setting) -> Tensor:
    """Moments of b c at the targets' nodes, (rows, qy, 1)."""
    if not setting.straight:
        return group.y.spread((given.b * given.c).unsqueeze(-1))
    first, last = given.c[:, :1], given.c[:, 1:]
    return (group.my * torch.lerp(first, last, group.y.nodes)).unsqueeze(-1)


def _pull_back(
    tensors: Sequence[Tensor], setting: Setting, masses: bool, targets: bool, memory: _Memory
) -> tuple[Tensor, ...]:
    """Gradients with respect to the seven inputs.

    Args:
        tensors: the inputs, and the gradients of ranks and values.
        setting: as in the forward.
        masses: whether those of a and v are wanted.
        targets: whether those of y, b, c and epsilon are wanted.
        memory: the forward's solution, if it is that of these rows.
    """
    inputs = tensors[:7]
    given = _Inputs.of(*inputs)
    outer = _as_rows(*tensors[7:])
    rows = len(given.x)
    kept = memory.recall(rows)
    grads = [t.new_zeros(()).expand(t.shape) for t in given]
    filled = [False] * len(grads)
    for group in given.solve(setting) if kept is None else kept:
        if group.every:
            parts = _pull_back_group(group, given, outer, setting, masses, targets)
            grads = [grad if part is None else part for grad, part in zip(grads, parts, strict=True)]
            continue
        some = given.rows(group.rows)
        parts = _pull_back_group(group, some, [t[group.rows] for t in outer], setting, masses, targets)
        for place, part in enumerate(parts):
            if part is not None:
                if not filled[place]:
                    grads[place], filled[place] = (
                        grads[place].clone(memory_format=torch.contiguous_format),
                        True,
                    )
                grads[place][group.rows] = part.to(grads[place].dtype)
    return tuple(grad.reshape(t.shape) for grad, t in zip(grads, inputs, strict=True))


def _pull_back_group(
    group: Solved, given: _Inputs, outer: list[Tensor], setting: Setting, masses: bool, targets: bool
) -> tuple[Tensor | None, ...]:
    """ordering.md, "Gradient of ranks and sorted values"; its letters."""
    x, a, y, b, c, v, epsilon = given
    ranks_grad, values_grad = outer
    rows, n, m = *x.shape, y.shape[1]
    d = v.shape[1] // n
    k, kt = group.kernel, group.kernel.mT
    mx, my = group.mx.unsqueeze(-1), group.my.unsqueeze(-1)
    v = v.reshape(rows, n, d)
    values_grad = values_grad.reshape(rows, m, d)
    no = x.new_zeros(1, 1, 1)

    # the cotangents as measures at the nodes, and the right-hand side e
    pull = torch.zeros_like(mx)  # at X: what multiplies K in e, times my
    e = torch.zeros_like(my)
    rho = rank = mc = sigma = both = mv = no
    if c.shape[1]:
        mc = _target_moments(group, given, setting)
        rank = k @ mc
        rho = group.x.spread(ranks_grad.unsqueeze(-1))
        e = mc * (kt @ rho)
        pull = pull - rho * rank
    if d:
        sigma = group.y.spread(values_grad)
        mv = _point_moments(group, given)
        # S at the nodes, not the rounded one that was returned: it is compared with v
        both = (sigma * (kt @ mv)).sum(-1, keepdim=True)
        pull = pull + mx * (k @ both) - (mv * (k @ sigma)).sum(-1, keepdim=True)
    e = e + my * (kt @ pull)
    price = my * _laplacian_solve(my * (kt @ (mx * k)) * my.mT, e, my)

    # functions of a point X, (K t)(X), and their exact derivatives
    t = _columns(price + both if d else price, *((mc,) if c.shape[1] else ()), *((sigma,) if d else ()))
    at_nodes = k @ t
    bent = k * group.slope
    slope_x = bent @ t - at_nodes * (bent @ my)
    first = 2 if c.shape[1] else 1
    slope_x[..., 0].neg_()
    weights = [a, *((ranks_grad,) if c.shape[1] else ()), *(a * column for column in v.unbind(-1))]
    x_grad = group.x.contract(slope_x, weights)
    a_grad = v_grad = None
    if masses:
        at_x = group.x.interpolate(at_nodes)
        a_grad = -at_x[..., 0]
        if d:
            a_grad = a_grad + (v * at_x[..., first:]).sum(-1)
            v_grad = (a.unsqueeze(-1) * at_x[..., first:]).reshape(rows, n * d)
    if not targets:
        return x_grad, a_grad, None, None, None, v_grad, None

    # functions of a target Y, (K' t)(Y)
    if setting.straight:
        c = torch.lerp(c[:, :1], c[:, 1:], y)
    t = _columns(pull + mx * (k @ price), *((rho,) if c.shape[1] else ()), *((mv,) if d else ()))
    at_y = kt @ t
    slope_y = at_y * (bent.mT @ mx) - bent.mT @ t
    at_y, slope_y = group.y.interpolate(at_y), group.y.interpolate(slope_y)
    y_grad, b_grad, c_grad = b * slope_y[..., 0], at_y[..., 0], None
    if c.shape[1]:
        y_grad = y_grad + b * c * slope_y[..., 1]
        b_grad = b_grad + c * at_y[..., 1]
        c_grad = None if setting.straight else b * at_y[..., 1]
    if d:
        y_grad = y_grad + (values_grad * slope_y[..., first:]).sum(-1)
    # points, targets and epsilon^(1 / power) in another unit: the same plan
    scaled = ((x - x[:, :1]) * x_grad).sum(-1, keepdim=True) + ((y - x[:, :1]) * y_grad).sum(-1, keepdim=True)
    epsilon_grad = scaled / (-setting.power * epsilon)
    return x_grad, a_grad, y_grad, b_grad, c_grad, v_grad, epsilon_grad


def _laplacian_solve(weight: Tensor, e: Tensor, mass: Tensor) -> Tensor:
    """w with (diag(weight 1) - weight) w = e for e of sum 0, up to a constant.

    The diagonal is summed from the others, which cancels nothing where the plan is nearly hard. The constant is made
    regular by a rank-one term, and blocks of targets that float64 cannot tell from decoupled ones by a ridge.

    Args:
        weight: (rows, q, q), symmetric; its diagonal does not matter.
        e: (rows, q, 1).
        mass: (rows or 1, q, 1), what rows of weight sum to, roughly; 0 at nodes that stand for nothing.
    """
    weight.diagonal(dim1=-2, dim2=-1).zero_()
    size = mass.abs()
    alone = size == 0
    unit = torch.where(alone, 1.0, size).rsqrt()
    constant = size.sqrt()  # sum of squares about 1
    matrix = constant * constant.mT - weight * unit * unit.mT
    diagonal = weight.sum(-1, keepdim=True) * unit * unit + torch.where(alone, 1.0, RIDGE)
    matrix.diagonal(dim1=-2, dim2=-1).add_(diagonal.squeeze(-1))
    found: Tensor = torch.linalg.solve_ex(matrix, unit * e)[0]
    return unit * found


RIDGE = 1e-14
"""Relative to a target's mass: what must cross between blocks of targets for them to be coupled."""


def _columns(*columns: Tensor) -> Tensor:
    rows = max(t.shape[0] for t in columns)
    return torch.cat([t.expand(rows, -1, -1) for t in columns], -1)


def _dense(given: _Inputs, setting: Setting) -> tuple[Tensor, Tensor]:
    """The same with the whole plan in plain torch: two Newton steps with a frozen matrix carry two derivatives."""
    x, a, y, b, c, v, epsilon = given
    rows, n, m = *x.shape, y.shape[1]
    if rows * n * m > moments.LARGEST:
        raise RuntimeError(
            f"second derivatives: expected at most {moments.LARGEST} pairs of a point and a target, got {rows} x {n} x "
            f"{m}. They need the whole plan: differentiate fewer or shorter rows twice, or use num_targets=."
        )
    with torch.no_grad():
        solution = moments.solve_exactly(given.problem(setting))
        k = solution.kernel
        matrix = b.unsqueeze(-2) - k.mT @ (a.unsqueeze(-1) * k * b.unsqueeze(-2))
        matrix.diagonal(dim1=-2, dim2=-1).add_(1)
        factor = torch.linalg.lu_factor_ex(matrix)[:2]
        gamma = solution.gamma
    apart = x.unsqueeze(-1) - y.unsqueeze(-2)
    cost = apart.square() if setting.power == 2 else apart.abs().pow(setting.power)
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
    if setting.straight:
        c = torch.lerp(c[:, :1], c[:, 1:], y)
    if c.shape[1]:
        density = (exponent + (gamma.unsqueeze(-2) - over_y.unsqueeze(-1))).exp()
        ranks = (density @ (b * c).unsqueeze(-1)).squeeze(-1)
    density = (exponent - over_y.unsqueeze(-1) - over_x.unsqueeze(-2)).exp()
    values = density.mT @ (a.unsqueeze(-1) * v.reshape(rows, n, v.shape[1] // n))
    return ranks, values.reshape(rows, values.shape[1] * values.shape[2])


def _log_sum(z: Tensor, weight: Tensor, dim: int) -> Tensor:
    most = z.detach().amax(dim, keepdim=True)
    total = ((z - most).exp() * weight).sum(dim, keepdim=True)
    return (most + total.log()).squeeze(dim)


class OrderCertificate(NamedTuple):
    r"""What is known of an ordering's plan, one number a row.

    Attributes:
        residual: (\*batch,) estimated L1 error of both marginals: exact marginals at a sample of entries and targets,
            under the potentials interpolated to all entries and targets.
        balance: (\*batch,) weighted mean error of the targets' log marginals between nodes, where Newton stopped.
        unresolved: (\*batch,) the most that a box of nodes leaves of a density, times its mass.
        steps: (\*batch,) Newton steps.
        nodes: (\*batch,) nodes of the entries plus nodes of the targets.
    """

    residual: Tensor
    balance: Tensor
    unresolved: Tensor
    steps: Tensor
    nodes: Tensor


def certify(
    x: Tensor,
    a: Tensor,
    y: Tensor,
    b: Tensor,
    epsilon: Tensor,
    power: float,
    dtype: torch.dtype,
    even: bool,
    samples: int,
) -> OrderCertificate:
    """The certificate of the plan that ``order`` works with, at the same arguments."""
    batch = x.shape[:-1]
    x, a, y, b, epsilon = _as_rows(*(t.detach() for t in (x, a, y, b, epsilon)))
    problem = Problem(x, a, y, b, epsilon, power, even)
    rows, out = len(x), [x.new_full((len(x),), torch.nan) for _ in range(5)]
    for group in moments.solve(problem, moments.ACCURACY[dtype]) if rows else ():
        part = problem if group.every else problem.rows(group.rows)
        nodes = torch.full_like(group.error, group.x.nodes.shape[-1] + group.y.nodes.shape[-1])
        found = (_residual(group, part, samples), group.error, group.unresolved, group.steps, nodes)
        for whole, value in zip(out, found, strict=True):
            whole[group.rows] = value.to(whole.dtype)
    return OrderCertificate(*(t.reshape(batch) for t in out))


def _residual(group: Solved, problem: Problem, samples: int) -> Tensor:
    """Mean error of the marginals of a sample, both sides together, (rows,)."""
    x, a, y, b, epsilon, power, _ = problem
    # in float64: a rounded potential would be another plan's
    at_x = group.x.interpolate(group.log_norm.unsqueeze(-1), double=True).squeeze(-1)
    at_y = group.y.interpolate(group.gamma.unsqueeze(-1), double=True).squeeze(-1)

    def error(
        mine: Tensor, shift: Tensor, mass: Tensor, other: Tensor, held: Tensor, weight: Tensor
    ) -> Tensor:
        # sampled evenly in mass: each stands for as much of it
        level = (torch.arange(samples, dtype=torch.float64, device=x.device) + 0.5) / samples
        upto = mass.cumsum(-1).contiguous()
        pick = torch.searchsorted(upto, (level * upto[:, -1:]).contiguous()).clamp(max=mine.shape[-1] - 1)
        total = torch.zeros_like(mine[:, 0])
        for one in range(samples):  # one at a time: memory stays linear
            here = pick[:, one : one + 1]
            apart = mine.gather(-1, here) - other
            logits = apart.abs().pow(power) / -epsilon + shift.gather(-1, here) + weight
            total += ((logits.exp() * held).sum(-1) - 1).abs()
        return total / samples

    return error(x, -at_x, a, y, b, at_y) + error(y, at_y, b, x, a, -at_x)


@torch.library.custom_op("couplings::order", mutates_args=())
def _forward_op(
    inputs: list[Tensor], power: float, single: bool, even: bool, straight: bool
) -> tuple[Tensor, Tensor]:
    return _forward(inputs, Setting(power, single, even, straight), _Memory())


@_forward_op.register_fake
def _(inputs: list[Tensor], power: float, single: bool, even: bool, straight: bool) -> tuple[Tensor, Tensor]:
    x, _, y, _, c, v, _ = inputs
    batch, n, m = x.shape[:-1], x.shape[-1], y.shape[-1]
    return (
        x.new_empty((*batch, n if c.shape[-1] else 0), dtype=torch.float32 if single else torch.float64),
        x.new_empty((*batch, m * (v.shape[-1] // n)), dtype=torch.float32 if single else torch.float64),
    )


@torch.library.custom_op("couplings::order_backward", mutates_args=())
def _backward_op(
    tensors: list[Tensor], power: float, single: bool, even: bool, straight: bool, masses: bool, targets: bool
) -> list[Tensor]:
    found = _pull_back(tensors, Setting(power, single, even, straight), masses, targets, _Memory())
    return [grad.to(t.dtype, copy=True) for grad, t in zip(found, tensors)]


@_backward_op.register_fake
def _(
    tensors: list[Tensor], power: float, single: bool, even: bool, straight: bool, masses: bool, targets: bool
) -> list[Tensor]:
    return [torch.empty_like(t) for t in tensors[:7]]


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
        even: bool,
        straight: bool,
        memory: _Memory,
    ) -> tuple[Tensor, Tensor]:
        inputs = [x, a, y, b, c, v, epsilon]
        if torch.compiler.is_compiling():
            return _forward_op(inputs, power, single, even, straight)  # type: ignore[no-any-return]
        return _forward(inputs, Setting(power, single, even, straight), memory)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:7])
        ctx.setting, ctx.memory = inputs[7:11], inputs[11]

    @staticmethod
    def backward(ctx: Any, ranks_grad: Tensor, values_grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad
        masses, targets = wanted[1] or wanted[5], any(wanted[place] for place in (2, 3, 4, 6))
        given = (*ctx.saved_tensors, ranks_grad, values_grad, *ctx.setting)
        grads = apply(_OrderGradient, *given, masses, targets, ctx.memory)
        return *(grad if need else None for grad, need in zip(grads, wanted)), *(None,) * 5


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
        ranks_grad: Tensor,
        values_grad: Tensor,
        power: float,
        single: bool,
        even: bool,
        straight: bool,
        masses: bool,
        targets: bool,
        memory: _Memory,
    ) -> tuple[Tensor, ...]:
        tensors = [x, a, y, b, c, v, epsilon, ranks_grad, values_grad]
        if torch.compiler.is_compiling():
            return tuple(_backward_op(tensors, power, single, even, straight, masses, targets))
        return _pull_back(tensors, Setting(power, single, even, straight), masses, targets, memory)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:9])
        ctx.power, ctx.straight = inputs[9], inputs[12]

    @staticmethod
    def backward(ctx: Any, *second: Tensor) -> tuple[Tensor | None, ...]:
        grads = apply(_SecondDerivative, *ctx.saved_tensors, *second, ctx.power, ctx.straight)
        return *grads, *(None,) * 7


class _SecondDerivative(RowFunction):
    """Of the gradient, with respect to the inputs and to the cotangents; the last one."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        """The seven inputs, the two cotangents, those of the seven gradients, power, straight."""
        tensors, power, straight = args[:16], args[16], args[17]
        flat = [t.detach().double().requires_grad_() for t in _as_rows(*tensors[:9])]
        second = [t.double() for t in _as_rows(*tensors[9:])]
        with torch.enable_grad():
            outputs = _dense(_Inputs(*flat[:7]), Setting(power, False, False, straight))
            asked = [place for place, out in enumerate(outputs) if out.requires_grad]
            first = torch.autograd.grad(
                [outputs[place] for place in asked],
                flat[:7],
                [flat[7 + place] for place in asked],
                create_graph=True,
                materialize_grads=True,
            )
            found = torch.autograd.grad(first, flat, second, materialize_grads=True)
        return tuple(grad.detach().reshape(t.shape) for grad, t in zip(found, tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *third: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "ordering: expected at most two derivatives, got a third. Differentiate twice at most."
        )
