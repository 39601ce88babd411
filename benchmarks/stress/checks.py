"""One function per operator: solve a batch, and say for each problem how far from right it is, in units of its bar.

What is checked is computed here again in float64, from the returned numbers and the inputs: sums and marginals, the
stationarity of the plan, another algorithm's answer where that is quick enough, gradients against float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import couplings as cp
from benchmarks.stress.problems import Batch, scores, weights
from couplings.testing import ordered_plan, topk_mask_by_bisection

RESIDUAL = {torch.float64: 1e-9, torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Documented bars: L1 error over the total mass."""
VALUE = {torch.float64: 1e-7, torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Of single numbers against another algorithm."""
GRADIENT, CLOSE = 1e-2, 1e-4
"""Of float32 against float64, over the row's largest: wrong above the former, counted above the latter."""
APART: list[Tensor] = []
"""Those relative differences, a tensor for each call, for whoever counts them."""

Verdict = tuple[Tensor, Tensor]
"""Each problem's worst error in units of its bar (infinite for what is not finite), and whether the call said so."""


def worst(*ratios: Tensor) -> Tensor:
    """The largest of each row; what is not finite counts as infinite."""
    flat = torch.stack([r.double().reshape(r.shape[0], -1).abs().amax(-1) for r in ratios])
    return flat.nan_to_num(math.inf, math.inf, math.inf).amax(0)


def _silent(rows: int) -> Tensor:
    return torch.zeros(rows, dtype=torch.bool)


def _hidden(out: Tensor, allowed: Tensor) -> Tensor:
    """Infinite where what must be exactly 0 is not."""
    return torch.where(~allowed & (out != 0), math.inf, 0.0)


def _leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def _slope(
    function: Callable[[Tensor], Tensor], x: Tensor, batch: Batch, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The result; and per row how far its gradient is from float64's, in units of the bar, infinite if not finite."""
    leaf = _leaf(x)
    out = function(leaf)
    noise = torch.Generator().manual_seed(batch.seed)
    cotangent = torch.randn(out.shape[1:], generator=noise, dtype=torch.float64).expand(out.shape)
    (grad,) = torch.autograd.grad(out, leaf, cotangent.to(out.dtype))
    error = torch.where(grad.isfinite(), 0.0, math.inf).double().reshape(len(x), -1).amax(-1)
    if x.dtype == torch.float32:
        twin = _leaf(x.double())
        out_twin = function(twin)
        (exact,) = torch.autograd.grad(out_twin, twin, cotangent)
        size = exact.reshape(len(x), -1).abs().amax(-1)
        away = (grad.double() - exact).reshape(len(x), -1).abs().amax(-1)
        # next to nothing beside (range of results) / (deviation of scores) has no relative error to speak of
        flat = out_twin.detach().reshape(len(x), -1)
        whole = x.reshape(len(x), -1)
        unit = _standard(whole, torch.ones_like(whole, dtype=torch.bool) if mask is None else mask)[1][:, 0]
        away = away / torch.maximum(size, 1e-2 * (flat.amax(-1) - flat.amin(-1)) / unit).clamp_min(1e-300)
        APART.append(away)
        # the gradient of scores that hardly differ from denormal ones is no float32 number
        error = torch.where(unit > 1e-37, torch.maximum(error, away / GRADIENT), 0.0)
    return out.detach(), error.nan_to_num(math.inf, math.inf, math.inf)


def _standard(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the valid entries, measured in units of the row's largest deviation from an entry."""
    x = x.double()
    origin = x.gather(-1, mask.int().argmax(-1, keepdim=True))
    away = torch.where(mask, x - origin, 0)
    unit = away.abs().amax(-1, keepdim=True)
    constant = unit == 0
    away = away / torch.where(constant, 1.0, unit)
    count = mask.sum(-1, keepdim=True)
    mean = away.sum(-1, keepdim=True) / count
    std = (torch.where(mask, away - mean, 0).square().sum(-1, keepdim=True) / count).sqrt()
    return origin + mean * unit, torch.where(constant, 1.0, std * unit)


# ------------------------------------------------------------------------------------------------- selection


def topk_mask(batch: Batch) -> Verdict:
    x, mask = scores(batch)
    k = 1 + batch.seed % batch.n

    def operator(x: Tensor) -> Tensor:
        return cp.soft_topk_mask(x, k, epsilon=batch.epsilon, mask=mask)

    out, slope = _slope(operator, x, batch, mask)
    count = mask.sum(-1)
    wanted = count.clamp_max(k)
    total = (out.double().sum(-1) - wanted).abs() / count / RESIDUAL[batch.dtype]
    _, std = _standard(x, mask)
    # what is masked lies so far below that it takes no part; a row that is filled has no threshold
    hidden = torch.where(mask, x.double(), x.double().masked_fill(~mask, math.inf).amin(-1, keepdim=True))
    exact = topk_mask_by_bisection(
        hidden, wanted.unsqueeze(-1).double(), 2 / (batch.epsilon * std), mask.double()
    )
    exact = torch.where((count <= k).unsqueeze(-1), 1.0, exact) * mask
    return worst(total, (out - exact) / VALUE[batch.dtype], slope, _hidden(out, mask)), _silent(len(x))


def other_masks(batch: Batch) -> Verdict:
    x, mask = scores(batch)
    method = ("laplace", "gaussian", "sparse")[batch.seed % 3]
    k = 1 + batch.seed % batch.n
    out, slope = _slope(
        lambda x: cp.soft_topk_mask(x, k, epsilon=batch.epsilon, mask=mask, method=method), x, batch, mask
    )
    wanted = mask.sum(-1).clamp_max(k)
    total = (out.double().sum(-1) - wanted).abs() / mask.sum(-1) / RESIDUAL[batch.dtype]
    outside = (out - out.clamp(0, 1)).abs() / VALUE[batch.dtype]
    finite = torch.where(slope.isfinite(), 0.0, slope)
    return worst(total, outside, finite), _silent(len(x))


def _positions(x: Tensor, mask: Tensor) -> Tensor:
    mean, std = _standard(x, mask)
    return (x.double() - mean) / std


def sorted_topk(batch: Batch) -> Verdict:
    x, mask = scores(batch)
    k = 1 + batch.seed % max(1, min(8, batch.n - 1))
    (values, plan), slope = _pair(
        lambda x: cp.soft_topk(x, k, epsilon=batch.epsilon, mask=mask), x, batch, mask
    )
    count = mask.sum(-1)
    live = torch.arange(k) < count.unsqueeze(-1)
    rows = (plan.double().sum(-1) - live.double()).abs().sum(-1) / count / RESIDUAL[batch.dtype]
    above = (plan.double().sum(-2) - 1).clamp_min(0).sum(-1) / count / RESIDUAL[batch.dtype]
    size = x.double().masked_fill(~mask, 0).abs().amax(-1, keepdim=True)
    read = (plan.double() @ x.double().masked_fill(~mask, 0).unsqueeze(-1)).squeeze(-1)
    apart = (values.double() - read).abs() / torch.where(size > 0, size, 1) / VALUE[batch.dtype]
    ratios = [rows, above, apart, slope]
    for row in (0,):  # the whole plan by another algorithm
        c = int(count[row])
        if c > k and batch.epsilon >= 1e-3 and batch.dtype != torch.bfloat16:
            z = -_positions(x[row : row + 1], mask[row : row + 1])[0, mask[row]]
            y = torch.arange(k + 1, dtype=torch.float64)
            b = torch.cat((torch.full((k,), 1 / c), torch.tensor([(c - k) / c]))).double()
            exact = _oracle(z, y, b, batch.epsilon)
            if exact is not None:
                away = torch.zeros(len(x), dtype=torch.float64)
                away[row] = (plan[row][:, mask[row]].double() - c * exact.mT[:k]).abs().amax()
                ratios.append(
                    away / (10 * VALUE[batch.dtype])
                )  # an entry may be off by more than the marginals
    return worst(*ratios), _silent(len(x))


def _oracle(x: Tensor, y: Tensor, b: Tensor, epsilon: float) -> Tensor | None:
    """The dense float64 plan, or None where that algorithm gives up."""
    try:
        found = ordered_plan(x, torch.full_like(x, 1 / len(x)), y, b / b.sum(), epsilon)
    except RuntimeError:
        return None
    return found.plan if found.residual < 1e-11 else None


def _pair(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, batch: Batch, mask: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """As ``_slope``, of the second of two results."""
    _, slope = _slope(lambda x: function(x)[1], x, batch, mask)
    with torch.no_grad():
        return function(x), slope


# -------------------------------------------------------------------------------------------------- ordering


def _points(x: Tensor, mask: Tensor) -> Tensor:
    return torch.sigmoid(_positions(x, mask) * (math.pi / math.sqrt(3)))


def ranks(batch: Batch) -> Verdict:
    x, mask = scores(batch)
    out, slope = _slope(lambda x: cp.soft_rank(x, epsilon=batch.epsilon, mask=mask), x, batch, mask)
    count = mask.sum(-1)
    total = (out.double().sum(-1) - count * (count + 1) / 2).abs() / count**2 / RESIDUAL[batch.dtype]
    ratios = [total, slope, _hidden(out, mask)]
    certificate = cp.order_certificate(x, epsilon=batch.epsilon, mask=mask, samples=batch.n)
    ratios.append(certificate.residual / RESIDUAL[batch.dtype])
    c = int(count[0])
    if c > 1 and batch.dtype != torch.bfloat16:
        grid = torch.arange(c, dtype=torch.float64) / (c - 1)
        even = torch.full((c,), 1 / c, dtype=torch.float64)
        plan = _oracle(_points(x, mask)[0, mask[0]], grid, even, batch.epsilon)
        if plan is not None:
            exact = c * plan @ torch.arange(1, c + 1, dtype=torch.float64)
            away = torch.zeros(len(x), dtype=torch.float64)
            away[0] = (out[0, mask[0]].double() - exact).abs().amax() / c
            ratios.append(away / VALUE[batch.dtype])
    return worst(*ratios), _silent(len(x))


def sorts(batch: Batch) -> Verdict:
    x, mask = scores(batch)
    out, slope = _slope(lambda x: cp.soft_sort(x, epsilon=batch.epsilon, mask=mask), x, batch, mask)
    valid = x.double().masked_fill(~mask, 0)
    size = valid.abs().amax(-1)
    size = torch.where(size > 0, size, 1)
    count = mask.sum(-1)
    total = (out.double().sum(-1) - valid.sum(-1)).abs() / (count * size) / VALUE[batch.dtype]
    live = torch.arange(batch.n) < count.unsqueeze(-1)
    falls = torch.where(live[:, 1:], -out.double().diff(dim=-1), 0).clamp_min(0) / size.unsqueeze(-1)
    return worst(total, falls / VALUE[batch.dtype], slope, _hidden(out, live)), _silent(len(x))


def permutations(batch: Batch) -> Verdict:
    x, mask = scores(batch)
    out = cp.soft_permutation(x, epsilon=batch.epsilon, mask=mask).double()
    live = torch.arange(batch.n) < mask.sum(-1, keepdim=True)
    rows = (out.sum(-1) - live.double()).abs().sum(-1)
    columns = (out.sum(-2) - mask.double()).abs().sum(-1)
    bar = RESIDUAL[batch.dtype] * mask.sum(-1)
    return worst((rows + columns) / bar, _hidden(out, out >= 0)), _silent(len(x))


def quantiles(batch: Batch) -> Verdict:
    x, mask = scores(batch)
    levels = [0.0, 0.25, 0.5, 0.9, 1.0]
    out, slope = _slope(
        lambda x: cp.soft_quantile(x, levels, epsilon=batch.epsilon, mask=mask).movedim(0, -1), x, batch, mask
    )
    low = x.masked_fill(~mask, math.inf).amin(-1, keepdim=True).double()
    high = x.masked_fill(~mask, -math.inf).amax(-1, keepdim=True).double()
    size = torch.maximum(low.abs(), high.abs())
    size = torch.where(size > 0, size, 1)
    outside = (
        (low - out).clamp_min(0)
        + (out - high).clamp_min(0)
        + (-out.double().diff(dim=-1)).clamp_min(0).sum(-1, keepdim=True)
    )
    return worst(outside / size / VALUE[batch.dtype], slope), _silent(len(x))


def relaxations(batch: Batch) -> Verdict:
    x, mask = scores(batch)
    method = ("projection", "sigmoid", "gaussian", "network")[batch.seed % 4]
    out, slope = _slope(
        lambda x: cp.soft_rank(x, epsilon=batch.epsilon, mask=mask, method=method), x, batch, mask
    )
    count = mask.sum(-1)
    total = (out.double().sum(-1) - count * (count + 1) / 2).abs() / count**2 / VALUE[batch.dtype]
    finite = torch.where(slope.isfinite(), 0.0, slope)
    return worst(total, finite), _silent(len(x))


def _like(a: Tensor, b: Tensor) -> Tensor:
    """b with exactly the sum of a: rounding parted them."""
    return b.double() / b.double().sum(-1, keepdim=True) * a.double().sum(-1, keepdim=True)


def distances(batch: Batch) -> Verdict:
    x, rows = scores(batch)
    y, columns = scores(Batch(batch.seed + 7, batch.rows, batch.m, batch.n, batch.dtype, batch.epsilon))
    y = y / torch.where(y == 0, 1, y.abs()).amax(-1, keepdim=True) * x.abs().amax(-1, keepdim=True)
    a, b = weights(batch, rows, 1).to(batch.dtype), weights(batch, columns, 2).to(batch.dtype)
    out, slope = _slope(
        lambda x: cp.wasserstein_1d(x, y.to(x.dtype), a.to(x.dtype), _like(a, b).to(x.dtype), p=1), x, batch
    )
    finite = torch.where(slope.isfinite(), 0.0, slope)
    a, b = a.double(), _like(a, b)
    places, order = torch.cat((x, y), -1).double().sort(-1)
    gap = torch.cat((a, -b), -1).gather(-1, order).cumsum(-1)[:, :-1].abs()
    exact = (gap * places.diff(dim=-1)).sum(-1)
    size = torch.maximum(x.abs().amax(-1), y.abs().amax(-1)).double()
    return worst(
        (out.double() - exact) / torch.where(size > 0, size, 1) / VALUE[batch.dtype], finite
    ), _silent(len(x))


# ----------------------------------------------------------------------------------------- transport, matching


def _stationary(plan: Tensor, cost: Tensor, epsilon: float) -> Tensor:
    """How far log P + C / epsilon is from f + g, (rows,), where P is well above its rounding."""
    well = plan > 1e-100
    away = torch.where(well, plan.log() + cost / epsilon, 0.0)
    # the best f + g where every entry is well; elsewhere nothing is claimed
    row, column = away.mean(-1, keepdim=True), away.mean(-2, keepdim=True)
    error = (away - row - column + away.mean((-1, -2), keepdim=True)).abs().amax((-1, -2))
    return torch.where(well.all(-1).all(-1), error, 0.0)


def _plan(batch: Batch, solver: str) -> Verdict:
    cost, rows = scores(batch, batch.m, magnitude=False)
    _, columns = scores(Batch(batch.seed + 5, batch.rows, batch.m, 1, batch.dtype, batch.epsilon))
    a, b = weights(batch, rows, 1).to(batch.dtype), weights(batch, columns, 2).to(batch.dtype)
    leaf = _leaf(cost)
    coupling = cp.solve(
        leaf, a, b, epsilon=batch.epsilon, row_mask=rows, column_mask=columns, solver=solver, on_fail="ignore"
    )
    plan = coupling.plan()
    (grad,) = torch.autograd.grad(plan.square().sum(), leaf)
    p, a, b = plan.detach().double(), a.double(), b.double()
    b = _like(a, b)
    residual = (p.sum(-1) - a).abs().sum(-1) + (p.sum(-2) - b).abs().sum(-1)
    ratios = [
        residual / RESIDUAL[batch.dtype],
        torch.where(grad.isfinite(), 0.0, math.inf),
        _hidden(p, p >= 0),
    ]
    if batch.dtype == torch.float64:
        rounding = cost.double().abs().amax((-1, -2)) / batch.epsilon * 1e-13 + 1e-9
        ratios.append(_stationary(p, cost.double(), batch.epsilon) / rounding)
    return worst(*ratios), coupling.status != cp.Status.CONVERGED


def newton(batch: Batch) -> Verdict:
    return _plan(batch, "newton")


def newton_cg(batch: Batch) -> Verdict:
    return _plan(batch, "newton_cg")


def unbalanced(batch: Batch) -> Verdict:
    cost, rows = scores(batch, batch.m, magnitude=False)
    cost = cost - cost.amin((-1, -2), keepdim=True)  # negative costs would create mass, up to 1e32 of it
    a = weights(batch, torch.ones_like(rows), 1).clamp_min(1e-3).to(batch.dtype)
    b = (
        (2 * weights(batch, torch.ones(len(cost), batch.m, dtype=torch.bool), 2))
        .clamp_min(1e-3)
        .to(batch.dtype)
    )
    tau = (0.1, 1.0, 10.0)[batch.seed % 3]
    coupling = cp.solve(cost, a, b, epsilon=batch.epsilon, tau_a=tau, tau_b=2 * tau, on_fail="ignore")
    p, c = coupling.plan().double(), cost.double()
    tiny = torch.finfo(torch.float64).tiny
    f = -tau * ((p.sum(-1) / a.double()).clamp_min(tiny)).log()
    g = -2 * tau * ((p.sum(-2) / b.double()).clamp_min(tiny)).log()
    again = ((f.unsqueeze(-1) + g.unsqueeze(-2) - c) / batch.epsilon).exp()
    mass = p.sum((-1, -2))
    # an error of the marginals is multiplied by tau / epsilon in f / epsilon
    amplified = RESIDUAL[batch.dtype] * (1 + 3 * tau / batch.epsilon) * mass.clamp_min(1e-30)
    # the bar is relative to all mass: rows and columns with less than a hundredth of it are left out
    least = 1e-2 * mass[:, None]
    amplified = 100 * amplified
    seen = (p.sum(-1) > least).unsqueeze(-1) & (p.sum(-2) > least).unsqueeze(-2)
    away = torch.where(mass > 1e-6, torch.where(seen, again - p, 0).abs().sum((-1, -2)) / amplified, 0.0)
    return worst(away, torch.where(p.isfinite(), 0.0, math.inf)), coupling.status != cp.Status.CONVERGED


def points(batch: Batch) -> Verdict:
    x, mask = scores(batch, magnitude=False)
    y = torch.linspace(-1, 1, batch.m, dtype=torch.float64).expand(len(x), -1).to(batch.dtype)
    a = weights(batch, mask, 1).to(batch.dtype)
    x = x.clamp(-10, 10)
    coupling = cp.transport.solve_points(x, y, a, epsilon=batch.epsilon, mask=mask, on_fail="ignore")
    p, a = coupling.plan().double(), a.double()
    b = a.sum(-1, keepdim=True) / batch.m
    residual = (p.sum(-1) - a).abs().sum(-1) + (p.sum(-2) - b).abs().sum(-1)
    return worst(residual / RESIDUAL[batch.dtype]), coupling.status != cp.Status.CONVERGED


def dustbins(batch: Batch) -> Verdict:
    x, rows = scores(batch, batch.m, magnitude=False)
    x = x.clamp(-50, 50)
    _, columns = scores(Batch(batch.seed + 5, batch.rows, batch.m, 1, batch.dtype, batch.epsilon))
    if batch.seed % 4 == 0:
        rows = rows & (torch.arange(len(x)) % 5 != 0).unsqueeze(-1)  # nothing valid on one side
    dustbin = torch.linspace(-3, 3, len(x)).to(batch.dtype)
    scale = (1.0, 5.0, 20.0)[batch.seed % 3]
    leaf = _leaf(scale * x)
    coupling = cp.match_with_dustbin(leaf, dustbin, row_mask=rows, column_mask=columns, on_fail="ignore")
    (grad,) = torch.autograd.grad(coupling.plan().square().sum(), leaf)
    p = coupling.plan().detach().double()
    n, m = rows.sum(-1, keepdim=True).double(), columns.sum(-1, keepdim=True).double()
    mu, nu = torch.cat((rows.double(), m), -1), torch.cat((columns.double(), n), -1)
    residual = (p.sum(-1) - mu).abs().sum(-1) + (p.sum(-2) - nu).abs().sum(-1)
    bar = RESIDUAL[batch.dtype] * (n + m).squeeze(-1).clamp_min(1)
    finite = torch.where(grad.isfinite(), 0.0, math.inf)
    return worst(residual / bar, finite), coupling.status != cp.Status.CONVERGED


def doubly_stochastic(batch: Batch) -> Verdict:
    size = 4 if batch.seed % 2 else 7
    generators = [_one_matrix(g, size) for g in batch.generators()]
    x = torch.stack(generators).to(batch.dtype)
    leaf = _leaf(x)
    out = cp.sinkhorn_normalize(leaf, on_fail="ignore")
    (grad,) = torch.autograd.grad(out.square().sum(), leaf)
    p = out.detach().double()
    residual = (p.sum(-1) - 1).abs().sum(-1) + (p.sum(-2) - 1).abs().sum(-1)
    finite = torch.where(grad.isfinite(), 0.0, math.inf)
    return worst(residual / (size * RESIDUAL[batch.dtype]), finite), _silent(len(x))


def _one_matrix(generator: torch.Generator, size: int) -> Tensor:
    deviation = 10 ** (2 * torch.rand((), generator=generator).double())
    return deviation * torch.randn(size, size, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------------------------- similarity, attention


def _token_sets(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, q_mask = scores(batch, 4, magnitude=False)
    x, x_mask = scores(
        Batch(batch.seed + 3, batch.rows, batch.m, 1, batch.dtype, batch.epsilon), 4, magnitude=False
    )
    return q, q_mask, x, x_mask


def late_interaction(batch: Batch) -> Verdict:
    q, q_mask, x, x_mask = _token_sets(batch)
    (out, slope) = _slope(
        lambda q: cp.maxsim(q, x.to(q.dtype), query_mask=q_mask, document_mask=x_mask), q, batch
    )
    grid = torch.einsum("ild,jkd->ijlk", q.double(), x.double())
    grid = grid.masked_fill(~x_mask[None, :, None], -math.inf).amax(-1).masked_fill(~q_mask[:, None], 0)
    size = (q.double().norm(dim=-1).sum(-1)[:, None] * x.double().norm(dim=-1).amax(-1)).clamp_min(1e-300)
    finite = torch.where(slope.isfinite(), 0.0, slope)
    return worst((out - grid.sum(-1)) / size / VALUE[batch.dtype], finite), _silent(len(q))


def retrieval(batch: Batch) -> Verdict:
    q, q_mask, x, x_mask = _token_sets(batch)
    k = min(3, len(x))
    found = cp.maxsim_topk(q, x, k, query_mask=q_mask, document_mask=x_mask)
    all_scores = cp.testing.maxsim_by_pairs(q.double(), x.double(), q_mask, x_mask)
    exact = all_scores.topk(k, -1).values
    read = all_scores.gather(-1, found.indices)
    size = (q.double().norm(dim=-1).sum(-1) * x.double().norm(dim=-1).amax())[:, None].clamp_min(1e-300)
    bar = VALUE[torch.float32 if batch.dtype == torch.bfloat16 else batch.dtype]
    return worst((found.values - exact) / size / bar, (read - exact) / size / bar), _silent(len(q))


def attention(batch: Batch) -> Verdict:
    k, mask = scores(batch, 4, magnitude=False)
    k = k.clamp(-30, 30)
    q = k[:, :3].flip(-1)
    count = 1 + batch.seed % batch.n
    visible = mask.unsqueeze(1)
    out, used = cp.topk_attention(q, k, k, count, epsilon=batch.epsilon, mask=visible, return_weights=True)
    logits = (q.double() @ k.double().mT) / 2
    logits = logits.masked_fill(~visible, -math.inf)
    total = (used.double().sum(-1) - 1).abs()
    masked = torch.where(visible, 0.0, used.double())
    top = logits.amax(-1, keepdim=True)
    # with every source selected, and wherever the mask is 1, it is ordinary attention
    plain = (logits - top).exp() / (logits - top).exp().sum(-1, keepdim=True)
    everything = (visible.sum(-1, keepdim=True) <= count).expand_as(plain)
    away = torch.where(everything, (used.double() - plain).abs(), 0)
    read = (used.double() @ k.double() - out.double()).abs() / k.double().abs().amax(
        (-1, -2), keepdim=True
    ).clamp_min(1e-300)
    bar = VALUE[batch.dtype]
    return worst(total / bar, _hidden(masked, masked == -1), away / bar, read / bar), _silent(len(q))


# ----------------------------------------------------------------------------------------------------- losses


def list_losses(batch: Batch) -> Verdict:
    x, mask = scores(batch)
    y = torch.stack([torch.randint(0, 4, (batch.n,), generator=g) for g in batch.generators()])
    name = ("spearman_loss", "kendall_loss", "recall_at_k_loss", "trimmed_loss")[batch.seed % 4]
    function: Callable[..., Tensor] = getattr(cp.losses, name)
    options: dict[str, Any] = {"mask": mask, "epsilon": batch.epsilon, "reduction": "none"}
    if name == "trimmed_loss":

        def loss(x: Tensor) -> Tensor:
            return function(x, 0.7, **options)
    elif name == "recall_at_k_loss":

        def loss(x: Tensor) -> Tensor:
            return function(x, y > 1, 1 + batch.n // 3, **options)
    else:

        def loss(x: Tensor) -> Tensor:
            return function(x, y, **options)

    out, slope = _slope(loss, x, batch, mask)
    twin = loss(x.double())
    size = x.double().masked_fill(~mask, 0).abs().amax(-1) if name == "trimmed_loss" else torch.ones(len(x))
    away = (out.double() - twin) / torch.where(size > 0, size, 1)
    if name == "kendall_loss" and batch.epsilon >= 1e-3:
        _, std = _standard(x, mask)
        difference = (x.double().unsqueeze(-1) - x.double().unsqueeze(-2)) / std.unsqueeze(-1)
        both = mask.unsqueeze(-1) & mask.unsqueeze(-2)
        tau = torch.where(both, torch.tanh(difference / (2 * batch.epsilon)), 0).flatten(1)
        signs = torch.where(both, (y.unsqueeze(-1) - y.unsqueeze(-2)).sign(), 0).double().flatten(1)
        norms = tau.norm(dim=-1) * signs.norm(dim=-1)
        defined = norms > 1e-12
        exact = 1 - (tau * signs).sum(-1) / torch.where(defined, norms, 1)
        away = torch.where(defined, torch.maximum(away.abs(), (out.double() - exact).abs()), away.abs())
    finite = torch.where(slope.isfinite(), 0.0, slope)
    return worst(away / (50 * VALUE[batch.dtype]), finite), _silent(len(x))


def contrastive(batch: Batch) -> Verdict:
    """Every row of a batch is one term of the loss."""
    x, _ = scores(batch)
    y = x.roll(1, -1) + 0.5 * x.flip(0)
    unit = tuple(t.double() / t.double().norm(dim=-1, keepdim=True).clamp_min(1e-300) for t in (x, y))
    normal = (x.double().norm(dim=-1) > 1e-140) & (y.double().norm(dim=-1) > 1e-140)
    grid = unit[0] @ unit[1].mT
    name = ("info_nce_loss", "clip_loss", "sigmoid_loss")[batch.seed % 3]
    out, slope = _slope(lambda x: getattr(cp.losses, name)(x, y.to(x.dtype), reduction="none"), x, batch)
    if name == "sigmoid_loss":
        signs = 2 * torch.eye(len(x), dtype=torch.float64) - 1
        exact = -torch.nn.functional.logsigmoid(signs * (grid / 0.1 - 10)).sum(-1)
    else:
        forward = -(grid / 0.07).log_softmax(-1).diagonal()
        exact = (
            forward if name == "info_nce_loss" else (forward - (grid / 0.07).log_softmax(0).diagonal()) / 2
        )
    finite = torch.where(slope.isfinite(), 0.0, slope)
    away = torch.where(
        normal.all(), (out.double() - exact) / (1 + exact.abs()), torch.where(out.isfinite(), 0.0, math.inf)
    )
    return worst(away / (20 * VALUE[batch.dtype]), finite), _silent(len(x))


Check = Callable[[Batch], Verdict]
CHECKS: dict[str, tuple[Check, int]] = {
    # check, and its share of the problems
    "soft_topk_mask": (topk_mask, 10),
    "soft_topk_mask, other methods": (other_masks, 6),
    "soft_topk": (sorted_topk, 8),
    "soft_rank, order_certificate": (ranks, 10),
    "soft_sort": (sorts, 8),
    "soft_permutation": (permutations, 4),
    "soft_quantile": (quantiles, 6),
    "soft_rank, other methods": (relaxations, 6),
    "wasserstein_1d": (distances, 4),
    "solve, newton": (newton, 8),
    "solve, newton_cg": (newton_cg, 4),
    "solve, unbalanced": (unbalanced, 4),
    "solve_points": (points, 4),
    "match_with_dustbin": (dustbins, 8),
    "sinkhorn_normalize": (doubly_stochastic, 8),
    "maxsim": (late_interaction, 4),
    "maxsim_topk": (retrieval, 2),
    "topk_attention": (attention, 4),
    "list losses": (list_losses, 4),
    "contrastive losses": (contrastive, 4),
}
