"""Two targets: the plan is a threshold, A_i = sigmoid(scale (x_i - centre) + theta) with sum_i w_i A_i = mass.

One scalar root per row, by Newton on the log balance of the cut (README.md, "Two targets").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from couplings._rowwise import RowFunction, apply, by_rows, seen
from couplings._scale import mean_std

STEPS = 12
"""Most Newton steps; 3 in float32 and 4 in float64 are the most that any tested row needed."""


class HardCut(NamedTuple):
    """The plan at epsilon = 0: where the threshold falls, and which entries lie above it.

    Attributes:
        head: (*batch, t) indices of the t largest entries, in falling order; every entry outside lies below the cut.
        share: (*batch, t) the part of each head entry that lies above the cut (1 but for the entry that it splits).
        centre: (*batch, 1) a value in the gap that the cut falls into.
        edge: (*batch, 1) the last entry of the head, if no entry is split: ``centre`` is then the first entry below.
    """

    head: Tensor
    share: Tensor
    centre: Tensor
    edge: Tensor | None = None


def midpoint(above: Tensor, below: Tensor) -> Tensor:
    """A value between two neighbours; the other one where one of them is infinite (masked)."""
    middle = below + (above - below) * 0.5
    return torch.where(below.isinf(), above, middle)


def hard_cut(
    x: Tensor, mass: int | Tensor, weights: Tensor | None, mask: Tensor | None, stable: bool = False
) -> HardCut:
    """The largest entries of each row up to ``mass``.

    Args:
        x: (*batch, n), finite where masked.
        mass: an int in [1, n] (entries), or a tensor (*batch, 1) (total weight above the cut).
        weights: (*batch, n) or None.
        mask: (*batch, n) bool or None.
        stable: whether ties go to the first index, as in a stable sort (where the hard answer itself is wanted).
    """
    x = x.detach()
    if mask is not None:
        x = x.masked_fill(~mask, -math.inf)
    n = x.shape[-1]
    if isinstance(mass, int) and weights is None:
        if stable:
            value, head = torch.sort(x, dim=-1, descending=True, stable=True)
            value, head = value[..., : mass + 1], head[..., : mass + 1]
        else:
            value, head = x.topk(min(mass + 1, n), dim=-1)
        head, last, following = head[..., :mass], value[..., mass - 1 : mass], value[..., mass:]
        share = torch.ones_like(head, dtype=x.dtype)
        if mass == n:
            following = last
        if mask is not None:
            share = share.masked_fill(value[..., :mass].isinf(), 0)
            last = last.masked_fill(last.isinf(), 0)
            following = torch.where(following.isinf(), last, following)
        return HardCut(head, share, following, last if mass < n else None)
    value, head = torch.sort(x, dim=-1, descending=True, stable=True)
    weight = torch.ones_like(value) if weights is None else weights.detach().gather(-1, head)
    if mask is not None:
        weight = weight.masked_fill(~mask.gather(-1, head), 0)
    mass = torch.as_tensor(mass, dtype=torch.float64, device=x.device).detach()
    upto = weight.double().cumsum(-1)
    before = upto - weight
    share = ((mass - before) / torch.where(weight > 0, weight.double(), 1.0)).clamp(0, 1).to(x.dtype)
    share = torch.where(weight > 0, share, (before < mass).to(x.dtype))
    cut = (upto < mass).sum(-1, keepdim=True).clamp(max=n - 1)
    last, following = value.gather(-1, cut), value.gather(-1, (cut + 1).clamp(max=n - 1))
    split = share.gather(-1, cut) < 1
    centre = torch.where(split, last, midpoint(last, following))
    return HardCut(head, share, centre.masked_fill(centre.isinf(), 0))


def soft_threshold(
    x: Tensor,
    scale: Tensor,
    mass: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    cut: HardCut,
    spread: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A = sigmoid(scale (x - centre) + theta), theta such that sum_i w_i A_i equals the mass above the cut.

    Args:
        x: (*batch, n), float32 or float64, finite where masked.
        scale: (*batch, 1), 2 / epsilon in units of x.
        mass: (*batch, 1), total weight to place above the cut, where its gradient is wanted; it must be the one that
            ``cut`` was made with.
        weights: (*batch, n), non-negative, or None.
        mask: (*batch, n) bool, True = valid, or None.
        cut: from ``hard_cut``.
        spread: mean and standard deviation of each row, (*batch, 1), if ``scale`` is a constant over the latter and
            there are no weights: the gradient then reaches x in one go instead of through ``scale``.

    Returns:
        A, (*batch, n) in [0, 1], exactly 0 where masked; differentiable to any order in x, scale, mass and weights.
    """
    mean, std = spread or (None, None)
    if mean is not None and std is not None:  # the backward knows what they are: autograd need not visit them
        scale, mean, std = scale.detach(), mean.detach(), std.detach()
    plan: Tensor = apply(_SoftThreshold, x, scale, mass, weights, mask, *cut, mean, std)[0]
    return plan


