"""The semi-dual Newton solver: annealed, damped, every item on its own clock."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from couplings.transport._progress import all_true, any_true
from couplings.transport.newton_cg import cg_direction, dense_direction, times, times_transposed
from couplings.transport.sinkhorn import fill_zero_masses

DENSE_LIMIT = 256  # shorter side up to which one factorisation is cheaper than conjugate gradients
HYBRID_LIMIT = 2048  # up to here "auto" may factorise a step that conjugate gradients do not finish
CHUNK = 2**16  # entries of a batch that are worked on together on a CPU: what stays in cache

ANNEAL_FROM = 16.0  # logits of the first, warmest problem span this much
ANNEAL_BY = 2.0  # inverse temperature grows by this factor
ANNEAL_AT = 1e-2  # residual at which it grows
WARM_SWEEPS = 3  # Sinkhorn sweeps after each change of temperature
LEVENBERG = 1e-3  # damping relative to the residual
SWEEP_LIMIT = 1e30  # factor by which a Sinkhorn sweep may move one entry
TRIALS = 8  # step lengths tried
SHRINK = 0.4
REFRESH = 8  # steps between two evaluations of the kernel from its logits


class _Precision(NamedTuple):
    """What depends on the precision of the kernel and its mat-vecs."""

    dtype: torch.dtype
    floor: float  # logits below it are cut off: their sum cannot be told from 0, and exp of less is slow
    far: float  # logits by which potentials may move before the kernel is evaluated again
    rise: float  # rises of the semi-dual below it are rounding
    longest: float  # longest step in logits; what was cut off must stay negligible
    patience: int  # steps without progress after which an item has stalled
    balance: float  # also asked of every single column: its relative error, so that small masses count


HIGH = _Precision(torch.float64, -500.0, 100.0, 1e-12, 50.0, 60, 1e-6)
LOW = _Precision(torch.float32, -80.0, 20.0, 1e-5, 20.0, 6, torch.inf)
LOW_SIZE = 2**14  # entries of a problem from which it pays
LOW_REACH = 3e-7  # residual that float32 mat-vecs can reach
LOW_HANDOVER = 1e-5  # residual at which they hand over, if more is asked


class _State(NamedTuple):
    """Where an item stands, all ``(B, ...)``."""

    h: Tensor  # potential in logits
    beta: Tensor  # inverse temperature, 1 = the problem
    taken: Tensor  # Newton steps
    warm: Tensor  # the temperature has just changed


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
    """In logits: ``h = ghat / epsilon``, ``x = C / epsilon``. Large problems begin with a float32 kernel."""
    state = _State(
        h=torch.zeros_like(p),
        beta=ANNEAL_FROM / _span(x, p, q).clamp_min(ANNEAL_FROM),
        taken=torch.zeros_like(p[:, 0], dtype=torch.int64),
        warm=torch.ones_like(p[:, 0], dtype=torch.bool),
    )
    if x.shape[-1] * x.shape[-2] >= LOW_SIZE:
        reachable = tolerance if tolerance >= LOW_REACH else LOW_HANDOVER
        state = _iterate(x, p, q, state, method, reachable, iterations, LOW)
    state = _iterate(x, p, q, state, method, tolerance, iterations, HIGH)
    return fill_zero_masses(x, state.h, p, q), state.taken


def _iterate(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    state: _State,
    method: str,
    tolerance: float,
    iterations: int,
    precision: _Precision,
) -> _State:
    """Steps in one precision until every item is done; potentials are float64 in both."""
    log_p = p.log()
    h, beta, taken, warm = state.h, state.beta, state.taken, state.warm
    pi, reference = _kernel(x, h, beta, log_p, precision), h
    done = torch.zeros_like(warm)
    best, best_h = torch.full_like(beta, torch.inf), h
    since = torch.zeros_like(beta)
    stop = all_true()
    for step in range(iterations):
        if any_true(warm):
            h, pi = _sweeps(pi, h, p, q, warm)
        stale = ~done & ((h - reference).abs().amax(-1) > precision.far)
        stale = stale | (~done & (step % REFRESH == REFRESH - 1))
        if any_true(stale):
            pi = _choose(stale, _kernel(x, h, beta, log_p, precision), pi)
            reference = torch.where(stale[:, None], h, reference)
        s = times(pi, q)
        r = p - s
        error = r.abs().sum(-1)
        cold = beta >= 1
        # the best iterate at the final temperature is the answer
        better = cold & ~done & (error < best)
        since = torch.where(cold & ~(error < 0.9 * best), since + 1, 0)
        best, best_h = torch.where(better, error, best), torch.where(better[:, None], h, best_h)
        balance = torch.where(p > 0, (s / p - 1).abs(), 0).amax(-1)
        done = done | ~error.isfinite() | (cold & (error <= tolerance) & (balance <= precision.balance))
        done = done | (since >= precision.patience)
        if stop(done):
            break
        warm = ~done & ~cold & (error < ANNEAL_AT)
        colder = torch.where(warm, (beta * ANNEAL_BY).clamp_max(1.0), beta)
        h = h * (colder / beta)[:, None]
        beta = colder
        if any_true(warm):
            pi = _choose(warm, _kernel(x, h, beta, log_p, precision), pi)
            reference = torch.where(warm[:, None], h, reference)
        moving = ~done & ~warm
        if any_true(moving):
            d = _direction(pi, p, q, r, error, moving, method)
            v = _step_factor(pi, p, q, s, r, d, error, moving, precision)
            h, pi = h + v.log(), _rescale(pi, v, moving)
            taken = taken + moving
    return _State(torch.where(best.isfinite()[:, None], best_h, h), beta, taken, warm & ~done)


def _span(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Range of the logits that take part, ``(B,)``: padding must not change the path of the solve."""
    low, high = x.amin((-1, -2)), x.amax((-1, -2))  # torch.aminmax takes ten times as long
    if not any_true(~(high < torch.inf) | (p == 0).any(-1) | (q == 0).any(-1)):
        return high - low
    out = ~((p > 0)[:, :, None] & (q > 0)[:, None, :] & (x < torch.inf))
    return x.masked_fill(out, -torch.inf).amax((-1, -2)) - x.masked_fill(out, torch.inf).amin((-1, -2))


