"""Two targets: the plan is a threshold, A_i = sigmoid(scale (x_i - centre) + theta) with sum_i w_i A_i = mass.

One scalar root per row, by Newton on the log balance of the cut (README.md, "Two targets").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from couplings._rowwise import RowFunction, apply, by_rows
from couplings._scale import mean_std

STEPS = 12
"""Most Newton steps; 3 in float32 and 4 in float64 are the most that any tested row needed."""


class HardCut(NamedTuple):
    """The plan at epsilon = 0: where the threshold falls, and which entries lie above it.

    Attributes:
        head: (*batch, t) indices of the t largest entries, in falling order; every entry outside lies below the cut.
        share: (*batch, t) the part of each head entry that lies above the cut (1 but for the entry that it splits).
        centre: (*batch, 1) a value in the gap that the cut falls into.
    """

    head: Tensor
    share: Tensor
    centre: Tensor


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
        if mask is None:
            centre = (
                following + (last - following) * 0.5 if mass < n else last
            )  # as midpoint has it, bit for bit
        else:
            centre = midpoint(last, following) if mass < n else last
            share = share.masked_fill(value[..., :mass].isinf(), 0)
            centre = centre.masked_fill(centre.isinf(), 0)
        return HardCut(head, share, centre)
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
) -> tuple[Tensor, Tensor]:
    """The plan A and A (1 - A), each to full relative precision from the smaller of A and 1 - A."""
    # powers of two are the fast exponential on a CPU (exp: 3x slower)
    low = _lowest(x.dtype)
    bits = scale * math.log2(math.e)
    z_head = (x.gather(-1, head) - centre).mul_(bits)
    weight = None if weights is None else weights.gather(-1, head)
    if mask is not None:
        valid = mask.gather(-1, head).to(x.dtype)
        weight = valid if weight is None else weight * valid
    # exp(-|z|) once; a pass is then an addition, a division and two sums on either side of the cut
    far = z_head.abs().neg_().clamp_(min=low).exp2_()
    above = share if weight is None else share * weight
    if head.shape[-1] == x.shape[-1]:
        below = 1 - share if weight is None else (1 - share) * weight
        a, b = _solve_all(far, z_head >= 0, above, below)
        plan = torch.empty_like(x).scatter_(-1, head, a)
        variance = torch.empty_like(x).scatter_(-1, head, a * b)
    else:
        power = (x - centre).mul_(bits)
        torch.threshold_(power, low, -math.inf).exp2_().scatter_(-1, head, torch.zeros_like(far))
        if mask is not None:
            power.masked_fill_(~mask, 0)
        plan, variance = _solve_head(power, far, weight, head)
        if mask is None:
            return plan, variance
        below = None
    # a row with nothing below the cut takes all, one with nothing above it takes none
    taken = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    none = (above == 0).all(-1, keepdim=True)
    fills = (
        taken.sum(-1, keepdim=True) <= head.shape[-1] if below is None else (below == 0).all(-1, keepdim=True)
    )
    every = fills & ~none
    plan = torch.where(every, torch.ones_like(plan), plan)
    plan = torch.where(none, torch.zeros_like(plan), plan).masked_fill_(~taken, 0)
    return plan, variance.masked_fill_(every | none | ~taken, 0)


def _lowest(dtype: torch.dtype) -> float:
    """Powers of two below this one count as 0: a product with a gradient must not be denormal."""
    return math.log2(torch.finfo(dtype).tiny) + 20


def _solve_head(power: Tensor, far: Tensor, weight: Tensor | None, head: Tensor) -> tuple[Tensor, Tensor]:
    """``head`` lies above the cut, all else below: ``power`` = exp(z) of the latter (0 in the head); overwritten.

    A sum over the row makes a pass; the few entries of the head are worked out apart.
    """
    plan = torch.empty_like(power)
    least = 2 * torch.finfo(power.dtype).tiny ** 0.5  # its square is no denormal

    def fill(ratio: Tensor) -> None:
        torch.div(power, torch.add(power, ratio, out=plan), out=plan)

    def sides(ratio: Tensor) -> tuple[Tensor, ...]:
        fill(ratio)
        down = plan.sum(-1, keepdim=True)
        down_square = torch.linalg.vector_norm(plan.clamp_(min=least), dim=-1, keepdim=True).square_()
        b = far / (far + ratio.reciprocal())
        fallen = b if weight is None else b * weight
        return fallen.sum(-1, keepdim=True), (fallen * b).sum(-1, keepdim=True), down, down_square

    fallen = far if weight is None else far * weight
    ratio = _root(fallen.sum(-1, keepdim=True), power.sum(-1, keepdim=True), sides)
    fill(ratio)
    variance = torch.sub(1, plan, out=power).mul_(plan)
    inverse = ratio.reciprocal()
    both = far + inverse
    a, b = inverse / both, far / both
    return plan.scatter_(-1, head, a), variance.scatter_(-1, head, a * b)


def _solve_all(far: Tensor, upper: Tensor, above: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """A and 1 - A where each entry's weight is split by the cut, ``above`` and ``below``; z >= 0 in ``upper``."""

    def both(ratio: Tensor) -> tuple[Tensor, Tensor]:
        inverse = ratio.reciprocal()  # A and 1 - A, from the exponential that does not overflow
        gain, loss = torch.where(upper, inverse, far * inverse), torch.where(upper, far, 1.0)
        total = gain + loss
        return gain / total, loss / total

    def sides(ratio: Tensor) -> tuple[Tensor, ...]:
        a, b = both(ratio)
        fallen, risen = above * b, below * a
        return tuple(part.sum(-1, keepdim=True) for part in (fallen, fallen * b, risen, risen * a))

    a, b = both(_root((above * far).sum(-1, keepdim=True), (below * far).sum(-1, keepdim=True), sides))
    return torch.threshold_(a, 4 * 2.0 ** _lowest(far.dtype), 0.0), b