def _solve(
    x: Tensor,
    scale: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    head: Tensor,
    share: Tensor,
    centre: Tensor,
    edge: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The plan A and A (1 - A), each to full relative precision from the smaller of A and 1 - A."""
    # powers of two are the fast exponential on a CPU (exp: 3x slower)
    bits = scale * math.log2(math.e)
    if edge is not None and weights is None:
        plan, variance = _solve_apart(x, bits, mask, head, share, centre, edge)
        if mask is None:
            return plan, variance
        none = (share == 0).all(-1, keepdim=True)
        fills = mask.sum(-1, keepdim=True) <= head.shape[-1]
    else:
        weight = None if weights is None else weights.gather(-1, head)
        if mask is not None:
            valid = mask.gather(-1, head).to(x.dtype)
            weight = valid if weight is None else weight * valid
        above = share if weight is None else share * weight
        below = 1 - share if weight is None else (1 - share) * weight
        a, variance = _solve_split((x.gather(-1, head) - centre).mul_(bits), above, below)
        plan = torch.empty_like(x).scatter_(-1, head, a)
        variance = torch.empty_like(x).scatter_(-1, head, variance)
        none = (above == 0).all(-1, keepdim=True)
        fills = (below == 0).all(-1, keepdim=True)
    # a row with nothing below the cut takes all, one with nothing above it takes none
    taken = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    every = fills & ~none
    if seen(every | none) is not False:
        link = 0 * x.amax(
            -1, keepdim=True
        )  # such a row does not look at its scores: NaN among them must show
        plan = torch.where(every, 1 + link, plan)
        plan = torch.where(none, link, plan)
    plan = plan.masked_fill_(~taken, 0)
    return plan, variance.masked_fill_(every | none | ~taken, 0)


def _solve_apart(
    x: Tensor, bits: Tensor, mask: Tensor | None, head: Tensor, share: Tensor, centre: Tensor, edge: Tensor
) -> tuple[Tensor, Tensor]:
    """No entry is split: a sum over the row makes a pass, and the few entries of the head are worked out apart.

    On either side powers of two are counted from the entry next to the cut, whose own is 1.
    """
    low = 0.4 * math.log2(torch.finfo(x.dtype).tiny)  # squares of what is not cut to 0 are no denormals
    far = torch.threshold_((edge - x.gather(-1, head)).mul_(bits), low, -math.inf).exp2_()
    power = (x - centre).mul_(bits)
    torch.threshold_(power, low, -math.inf).exp2_().scatter_(-1, head, torch.zeros_like(far))
    if mask is not None:
        far.mul_(share)
        power.masked_fill_(~mask, 0)
    plan = torch.empty_like(power)
    gap = (edge - centre).mul_(bits).clamp_(max=1e4)  # as good as infinite, but its halves subtract

    def sides(shift: Tensor) -> tuple[Tensor, ...]:
        torch.div(power, torch.add(power, shift.exp2(), out=plan), out=plan)
        b = far / (far + (gap - shift).exp2_())
        down, up = plan.sum(-1, keepdim=True), b.sum(-1, keepdim=True)
        down_square = torch.linalg.vector_norm(plan, dim=-1, keepdim=True).square_()
        return up, torch.linalg.vector_norm(b, dim=-1, keepdim=True).square_(), down, down_square

    start = _evenly_spaced(far.sum(-1, keepdim=True), power.sum(-1, keepdim=True))
    shift = _root(start.add_(gap, alpha=0.5), sides)
    torch.div(power, torch.add(power, shift.exp2(), out=plan), out=plan)
    variance = torch.addcmul(plan, plan, plan, value=-1, out=power)
    odds = far.div_((gap - shift).exp2_())
    a = (odds + 1).reciprocal_()
    return plan.scatter_(-1, head, a), variance.scatter_(-1, head, odds.mul_(a).mul_(a))


def _solve_split(z: Tensor, above: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """Each entry's weight is split by the cut, ``above`` and ``below``; z = 0 is at the cut."""
    # a product with a gradient must not be denormal
    low = math.log2(torch.finfo(z.dtype).tiny) + 20
    far, upper = z.abs().neg_().clamp_(min=low).exp2_(), z >= 0

    def both(shift: Tensor) -> tuple[Tensor, Tensor]:
        inverse = shift.neg().exp2_()  # A and 1 - A, from the exponential that does not overflow
        gain, loss = torch.where(upper, inverse, far * inverse), torch.where(upper, far, 1.0)
        total = gain + loss
        return gain / total, loss / total

    def sides(shift: Tensor) -> tuple[Tensor, ...]:
        a, b = both(shift)
        fallen, risen = above * b, below * a
        return tuple(part.sum(-1, keepdim=True) for part in (fallen, fallen * b, risen, risen * a))

    floor = _floor(z.dtype)  # where the weights are 0
    up, down = ((part * far).sum(-1, keepdim=True).add_(floor) for part in (above, below))
    a, b = both(_root(_evenly_spaced(up, down), sides))
    return torch.threshold_(a, 4 * 2.0**low, 0.0), a * b


def _evenly_spaced(up: Tensor, down: Tensor) -> Tensor:
    """The root of evenly spaced entries, from the sums of exp(-|z|) above and below the cut.

    U and D would be these sums times log(1 + exp(-+theta)).
    """
    return torch.log2(down / up).mul_(math.log(2))


def _floor(dtype: torch.dtype) -> float:
    """Masses as small as this need no balance."""
    return torch.finfo(dtype).tiny * 2.0**30


def _root(shift: Tensor, sides: Callable[[Tensor], tuple[Tensor, ...]]) -> Tensor:
    """-theta / log 2 where the mass that falls equals the mass that rises, by Newton on their log ratio.

    Args:
        shift: where to start, (*batch, 1).
        sides: maps -theta / log 2 to the mass U that falls, the sum of w (1 - A)^2 over it, the mass D that rises, and
            the sum of w A^2 over it.
    """
    floor, two = _floor(shift.dtype), torch.full_like(shift, 2.0)
    tolerance = (5e-3 if shift.dtype == torch.float32 else 1e-7) / math.log(2)
    look = shift.device.type == "cpu"
    live: Tensor | None = None
    for _ in range(STEPS):
        up, up_square, down, down_square = sides(shift)
        up, down = up.add_(floor), down.add_(floor)
        # dG/dtheta in [1, 2]: how far each side is from saturation, weighted by its mass
        slope = torch.addcdiv(two, up_square, up, value=-1).addcdiv_(down_square, down, value=-1)
        balance = down.div_(up).log2_()
        moving = balance.abs() > tolerance  # the step after |log D/U| <= tolerance is the row's last
        step = balance.div_(slope).clamp_(-24, 24)
        if live is None:
            shift, live = shift + step, moving
        else:
            shift = torch.where(live, shift + step, shift)
            live &= moving
        if look and not bool(live.any()):
            break
    return shift


_solve_op = torch.library.custom_op("couplings::soft_threshold", _solve, mutates_args=())


@_solve_op.register_fake
def _(x: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _pull_back(
    x: Tensor,
    scale: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    centre: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    plan: Tensor,
    variance: Tensor,
    plan_grad: Tensor | None,
    variance_grad: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients with respect to x, scale, mass and weights (README.md, "Two targets")."""
    if variance_grad is not None:
        through = variance_grad * (1 - 2 * plan)
        plan_grad = through if plan_grad is None else plan_grad + through
    if plan_grad is None:
        return (None,) * 4
    pulled = variance * plan_grad
    pull = pulled.sum(-1, keepdim=True)
    curvature = (variance if weights is None else variance * weights).sum(-1, keepdim=True)
    price = pull / curvature.clamp_min(torch.finfo(x.dtype).tiny)
    # if nothing records, temporaries are reused: fresh memory costs more than arithmetic
    recording = torch.is_grad_enabled()
    times, less = (Tensor.mul, Tensor.addcmul) if recording else (Tensor.mul_, Tensor.addcmul_)
    logit_grad = less(pulled, variance, price if weights is None else price * weights, value=-1)
    if mean is None or std is None:
        # logit_grad sums to 0 over a row, so any centre serves for the scale; the cut's own cancels least
        scale_grad = ((x - centre) * logit_grad).sum(-1, keepdim=True)
        return times(logit_grad, scale), scale_grad, price, None if weights is None else -price * plan
    count: int | Tensor = x.shape[-1]
    if mask is not None:
        count = mask.sum(-1, keepdim=True).clamp_min(1)
    deviation = x - mean
    if mask is not None:
        deviation = deviation.masked_fill(~mask, 0)
    part = (deviation * logit_grad).sum(-1, keepdim=True) / (count * std * std)
    return times(less(logit_grad, deviation, part, value=-1), scale), None, price, None


class _SoftThreshold(RowFunction):
    @staticmethod
    def forward(
        x: Tensor,
        scale: Tensor,
        mass: Tensor | None,
        weights: Tensor | None,
        mask: Tensor | None,
        head: Tensor,
        share: Tensor,
        centre: Tensor,
        edge: Tensor | None,
        mean: Tensor | None,
        std: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        solve = _solve_op if torch.compiler.is_compiling() else _solve
        return by_rows(solve, x, scale, weights, mask, head, share, centre, edge)  # type: ignore[return-value]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, scale, _, weights, mask, _, _, centre, _, mean, std = inputs
        ctx.save_for_backward(x, scale, weights, mask, centre, mean, std, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, plan_grad: Tensor | None, variance_grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Differentiable in the outputs themselves, hence to any order."""
        x, scale, weights, mask, centre, mean, std, plan, variance = ctx.saved_tensors
        if (
            std is not None and torch.is_grad_enabled()
        ):  # a derivative of this one follows x through the scale, too
            numerator = scale * std
            mean, std = mean_std(x, None, mask)
            scale = numerator / std
        grads = by_rows(
            _pull_back, x, scale, weights, mask, centre, mean, std, plan, variance, plan_grad, variance_grad
        )
        return *(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad)), *[None] * 7