def _choose(flag: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Item by item ``new`` where ``flag`` else ``old``; without a copy where all items agree on a CPU."""
    if not any_true(~flag):
        return new
    return torch.where(flag[:, None, None], new, old)


def _kernel(x: Tensor, h: Tensor, beta: Tensor, log_p: Tensor, precision: _Precision) -> Tensor:
    """``pi = softmax_j(log p_j + h_j - beta x_jl)``, ``(B, s, l)``."""
    logits = (x * -beta[:, None, None]).add_((log_p + h)[:, :, None])
    top = logits.amax(-2, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)  # a column without an allowed pair has no mass
    logits = logits.sub_(top).to(precision.dtype).clamp_(min=precision.floor).exp_()
    return logits.div_(logits.sum(-2, keepdim=True))


def _rescale(pi: Tensor, v: Tensor, active: Tensor) -> Tensor:
    """The kernel after ``h += log v``, in place and without exponentials; an inactive item (v = 1) keeps its bits."""
    z = torch.where(active[:, None], times_transposed(pi, v), 1.0)
    return pi.mul_(v[:, :, None].to(pi.dtype)).div_(z[:, None, :].to(pi.dtype))


def _sweeps(pi: Tensor, h: Tensor, p: Tensor, q: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """A few Sinkhorn sweeps of the active items, as mat-vecs on the absorbed kernel."""
    v = torch.ones_like(p)
    use = active[:, None] & (p > 0)
    for _ in range(WARM_SWEEPS):
        s = times(pi, q / times_transposed(pi, v))  # the mass that column scalings v give is v * s
        v = torch.where(use, (p / s).clamp(1 / SWEEP_LIMIT, SWEEP_LIMIT), v)
    return h + v.log(), _rescale(pi, v, active)


def _direction(
    pi: Tensor, p: Tensor, q: Tensor, r: Tensor, error: Tensor, moving: Tensor, method: str
) -> Tensor:
    lam = LEVENBERG * error
    r = r - p * r.sum(-1, keepdim=True)  # float32 mat-vecs leave a sum
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
    pi: Tensor,
    p: Tensor,
    q: Tensor,
    s: Tensor,
    r: Tensor,
    d: Tensor,
    error: Tensor,
    moving: Tensor,
    precision: _Precision,
) -> Tensor:
    """``v = exp(t d)`` for the first accepted length, one Sinkhorn sweep if there is none, 1 if not moving.

    A step is accepted if the concave semi-dual rises enough (Armijo), or, where its rise drowns in rounding, if
    the residual falls.
    """
    slope = (r * d).sum(-1)
    length = (precision.longest / d.abs().amax(-1)).clamp_max(1.0)
    accepted = ~moving
    factor = torch.ones_like(p)
    for _ in range(TRIALS):
        v = (length[:, None] * d).exp()
        z = times_transposed(pi, v)
        rise = length * (p * d).sum(-1) - (q * z.log()).sum(-1)
        error_there = (p - v * times(pi, q / z)).abs().sum(-1)
        good = (slope > 0) & (rise > precision.rise) & (rise >= 1e-4 * length * slope)
        good = good | (error_there <= 0.7 * error)
        factor = torch.where((good & ~accepted)[:, None], v, factor)
        accepted = accepted | good
        if not any_true(~accepted):
            return factor
        length = torch.where(accepted, length, SHRINK * length)
    sweep = torch.where(p > 0, (p / s).clamp(1 / SWEEP_LIMIT, SWEEP_LIMIT), 1.0)
    return torch.where(accepted[:, None], factor, sweep)