def _root(up: Tensor, down: Tensor, sides: Callable[[Tensor], tuple[Tensor, ...]]) -> Tensor:
    """exp(-theta) where the mass that falls equals the mass that rises, by Newton on their log ratio.

    Args:
        up: sum of exp(-|z|) over the entries above the cut, (*batch, 1).
        down: the same over the entries below it.
        sides: maps exp(-theta) to the mass U that falls, the sum of w (1 - A)^2 over it, the mass D that rises, and the
            sum of w A^2 over it.
    """
    floor = 2.0 ** _lowest(up.dtype)
    tolerance, still = (5e-3 if up.dtype == torch.float32 else 1e-7), 1e3 * floor
    look = up.device.type == "cpu"
    # were the entries evenly spaced, U and D would be these sums times log(1 + exp(-+theta))
    shift = torch.log((down + floor) / (up + floor)).mul_(math.log(2))
    two = torch.full_like(shift, 2.0)
    live: Tensor | None = None
    for _ in range(STEPS):
        up, up_square, down, down_square = sides(shift.exp())
        up, down = up.add_(floor), down.add_(floor)
        # dG/dtheta in (0, 2]: how far each side is from saturation, weighted by its mass
        slope = torch.addcdiv(two, up_square, up, value=-1).addcdiv_(down_square, down, value=-1)
        step = torch.log(down / up).div_(slope.clamp_min_(1e-3)).clamp_(-16, 16)
        # the step after log D/U <= tolerance is the row's last; masses as small as still need none
        moving = (down - up).abs_() > (up * tolerance).add_(still)
        if live is None:
            shift, live = shift + step, moving
        else:
            shift = torch.where(live, shift + step, shift)
            live &= moving
        if look and not bool(live.any()):
            break
    return shift.exp_()


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
    pull = (variance * plan_grad).sum(-1, keepdim=True)
    curvature = (variance if weights is None else variance * weights).sum(-1, keepdim=True)
    price = pull / curvature.clamp_min(torch.finfo(x.dtype).tiny)
    # if nothing records, temporaries are reused: fresh memory costs more than arithmetic
    recording = torch.is_grad_enabled()
    times = Tensor.mul if recording else Tensor.mul_
    logit_grad = times(plan_grad - (price if weights is None else price * weights), variance)
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
    x_grad = (Tensor.addcmul if recording else Tensor.addcmul_)(logit_grad, deviation, part, value=-1)
    return times(x_grad, scale), None, price, None


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
        mean: Tensor | None,
        std: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        solve = _solve_op if torch.compiler.is_compiling() else _solve
        return by_rows(solve, x, scale, weights, mask, head, share, centre)  # type: ignore[return-value]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, scale, _, weights, mask, _, _, centre, mean, std = inputs
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
        return *(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False)), *[
            None
        ] * 6
