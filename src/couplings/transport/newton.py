"""The semi-dual Newton solver: annealed, damped, every item on its own clock."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from couplings.transport._progress import all_true, any_true
from couplings.transport.logits import kernel
from couplings.transport.newton_cg import cg_direction, dense_direction, times, times_transposed
from couplings.transport.newton_low import (
    ANNEAL_AT,
    ANNEAL_FROM,
    BALANCE,
    FLOOR,
    HIGH_FLOOR,
    MOST_STAGES,
    SHRINK,
    SWEEP_LIMIT,
    WARM_SWEEPS,
    start_low,
)
from couplings.transport.sinkhorn import fill_zero_masses

DENSE_LIMIT = 128  # shorter side up to which one factorisation is cheaper than conjugate gradients
HYBRID_LIMIT = 2048  # up to here "auto" may factorise a step that conjugate gradients do not finish
CHUNK = 2**16  # entries of a batch that are worked on together on a CPU: what stays in cache

LEVENBERG = 1e-3  # damping relative to the residual
FAR = 100.0  # logits by which potentials may move before the kernel is evaluated again
LONGEST = 50.0  # longest step in logits; what was cut off must stay negligible
RISE = 1e-12  # rises of the semi-dual below it are rounding
PATIENCE = 60  # steps without progress after which an item has stalled
TRIALS = 8  # step lengths tried
REFRESH = 8  # steps between two evaluations of the kernel from its logits
LOW_SIZE = 2**14  # entries of a problem from which a float32 start pays on a CPU


class _State(NamedTuple):
    """Where an item stands, all ``(B, ...)``."""

    h: Tensor  # potential in logits
    log_z: Tensor  # of the long side: log of sum_j p_j exp(h_j - x_jl), once the item is done
    beta: Tensor  # inverse temperature, 1 = the problem
    taken: Tensor  # Newton steps
    warm: Tensor  # the temperature has just changed


class _Problem(NamedTuple):
    """A chunk of problems ``(B, s, l)``; its logits are ``log p_j + h_j - rate beta C_jl``."""

    cost: Tensor
    p: Tensor
    q: Tensor
    log_p: Tensor
    rate: Tensor  # 1 / epsilon


def newton_potential(
    cost: Tensor, p: Tensor, q: Tensor, epsilon: Tensor, method: str, tolerance: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve a batch of transport problems for the short side's potential.

    Args:
        cost: ``(B, s, l)`` float64 or float32; ``+inf`` forbids a pair.
        p: Short masses ``(B, s)`` float64, summing to 1.
        q: Long masses ``(B, l)`` float64, summing to 1.
        epsilon: ``(B,)`` float64, positive.
        method: ``"newton"`` (dense factor), ``"newton_cg"`` (matrix-free) or ``"auto"``.
        tolerance: L1 error of the short marginal at which an item stops (the long one is exact).
        iterations: Cap on Newton steps and temperature changes together.

    Returns:
        The potential ``ghat`` ``(B, s)`` in cost units, with
        ``P_jl = p_j q_l exp((fhat_l + ghat_j - C_jl) / epsilon)``, ``-fhat / epsilon`` ``(B, l)``, and the Newton
        steps taken ``(B,)``.
    """
    batch, short, long = cost.shape
    low = cost.device.type == "cpu" and short * long >= LOW_SIZE
    size = batch if cost.device.type != "cpu" else 1 if low else max(1, CHUNK // max(1, short * long))
    parts = []
    for start in range(0, batch, size):
        part = slice(start, start + size)
        problem = _Problem(cost[part], p[part], q[part], p[part].log(), 1 / epsilon[part])
        parts.append(_solve_chunk(problem, method, tolerance, iterations, low))
    if not parts:
        steps = torch.zeros(batch, dtype=torch.int64, device=cost.device)
        return torch.zeros_like(p), torch.zeros_like(q), steps
    h, log_z, taken = (torch.cat(part) for part in zip(*parts, strict=True))
    return h * epsilon[:, None], log_z, taken


def _solve_chunk(
    problem: _Problem, method: str, tolerance: float, iterations: int, low: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """In logits: ``h = ghat / epsilon`` and ``log z``; ``low``: a single problem, to be begun in float32."""
    p, q = problem.p, problem.q
    span = _span(problem)
    none = torch.zeros_like(p[:, 0], dtype=torch.bool)
    if low:
        start = start_low(problem.cost[0], p[0], q[0], problem.rate[0], float(span), tolerance)
        state = _State(
            h=start.h[None],
            log_z=start.log_z[None],
            beta=torch.full_like(span, start.beta),
            taken=torch.full_like(span, start.taken, dtype=torch.int64),
            warm=none,
        )
        finished = start.done
    else:
        stages = torch.log2(span.clamp_min(ANNEAL_FROM) / ANNEAL_FROM).ceil().clamp_max(MOST_STAGES)
        state = _State(
            h=torch.zeros_like(p),
            log_z=torch.zeros_like(q),
            beta=torch.exp2(-stages),
            taken=torch.zeros_like(p[:, 0], dtype=torch.int64),
            warm=~none,
        )
        finished = False
    if not finished:
        state = _iterate(problem, state, method, tolerance, iterations, low)
    h = fill_zero_masses(problem.cost, problem.rate, state.h, p, q)
    return h, state.log_z, state.taken


def _iterate(
    problem: _Problem, state: _State, method: str, tolerance: float, iterations: int, low: bool
) -> _State:
    """Steps in float64 until every item is done."""
    p, q = problem.p, problem.q
    h, beta, taken, warm = state.h, state.beta, state.taken, state.warm
    pi, log_z = _kernel(problem, h, state.log_z, beta)
    reference, done = h, torch.zeros_like(warm)
    reached = done
    best, best_h = torch.full_like(beta, torch.inf), h
    since = torch.zeros_like(beta)
    over_p = torch.where(p > 0, 1 / p, 0.0)
    stop = all_true()
    for step in range(iterations):
        if any_true(warm):
            h, pi, log_z = _sweeps(pi, h, log_z, p, q, warm)
        stale = ~done & ((h - reference).abs().amax(-1) > FAR)
        if step % REFRESH == REFRESH - 1:
            stale = ~done
        if any_true(stale):
            new, new_log_z = _kernel(problem, h, log_z, beta)
            pi, log_z = _choose(stale, new, pi), _choose(stale, new_log_z, log_z)
            reference = torch.where(stale[:, None], h, reference)
        s = times(pi, q)
        r = p - s
        error = r.abs().sum(-1)
        cold = beta >= 1
        # the best iterate at the final temperature is the answer
        better = cold & ~done & (error < best)
        weak = cold & ~(error < 0.2 * best)
        since = torch.where(cold & ~(error < 0.9 * best), since + 1, 0)
        best = torch.where(better, error, best)
        best_h = torch.where(better[:, None], h, best_h)
        balance = torch.where(p > 0, s * over_p - 1, 0).abs().amax(-1)
        reached = reached | (~done & cold & (error <= tolerance) & (balance <= BALANCE))
        done = done | reached | ~error.isfinite() | (since >= PATIENCE)
        if stop(done):
            break
        warm = ~done & ~cold & (error < ANNEAL_AT)
        if any_true(warm):
            h, beta = torch.where(warm[:, None], 2 * h, h), torch.where(warm, 2 * beta, beta)
            square, square_log_z = _squared(pi, log_z, over_p)
            pi, log_z = _choose(warm, square, pi), _choose(warm, square_log_z, log_z)
            reference = torch.where(warm[:, None], h, reference)
        moving = ~done & ~warm
        if any_true(moving):
            d = _direction(pi, p, q, r, error, moving, weak, method, low)
            h, pi, log_z = _step(pi, h, log_z, p, q, s, r, d, error, moving)
            taken = taken + moving
    if any_true(~reached):
        h = torch.where((best.isfinite() & ~reached)[:, None], best_h, h)
        log_z = torch.where(reached[:, None], log_z, _kernel(problem, h, log_z, torch.ones_like(beta))[1])
    return _State(h, log_z, beta, taken, warm & ~done)


def _span(problem: _Problem) -> Tensor:
    """Range of the logits that take part, ``(B,)``: padding must not change the path of the solve."""
    x, p, q, _, rate = problem
    low, high = x.amin((-1, -2)), x.amax((-1, -2))  # torch.aminmax takes ten times as long
    if any_true(~(high < torch.inf) | (p == 0).any(-1) | (q == 0).any(-1)):
        out = ~((p > 0)[:, :, None] & (q > 0)[:, None, :] & (x < torch.inf))
        high = x.masked_fill(out, -torch.inf).amax((-1, -2))
        low = x.masked_fill(out, torch.inf).amin((-1, -2))
    return (high.to(p.dtype) - low.to(p.dtype)) * rate


def _choose(flag: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Item by item ``new`` where ``flag`` else ``old``; without a copy where all items agree on a CPU."""
    if not any_true(~flag):
        return new
    return torch.where(flag.reshape(-1, *[1] * (new.dim() - 1)), new, old)


def _kernel(problem: _Problem, h: Tensor, guess: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """``pi = softmax_j(log p_j + h_j - beta x_jl)``, ``(B, s, l)``, and ``log z``."""
    shift, slope = problem.log_p + h, -beta * problem.rate
    return kernel(problem.cost, shift, guess, slope, torch.float64, HIGH_FLOOR)


def _squared(pi: Tensor, log_z: Tensor, over_p: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel at twice the inverse temperature and twice the potential in logits, without exponentials."""
    square = (pi * pi).mul_(over_p[:, :, None].to(pi.dtype))
    z = square.sum(-2, keepdim=True)
    return square.div_(z), 2 * log_z + z[:, 0].to(log_z.dtype).log()


def _rescale(pi: Tensor, log_z: Tensor, v: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel after ``h += log v``, in place and without exponentials; z is ``v' pi``, and 1 where v is."""
    pi = pi.mul_(v[:, :, None].to(pi.dtype)).div_(z[:, None, :].to(pi.dtype))
    return pi, log_z + z.log()


def _sweeps(
    pi: Tensor, h: Tensor, log_z: Tensor, p: Tensor, q: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A few Sinkhorn sweeps of the active items, as mat-vecs on the absorbed kernel."""
    v = torch.ones_like(p)
    use = active[:, None] & (p > 0)
    for turn in range(WARM_SWEEPS):
        weighted = q / times_transposed(pi, v) if turn else q  # the columns of pi sum to 1
        s = times(pi, weighted)  # the mass that column scalings v give is v * s
        v = torch.where(use, (p / s).clamp(1 / SWEEP_LIMIT, SWEEP_LIMIT), v)
    z = torch.where(active[:, None], times_transposed(pi, v), 1.0)
    return h + v.log(), *_rescale(pi, log_z, v, z)


def _direction(
    pi: Tensor,
    p: Tensor,
    q: Tensor,
    r: Tensor,
    error: Tensor,
    moving: Tensor,
    weak: Tensor,
    method: str,
    low: bool,
) -> Tensor:
    """The Newton direction; ``low``: of a single problem, in float32 as long as that makes it fall fast."""
    lam = LEVENBERG * error
    r = r - p * r.sum(-1, keepdim=True)  # rounding leaves a sum
    short = pi.shape[-2]
    if method == "newton" or (method == "auto" and short <= DENSE_LIMIT):
        d = dense_direction(pi, p, q, r, lam)
    else:
        hybrid = method == "auto" and short <= HYBRID_LIMIT
        goal = error.sqrt().clamp_max(0.1)
        cap = max(32, short // 8) if hybrid else 200
        good = torch.zeros_like(moving)
        if low and not any_true(weak):
            # another step costs more than a few more iterations
            tight = torch.minimum(goal, error**0.9).clamp_min(1e-6)
            # what would be a denormal, slow in every mat-vec, is cut off
            rounded = pi.clamp_min(math.exp(FLOOR)).to(torch.float32)
            d, good = cg_direction(rounded, p, q, r, lam, tight, cap)
        if not low or any_true(~good):
            d, good = cg_direction(pi, p, q, r, lam, goal, cap)
        if hybrid and any_true(moving & ~good):
            d = torch.where(good[:, None], d, dense_direction(pi, p, q, r, lam))
    d = torch.where(d.isfinite(), d, 0.0)
    return d - (p * d).sum(-1, keepdim=True)


def _step(
    pi: Tensor,
    h: Tensor,
    log_z: Tensor,
    p: Tensor,
    q: Tensor,
    s: Tensor,
    r: Tensor,
    d: Tensor,
    error: Tensor,
    moving: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """``h += t d`` for the first accepted length, one Sinkhorn sweep if there is none, nothing if not moving.

    A step is accepted if the concave semi-dual rises enough (Armijo), or, where its rise drowns in rounding, if
    the residual falls.
    """
    slope = (r * d).sum(-1)
    along = (p * d).sum(-1)
    length = (LONGEST / d.abs().amax(-1)).clamp_max(1.0)
    accepted = ~moving
    factor, divisor = torch.ones_like(p), torch.ones_like(q)
    for _ in range(TRIALS):
        v = (length[:, None] * d).exp()
        z = times_transposed(pi, v)
        rise = length * along - (q * z.log()).sum(-1)
        error_there = (p - v * times(pi, q / z)).abs().sum(-1)
        good = (slope > 0) & (rise > RISE) & (rise >= 1e-4 * length * slope)
        good = (good | ((error_there <= 0.7 * error) & (rise > -RISE))) & ~accepted
        factor = torch.where(good[:, None], v, factor)
        divisor = torch.where(good[:, None], z, divisor)
        accepted = accepted | good
        if not any_true(~accepted):
            break
        length = torch.where(accepted, length, SHRINK * length)
    if any_true(~accepted):
        sweep = torch.where(p > 0, (p / s).clamp(1 / SWEEP_LIMIT, SWEEP_LIMIT), 1.0)
        factor = torch.where(accepted[:, None], factor, sweep)
        divisor = torch.where(accepted[:, None], divisor, times_transposed(pi, factor))
    return h + factor.log(), *_rescale(pi, log_z, factor, divisor)
