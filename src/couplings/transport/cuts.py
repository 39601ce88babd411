"""Sorted targets: one unknown per cut between neighbouring targets, Newton on the log balances of all cuts at once.

Points x_i, targets y_0 < .. < y_k, cost (x - y)^2. The conditional plan pi_j(i) = P(target j | point i) follows from

    d_j(i) = log pi_j(i) / pi_(j-1)(i) = scale (y_j - y_(j-1)) (x_i - centre_j) + theta_j,    j = 1..k

(README.md, "Sorted targets"). The points nearest the cuts (the head) are worked out cut by cut in float64; all others
lie above every cut, share one exponential per target, and cost two matrix products per Newton step.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from couplings._rowwise import BLOCK, RowFunction, apply
from couplings.transport.threshold import midpoint

PASSES = 24
"""Most evaluations; 10 is the most that any tested row needed."""

IMPOSSIBLE = 1e5
"""Log odds whose exponential is 0 in float64, and which no sum of them makes infinite."""

MANY = 16
"""More cuts than this are solved in float64: the mass at a target is a difference between cuts whose errors add up."""


class HardCuts(NamedTuple):
    """The plan at epsilon = 0.

    Attributes:
        head: (*batch, t) indices of the t smallest points, rising; every other point lies above all cuts.
        share: (*batch, k, t) part of each head point's mass that lies above cut j.
        centre: (*batch, k) a value in the gap that cut j falls into.
        edge: (*batch, 1) the smallest point outside the head (any value where there is none).
        active: (*batch, k) bool, False for a cut with no mass above it: its target gets none.
    """

    head: Tensor
    share: Tensor
    centre: Tensor
    edge: Tensor
    active: Tensor


def hard_cuts(x: Tensor, cuts: int, mask: Tensor | None) -> HardCuts:
    """Cuts after the 1st, 2nd, .., ``cuts``-th smallest point of each row.

    Args:
        x: (*batch, n), finite where masked.
        cuts: their number, in [0, n - 1].
        mask: (*batch, n) bool or None.
    """
    x = x.detach()
    if mask is not None:
        x = x.masked_fill(~mask, math.inf)
    value, index = x.topk(cuts + 1, dim=-1, largest=False)
    below, above = value[..., :-1], value[..., 1:]
    centre = midpoint(below, above)
    rank = torch.arange(cuts, device=x.device)
    share = (rank > rank.unsqueeze(-1)).to(x.dtype).expand(*x.shape[:-1], cuts, cuts)
    active = ~torch.isposinf(above)
    return HardCuts(
        index[..., :-1],
        share,
        centre.masked_fill(torch.isposinf(centre), 0),
        value[..., -1:].masked_fill(torch.isposinf(value[..., -1:]), 0),
        active,
    )


def hard_cuts_weighted(x: Tensor, upto: Tensor, weights: Tensor) -> HardCuts:
    """Cuts after the cumulative weights ``upto`` (*batch, k), rising; weights (*batch, n) are 0 where masked."""
    x, weights, upto = x.detach(), weights.detach().double(), upto.detach().double()
    key = x.masked_fill(weights == 0, math.inf)
    value, head = torch.sort(key, dim=-1, stable=True)
    n = value.shape[-1]
    weight = weights.gather(-1, head)
    total = weight.cumsum(-1)
    before = total - weight
    safe = torch.where(weight > 0, weight, 1.0)
    share = 1 - ((upto.unsqueeze(-1) - before.unsqueeze(-2)) / safe.unsqueeze(-2)).clamp(0, 1)
    at = (total.unsqueeze(-2) < upto.unsqueeze(-1)).sum(-1).clamp(max=n - 1)
    low, high = value.gather(-1, at), value.gather(-1, (at + 1).clamp(max=n - 1))
    split = share.gather(-1, at.unsqueeze(-1)).squeeze(-1) > 0
    centre = torch.where(split, low, midpoint(high, low).where(~high.isinf(), low))
    active = (share * weight.unsqueeze(-2)).sum(-1) > 0
    centre = centre.masked_fill(centre.isinf(), 0)
    return HardCuts(head, share.to(x.dtype), centre, x.new_zeros((*x.shape[:-1], 1)), active)


def sorted_plan(
    x: Tensor,
    scale: Tensor,
    gaps: Tensor,
    upto: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    cuts: HardCuts,
) -> tuple[Tensor, Tensor]:
    """The conditional plan between the points and k + 1 sorted targets.

    Args:
        x: (*batch, n), float32 or float64, finite where masked.
        scale: (*batch, 1), 2 / epsilon in units of x.
        gaps: (*batch, k), y_j - y_(j-1) > 0.
        upto: (*batch, k), the weight below each cut, where its gradient is wanted; the one ``cuts`` was made with.
        weights: (*batch, n), non-negative, or None.
        mask: (*batch, n) bool or None.
        cuts: from ``hard_cuts`` or ``hard_cuts_weighted``.

    Returns:
        pi, (*batch, k + 1, n): pi_j(i) = P(target j | point i), columns of valid points sum to 1, others are 0; and
        theta, (*batch, k), measured from the cuts' centres. Both are differentiable to any order in x, scale, gaps,
        upto and weights.
    """
    plan, theta = apply(_SortedPlan, x, scale, gaps, upto, weights, mask, *cuts)
    return plan, theta


def tails(pi: Tensor) -> tuple[Tensor, Tensor]:
    """P(J < j | i) and P(J >= j | i) for j = 1..k, each a sum of positive terms."""
    k = pi.shape[-2] - 1
    below = pi.new_ones(k, k + 1).tril()  # a product with zeros and ones is faster than a cumsum over rows
    return _each(below, pi) @ pi, _each(1 - below, pi) @ pi


def _each(matrix: Tensor, like: Tensor) -> Tensor:
    """One matrix for every row: the same product for a row whatever the batch."""
    return matrix.expand(*like.shape[:-2], *matrix.shape)


def _crossing(lo: Tensor, up: Tensor) -> Tensor:
    """sum_i lo_min(j,l)(i) up_max(j,l)(i), (.., k, k), for arrays (.., k, n)."""
    product = lo @ up.mT
    return product.triu() + product.triu(1).mT


def column_blocks(n: int, height: int, whole: bool = False) -> list[tuple[int, int]]:
    """Columns of an array (.., n) with ``height`` rows in all, in pieces (start, length) that stay in cache.

    They follow from the shape alone. Fresh memory costs more than arithmetic: 4 KiB of it take about a microsecond.
    """
    width = max(1, n) if whole else max(4096, BLOCK // max(1, height))
    return [(start, min(width, n - start)) for start in range(0, n, width)]


def _solve(
    x: Tensor,
    scale: Tensor,
    gaps: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    head: Tensor,
    share: Tensor,
    centre: Tensor,
    edge: Tensor,
    active: Tensor,
) -> tuple[Tensor, Tensor]:
    """pi, (*batch, k + 1, n), and theta, (*batch, k)."""
    batch, n, k, t = x.shape[:-1], x.shape[-1], centre.shape[-1], head.shape[-1]
    if k == 0:
        alone = 1 + 0 * x.unsqueeze(-2)
        return (alone if mask is None else alone.masked_fill(~mask.unsqueeze(-2), 0)), torch.empty_like(
            centre
        )
    rows = batch.numel()
    x, scale, gaps, centre, active = (
        tensor.reshape(rows, tensor.shape[-1]) for tensor in (x, scale, gaps, centre, active)
    )
    head, share = head.reshape(rows, t), share.reshape(rows, k, t).double()
    dtype = x.dtype
    if k > MANY or weights is not None:
        x, scale, gaps, centre, edge = (tensor.double() for tensor in (x, scale, gaps, centre, edge))
    info = torch.finfo(x.dtype)
    tolerance = 1e-3 if x.dtype == torch.float32 else 1e-9
    floor = 1e-200
    slopes = scale.double() * gaps.double()

    valid = None if mask is None else mask.reshape(rows, n)
    weight = x.new_ones((rows, t), dtype=torch.float64)
    if weights is not None:
        weight = weights.reshape(rows, n).gather(-1, head).double()
    if valid is not None:
        weight = weight * valid.gather(-1, head)
    above, below = share * weight.unsqueeze(1), (1 - share) * weight.unsqueeze(1)
    d_head = slopes.unsqueeze(-1) * (x.gather(-1, head).double().unsqueeze(1) - centre.double().unsqueeze(-1))
    d_head = d_head.masked_fill(~active.unsqueeze(-1), -IMPOSSIBLE)

    rest = t < n
    if rest:
        # P(J = l | i) / P(J = k | i) = power_l(i) exp(log_odds_l), log_odds_l the log odds at the edge; power in [0, 1]
        edge = edge.reshape(rows, 1)
        low = math.log2(info.tiny) / 2 + 2  # squares and products stay normal
        reach = gaps.flip(-1).cumsum(-1).flip(-1)  # y_k - y_l, l = 0..k-1
        distance = (x - edge).mul_(scale * -math.log2(math.e)).scatter_(-1, head, -math.inf)
        if valid is not None:
            distance.masked_fill_(~valid, -math.inf)
        plan = x.new_empty((rows, k + 1, n))
        power = plan[:, :k]  # the one array of this size
        blocks = column_blocks(n, rows * k)
        for columns in blocks:
            block, span = power.narrow(-1, *columns), distance.narrow(-1, *columns).unsqueeze(1)
            torch.mul(span, reach.unsqueeze(-1), out=block).clamp_(low, 0).exp2_()
            torch.threshold_(block, 2**low * 1.01, 0.0)
        d_edge = (slopes * (edge.double() - centre.double())).masked_fill(~active, 0)
        at_top = distance  # its memory, from here on

    ones = torch.ones(k, k, dtype=torch.float64, device=x.device)
    identity = torch.eye(k, dtype=torch.float64, device=x.device)
    no_mass = torch.zeros(1, k, dtype=torch.float64, device=x.device)
    lower = ones.tril()  # [j, l]: l <= j
    to_rising, to_falling = torch.cat((no_mass, lower)), torch.cat((-lower.mT, no_mass))
    to_lo, to_up = torch.cat((lower, no_mass.mT), -1), torch.cat((no_mass.mT, lower.mT), -1)
    beyond = (1 - lower) * -IMPOSSIBLE
    theta = torch.zeros_like(slopes)
    live = torch.ones((rows, 1), dtype=torch.bool, device=x.device)
    best, best_error = theta, torch.full_like(theta[:, :1], math.inf)
    look = x.device.type == "cpu"
    for evaluation in range(PASSES + 1):
        if evaluation == PASSES:
            theta = torch.where(live, best, theta)
        d = d_head + theta.unsqueeze(-1)
        z = torch.matmul(to_rising, d.clamp(max=0)) + torch.matmul(to_falling, d.clamp_(min=0))
        pi = torch.softmax(z, -2)
        lo, up = torch.matmul(to_lo, pi), torch.matmul(to_up, pi)
        up_mass, down_mass = (above * lo).sum(-1), (below * up).sum(-1)
        if rest:
            log_odds = -torch.matmul(d_edge + theta, lower)
            largest = log_odds.cummax(-1).values
            mixing = (log_odds.unsqueeze(1) - largest.unsqueeze(-1)).clamp_(max=0).add_(beyond).exp_()
            unit = largest.clamp(-600, 300).exp()
            mixing, unit_top = mixing.to(x.dtype), unit[:, -1:].clamp(max=info.max**0.5).to(x.dtype)
            rest_mass, overlap = torch.zeros_like(theta), torch.zeros_like(identity).expand(rows, k, k)
            for columns in blocks:
                share_below = torch.bmm(mixing, power.narrow(-1, *columns))
                # P(J = k | i) = 1 / (1 + unit_k share_below_k)
                top = at_top.narrow(-1, *columns)
                torch.mul(share_below[:, -1], unit_top, out=top).add_(1).reciprocal_()
                share_below.mul_(top.unsqueeze(1))
                rest_mass = rest_mass + share_below.sum(-1)
                overlap = overlap + torch.bmm(share_below, share_below.mT)
            rest_mass = rest_mass * unit
            up_mass = up_mass + rest_mass
        up_mass, down_mass = up_mass + floor, down_mass + floor
        balance = torch.log(down_mass / up_mass)
        if mask is not None or weights is not None:
            balance = balance.masked_fill(~active, 0)
        error = balance.abs().amax(-1, keepdim=True)
        best = torch.where(error < best_error, theta, best)
        best_error = torch.minimum(error, best_error)
        if evaluation == PASSES or (look and not bool(live.any())):
            break
        inverse_up = up_mass.reciprocal()
        pull = above * inverse_up.unsqueeze(-1) + below / down_mass.unsqueeze(-1)
        slope = ((lo * pull) @ up.mT).triu() + ((up * pull) @ lo.mT).tril(-1)
        if rest:
            overlap = overlap * unit.unsqueeze(1) * unit.unsqueeze(-1)
            crossing = torch.minimum(rest_mass.unsqueeze(1), rest_mass.unsqueeze(-1)) - overlap
            slope += crossing * inverse_up.unsqueeze(-1)
        steepness = slope.diagonal(dim1=-2, dim2=-1)
        bare = ~active | (steepness < 1e-6)  # a cut that no soft mass crosses stays where it is
        slope = torch.where(bare.unsqueeze(-1) | bare.unsqueeze(-2), identity, slope)
        step = torch.linalg.solve_ex(slope, balance.unsqueeze(-1))[0].squeeze(-1)
        # targets that get no mass yet make the matrix singular; then cut by cut
        step = torch.where(step.isfinite().all(-1, keepdim=True), step, balance / steepness)
        step = step.clamp_(-8, 8).masked_fill_(bare, 0)
        theta = torch.where(live, theta - step, theta)
        live &= error > tolerance

    if rest:
        odds = log_odds.clamp(max=math.log(info.max) / 2).exp().to(x.dtype)
        for columns in blocks:
            power.narrow(-1, *columns).mul_(odds.unsqueeze(-1)).mul_(at_top.unsqueeze(1).narrow(-1, *columns))
        plan[:, k] = at_top
    else:
        plan = x.new_empty((rows, k + 1, n))
    plan.scatter_(-1, head.unsqueeze(1).expand(rows, k + 1, t), pi.to(x.dtype))
    if valid is not None:
        plan.masked_fill_(~valid.unsqueeze(1), 0)
    return plan.to(dtype).reshape(*batch, k + 1, n), theta.to(dtype).reshape(*batch, k)


_solve_op = torch.library.custom_op("couplings::sorted_plan", _solve, mutates_args=())


@_solve_op.register_fake
def _(
    x: Tensor,
    scale: Tensor,
    gaps: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    head: Tensor,
    share: Tensor,
    centre: Tensor,
    edge: Tensor,
    active: Tensor,
) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], centre.shape[-1] + 1, x.shape[-1])), torch.empty_like(centre)


class _SortedPlan(RowFunction):
    @staticmethod
    def forward(
        x: Tensor,
        scale: Tensor,
        gaps: Tensor,
        upto: Tensor | None,
        weights: Tensor | None,
        mask: Tensor | None,
        head: Tensor,
        share: Tensor,
        centre: Tensor,
        edge: Tensor,
        active: Tensor,
    ) -> tuple[Tensor, Tensor]:
        solve = _solve_op if torch.compiler.is_compiling() else _solve
        plan, theta = solve(x, scale, gaps, weights, mask, head, share, centre, edge, active)
        return plan, theta

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, scale, gaps, _, weights, _, _, _, centre, _, _ = inputs
        ctx.save_for_backward(x, scale, gaps, weights, centre, output[0])

    @staticmethod
    def backward(ctx: Any, plan_grad: Tensor, theta_grad: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiable in the plan itself, hence to any order (README.md, "Gradient of sorted targets")."""
        x, scale, gaps, weights, centre, pi = ctx.saved_tensors
        dtype, work = x.dtype, torch.float64 if pi.shape[-2] > MANY else x.dtype
        scale, gaps, centre = scale.to(work), gaps.to(work), centre.to(work)
        recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
        blocks = column_blocks(x.shape[-1], pi.shape[:-1].numel(), whole=recorded or x.device.type != "cpu")

        def terms(columns: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            part = pi.narrow(-1, *columns).to(work)
            lo, up = tails(part)
            weighted = up if weights is None else up * weights.unsqueeze(-2).narrow(-1, *columns)
            return lo, up, weighted, _covariance(part, lo, up, plan_grad.narrow(-1, *columns).to(work))

        # H lambda = e, scaled to a unit diagonal by constants; a cut that no mass crosses decouples
        pull, curvature = theta_grad.double(), torch.zeros_like(gaps, dtype=torch.float64).diag_embed()
        for columns in blocks:
            lo, up, weighted, direct = terms(columns)
            pull = pull + direct.sum(-1, dtype=torch.float64)
            curvature = curvature + _crossing(lo.double(), weighted.double())
        diagonal = curvature.detach().diagonal(dim1=-2, dim2=-1)
        crossed = diagonal > torch.finfo(work).tiny ** 0.75
        norm = torch.where(crossed, torch.where(crossed, diagonal, 1.0).rsqrt(), 0.0)
        scaled = curvature * norm.unsqueeze(-1) * norm.unsqueeze(-2) + torch.diag_embed((~crossed).double())
        price = norm * torch.linalg.solve_ex(scaled, (norm * pull).unsqueeze(-1))[0].squeeze(-1)
        price = price.to(work)

        shared, weights_parts, moment = [], [], torch.zeros_like(pull)
        for columns in blocks:
            if len(blocks) > 1:
                lo, up, weighted, direct = terms(columns)
            log_odds_grad = direct - _crossing_apply(lo, weighted, price.unsqueeze(-1))
            shared.append((gaps.unsqueeze(-2) @ log_odds_grad).squeeze(-2))
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                # each cut measured from its own centre: from another it cancels where scores tie
                distance = x.unsqueeze(-2).narrow(-1, *columns).to(work) - centre.unsqueeze(-1)
                moment = moment + (log_odds_grad * distance).sum(-1, dtype=torch.float64)
            if ctx.needs_input_grad[4]:
                weights_parts.append(-(price.unsqueeze(-2) @ up).squeeze(-2))
        moment = moment.to(work)
        grads = (
            torch.cat(shared, -1) * scale,
            (moment * gaps).sum(-1, keepdim=True) if ctx.needs_input_grad[1] else None,
            moment * scale if ctx.needs_input_grad[2] else None,
            -price if ctx.needs_input_grad[3] else None,
            torch.cat(weights_parts, -1) if ctx.needs_input_grad[4] else None,
        )
        return *(None if grad is None else grad.to(dtype) for grad in grads), *(None,) * 6


def _crossing_apply(lo: Tensor, up: Tensor, price: Tensor) -> Tensor:
    """sum_m lo_min(l,m)(i) up_max(l,m)(i) price_m, (.., k, n), each term as small as the mass that crosses its cut."""
    k = lo.shape[-2]
    below = lo.new_ones(k, k).tril()
    return up * (_each(below, lo) @ (price * lo)) + lo * (_each(1 - below, lo) @ (price * up))


def _covariance(pi: Tensor, lo: Tensor, up: Tensor, values: Tensor) -> Tensor:
    """Cov_i(1[J >= j], values_J), (.., k, n), without cancellation between equal values."""
    below, above = tails(pi * values)
    return lo * above - up * below
