"""The semi-dual Newton solver: annealed, damped, every item on its own clock."""

from __future__ import annotations

import torch
from torch import Tensor

from couplings.transport._progress import all_true, any_true
from couplings.transport.newton_cg import cg_direction, dense_direction, times, times_transposed
from couplings.transport.sinkhorn import fill_zero_masses

DENSE_LIMIT = 256  # shorter side up to which one factorisation is cheaper than conjugate gradients
HYBRID_LIMIT = 2048  # up to here "auto" may factorise a step that conjugate gradients do not finish
CHUNK = 2**16  # entries of a batch that are worked on together on a CPU: what stays in cache

FLOOR = -500.0  # logits below it are e^-500, which no float64 sum can tell from 0; exp of less is slow
ANNEAL_FROM = 16.0  # logits of the first, warmest problem span this much
ANNEAL_BY = 2.0  # inverse temperature grows by this factor
ANNEAL_AT = 1e-2  # residual at which it grows
WARM_SWEEPS = 3  # Sinkhorn sweeps after each change of temperature
LEVENBERG = 1e-3  # damping relative to the residual
LONGEST_STEP = 50.0  # logits
TRIALS = 8  # step lengths tried
SHRINK = 0.4
FAR = 100.0  # logits that potentials may move before the kernel is evaluated again
REFRESH = 8  # steps between two evaluations of the kernel from its logits
PATIENCE = 60  # steps without progress after which an item has stalled
BALANCE = 1e-6  # also asked of every single column: largest relative error, so that small masses count


