"""Two targets: the plan is a threshold, A_i = sigmoid(scale (x_i - centre) + theta) with sum_i w_i A_i = mass.

One scalar root per row, by Newton on the log balance of the cut (README.md, "Two targets").
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from couplings._rowwise import RowFunction, apply, by_rows

STEPS = 12
"""Most Newton steps; 6 is the most that any tested row needed."""


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
        centre = midpoint(last, following) if mass < n else last
        share = torch.ones_like(value[..., :mass])
        if mask is not None:
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
    plan: Tensor = apply(_SoftThreshold, x, scale, mass, weights, mask, *cut, *(spread or (None, None)))[0]
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
    # powers of two are the fast exponential on a CPU (exp: 3x slower); products with a gradient must not be denormal
    info = torch.finfo(x.dtype)
    low = math.log2(info.tiny) + 20
    least, floor = 2 * info.tiny**0.5, 2.0**low
    tolerance = 1e-3 if x.dtype == torch.float32 else 1e-7
    whole = (
        head.shape[-1] == x.shape[-1]
    )  # no entry outside the head, which may then lie on both sides of the cut

    bits = scale * math.log2(math.e)
    z_head = (x.gather(-1, head) - centre).mul_(bits)
    weight = None if weights is None else weights.gather(-1, head)
    if mask is not None:
        valid = mask.gather(-1, head).to(x.dtype)
        weight = valid if weight is None else weight * valid
    # exp(-|z|) once; a pass is then an addition, a division and two sums on either side of the cut
    far = z_head.abs().neg_().clamp_(min=low).exp2_()
    above = share if weight is None else share * weight
    if whole:
        upper = z_head >= 0
        below = 1 - share if weight is None else (1 - share) * weight
    else:
        power = (x - centre).mul_(bits).clamp_(low, 0).exp2_().scatter_(-1, head, 0.0)
        torch.threshold_(power, 1.01 * floor, 0.0)
        if mask is not None:
            power.masked_fill_(~mask, 0)
        plan = torch.empty_like(x)
    shift = torch.zeros_like(centre)  # -theta
    live = torch.ones_like(centre, dtype=torch.bool)
    look = x.device.type == "cpu"
    for step_number in range(STEPS + 1):
        ratio = shift.exp()
        inverse = ratio.reciprocal()
        if whole:
            # A and 1 - A, from the exponential that does not overflow
            gain, loss = torch.where(upper, inverse, far * inverse), torch.where(upper, far, 1.0)
            both = gain + loss
            a, b = gain / both, loss / both
        else:
            b = far / (far + inverse)
            torch.add(power, ratio, out=plan)
            torch.div(power, plan, out=plan)
        if step_number == STEPS or (look and step_number > 1 and not bool(live.any())):
            break
        # slope = dG/dtheta in (0, 2]: how far each side is from saturation, weighted by its mass
        if whole:
            fallen, risen = above * b, below * a
            up, down = fallen.sum(-1, keepdim=True).add_(floor), risen.sum(-1, keepdim=True).add_(floor)
            slope = (fallen * a).sum(-1, keepdim=True) / up + (risen * b).sum(-1, keepdim=True) / down
        else:
            fallen = b if weight is None else above * b
            up, down = fallen.sum(-1, keepdim=True).add_(floor), plan.sum(-1, keepdim=True).add_(floor)
            inside = torch.linalg.vector_norm(fallen, dim=-1, keepdim=True)
            outside = torch.linalg.vector_norm(plan.clamp_(min=least), dim=-1, keepdim=True)
            slope = 2 - inside * inside / up - outside * outside / down
        balance = torch.log(down / up)
        step = (balance / slope.clamp_min_(1e-3)).clamp_(-16, 16)
        shift = torch.where(live, shift + step, shift)
        live &= (balance.abs() > tolerance) & (down + up > 1e3 * floor)  # below that, nothing moves
    if whole:
        torch.threshold_(a, 4 * floor, 0.0)
        plan, variance = (
            torch.empty_like(x).scatter_(-1, head, a),
            torch.empty_like(x).scatter_(-1, head, a * b),
        )
    else:
        variance = torch.sub(1, plan, out=power).mul_(plan)
        a = inverse / (far + inverse)
        plan.scatter_(-1, head, a)
        variance.scatter_(-1, head, a * b)
    if whole or mask is not None:
        # a row with nothing below the cut takes all, one with nothing above it takes none
        taken = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        none = (above == 0).all(-1, keepdim=True)
        if whole:
            every = (below == 0).all(-1, keepdim=True) & ~none
        else:
            every = (taken.sum(-1, keepdim=True) <= head.shape[-1]) & ~none
        plan = torch.where(every, torch.ones_like(plan), plan)
        plan = torch.where(none, torch.zeros_like(plan), plan).masked_fill_(~taken, 0)
        variance = variance.masked_fill_(every | none | ~taken, 0)
    return plan, variance


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
    recording = (
        torch.is_grad_enabled()
    )  # if not, temporaries are reused: fresh memory costs more than arithmetic
    times = Tensor.mul if recording else Tensor.mul_
    pull = (variance * plan_grad).sum(-1, keepdim=True)
    curvature = (variance if weights is None else variance * weights).sum(-1, keepdim=True)
    price = pull / curvature.clamp_min(torch.finfo(x.dtype).tiny)
    logit_grad = times(plan_grad - (price if weights is None else price * weights), variance)
    # logit_grad sums to 0 over a row, so any centre serves for the scale; the cut's own cancels least
    offset = x - centre
    scale_grad = (offset * logit_grad).sum(-1, keepdim=True)
    x_grad = times(logit_grad, scale)
    if mean is None or std is None:
        return x_grad, scale_grad, price, None if weights is None else -price * plan
    deviation = (Tensor.add if recording else Tensor.add_)(offset, centre - mean)
    count: int | Tensor = x.shape[-1]
    if mask is not None:
        deviation = deviation.masked_fill(~mask, 0)
        count = mask.sum(-1, keepdim=True).clamp_min(1)
    part = scale_grad * scale / (count * std * std)
    return (
        (Tensor.addcmul if recording else Tensor.addcmul_)(x_grad, deviation, part, value=-1),
        None,
        price,
        None,
    )


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
        grads = by_rows(_pull_back, *ctx.saved_tensors, plan_grad, variance_grad)
        return *(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False)), *[
            None
        ] * 6