def newton_potential(
    cost: Tensor, p: Tensor, q: Tensor, epsilon: Tensor, method: str, tolerance: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """Solve a batch of transport problems for the short side's potential.

    Args:
        cost: ``(B, s, l)`` float64; ``+inf`` forbids a pair.
        p: Short masses ``(B, s)``, summing to 1.
        q: Long masses ``(B, l)``, summing to 1.
        epsilon: ``(B,)``, positive.
        method: ``"newton"`` (dense factor), ``"newton_cg"`` (matrix-free) or ``"auto"``.
        tolerance: L1 error of the short marginal at which an item stops (the long one is exact).
        iterations: Cap on Newton steps and temperature changes together.

    Returns:
        The potential ``ghat`` ``(B, s)`` in cost units, with
        ``P_jl = p_j q_l exp((fhat_l + ghat_j - C_jl) / epsilon)``, and the Newton steps taken ``(B,)``.
    """
    batch, short, long = cost.shape
    size = batch if cost.device.type != "cpu" else max(1, CHUNK // max(1, short * long))
    potentials, steps = [], []
    for start in range(0, batch, size):
        part = slice(start, start + size)
        x = cost[part] / epsilon[part, None, None]
        h, taken = _solve_chunk(x, p[part], q[part], method, tolerance, iterations)
        potentials.append(h * epsilon[part, None])
        steps.append(taken)
    if not potentials:
        return torch.zeros_like(p), torch.zeros(batch, dtype=torch.int64, device=cost.device)
    return torch.cat(potentials), torch.cat(steps)


def _solve_chunk(
    x: Tensor, p: Tensor, q: Tensor, method: str, tolerance: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """The loop, in logits: ``h = ghat / epsilon``, ``x = C / epsilon``."""
    log_p = p.log()
    counted = (p > 0)[:, :, None] & (q > 0)[:, None, :] & ~x.isinf()
    span = x.masked_fill(~counted, -torch.inf).amax((-1, -2)) - x.masked_fill(~counted, torch.inf).amin(
        (-1, -2)
    )
    beta = (ANNEAL_FROM / span.clamp_min(ANNEAL_FROM)).clamp_max(1.0)  # inverse temperature, 1 = the problem
    del counted
    h = torch.zeros_like(p)
    pi = _kernel(x, h, beta, log_p)
    warm = torch.ones_like(beta, dtype=torch.bool)  # items whose temperature has just changed
    done = torch.zeros_like(warm)
    best, best_h = torch.full_like(beta, torch.inf), h
    since = torch.zeros_like(beta)
    taken = torch.zeros_like(beta, dtype=torch.int64)
    stop = all_true()
    for step in range(iterations):
        stale = ~done & (step % REFRESH == REFRESH - 1)
        if any_true(warm):
            swept, pi = _sweeps(pi, h, p, q, warm)
            stale = stale | ((swept - h).abs().amax(-1) > FAR)
            h = swept
        if any_true(stale):
            pi = _choose(stale, _kernel(x, h, beta, log_p), pi)
        s = times(pi, q)
        r = p - s
        error = r.abs().sum(-1)
        cold = beta >= 1
        # the best iterate at the final temperature is the answer
        better = cold & ~done & (error < best)
        since = torch.where(cold & ~(error < 0.9 * best), since + 1, 0)
        best, best_h = torch.where(better, error, best), torch.where(better[:, None], h, best_h)
        balance = torch.where(p > 0, (s / p - 1).abs(), 0).amax(-1)
        done = done | ~error.isfinite() | (cold & (error <= tolerance) & (balance <= BALANCE))
        done = done | (since >= PATIENCE)
        if stop(done):
            break
        warm = ~done & ~cold & (error < ANNEAL_AT)
        colder = torch.where(warm, (beta * ANNEAL_BY).clamp_max(1.0), beta)
        h = h * (colder / beta)[:, None]
        beta = colder
        if any_true(warm):
            pi = _choose(warm, _kernel(x, h, beta, log_p), pi)
        moving = ~done & ~warm
        if any_true(moving):
            d = _direction(pi, p, q, r, error, moving, method)
            v = _step_factor(pi, p, q, s, r, d, error, moving)
            h, pi = h + v.log(), _rescale(pi, v, moving)
            taken = taken + moving
    h = torch.where(best.isfinite()[:, None], best_h, h)
    return fill_zero_masses(x, h, p, q), taken


def _span(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Range of the logits that take part, ``(B,)``: padding must not change the path of the solve."""
    low, high = torch.aminmax(x.flatten(1), dim=1)
    if not any_true(~(high < torch.inf) | (p == 0).any(-1) | (q == 0).any(-1)):
        return high - low
    out = ~((p > 0)[:, :, None] & (q > 0)[:, None, :] & (x < torch.inf))
    return x.masked_fill(out, -torch.inf).amax((-1, -2)) - x.masked_fill(out, torch.inf).amin((-1, -2))


def _choose(flag: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Item by item ``new`` where ``flag`` else ``old``; without a copy where all items agree on a CPU."""
    if not any_true(~flag):
        return new
    return torch.where(flag[:, None, None], new, old)


def _kernel(x: Tensor, h: Tensor, beta: Tensor, log_p: Tensor) -> Tensor:
    """``pi = softmax_j(log p_j + h_j - beta x_jl)``, ``(B, s, l)``."""
    logits = (x * -beta[:, None, None]).add_((log_p + h)[:, :, None])
    top = logits.amax(-2, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)  # a column without an allowed pair has no mass
    logits.sub_(top).clamp_(min=FLOOR).exp_()
    return logits.div_(logits.sum(-2, keepdim=True))


def _rescale(pi: Tensor, v: Tensor, active: Tensor) -> Tensor:
    """The kernel after ``h += log v``, in place and without exponentials; an inactive item (v = 1) keeps its bits."""
    z = torch.where(active[:, None], times_transposed(pi, v), 1.0)
    return pi.mul_(v[:, :, None]).div_(z[:, None, :])


def _sweeps(pi: Tensor, h: Tensor, p: Tensor, q: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """A few Sinkhorn sweeps of the active items, as mat-vecs on the absorbed kernel."""
    v = torch.ones_like(p)
    use = active[:, None] & (p > 0)
    for _ in range(WARM_SWEEPS):
        s = times(pi, q / times_transposed(pi, v))  # the mass that column scalings v give is v * s
        v = torch.where(use, (p / s).clamp(1e-200, 1e200), v)
    return h + v.log(), _rescale(pi, v, active)


def _direction(
    pi: Tensor, p: Tensor, q: Tensor, r: Tensor, error: Tensor, moving: Tensor, method: str
) -> Tensor:
    lam = LEVENBERG * error
    short = pi.shape[-2]
    if method == "newton" or (method == "auto" and short <= DENSE_LIMIT):
        d = dense_direction(pi, p, q, r, lam)
    else:
        hybrid = method == "auto" and short <= HYBRID_LIMIT
        goal = error.sqrt().clamp_max(0.1)
        d, finished = cg_direction(pi, p, q, r, lam, goal, short // 8 if hybrid else 200)
        if hybrid and any_true(moving & ~finished):
            d = torch.where(finished[:, None], d, dense_direction(pi, p, q, r, lam))
    d = torch.where(d.isfinite(), d, 0.0)
    return d - (p * d).sum(-1, keepdim=True)


def _step_factor(
    pi: Tensor, p: Tensor, q: Tensor, s: Tensor, r: Tensor, d: Tensor, error: Tensor, moving: Tensor
) -> Tensor:
    """``v = exp(t d)`` for the first accepted length, one Sinkhorn sweep if there is none, 1 if not moving.

    A step is accepted if the concave semi-dual rises enough (Armijo), or, where its rise drowns in rounding, if
    the residual falls.
    """
    slope = (r * d).sum(-1)
    length = (LONGEST_STEP / d.abs().amax(-1)).clamp_max(1.0)
    accepted = ~moving
    factor = torch.ones_like(p)
    for _ in range(TRIALS):
        v = (length[:, None] * d).exp()
        z = times_transposed(pi, v)
        rise = length * (p * d).sum(-1) - (q * z.log()).sum(-1)
        error_there = (p - v * times(pi, q / z)).abs().sum(-1)
        good = (slope > 0) & (rise > 1e-12) & (rise >= 1e-4 * length * slope)
        good = good | (error_there <= 0.7 * error)
        factor = torch.where((good & ~accepted)[:, None], v, factor)
        accepted = accepted | good
        if not any_true(~accepted):
            return factor
        length = torch.where(accepted, length, SHRINK * length)
    sweep = torch.where(p > 0, (p / s).clamp(1e-200, 1e200), 1.0)
    return torch.where(accepted[:, None], factor, sweep)
