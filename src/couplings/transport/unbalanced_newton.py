"""Unbalanced transport: the annealed semi-dual Newton loop, every item on its own clock."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from couplings.transport._progress import all_true, any_true
from couplings.transport.newton_cg import RIDGE, TINY, cg_direction, times, times_transposed

DENSE_LIMIT = 256  # shorter side up to which one factorisation is cheaper than conjugate gradients
HYBRID_LIMIT = 2048  # up to here "auto" may factorise a step that conjugate gradients do not finish
CHUNK = 2**16  # entries of a batch that are worked on together on a CPU: what stays in cache

ANNEAL_FROM = 16.0  # logits of the first, warmest problem span this much
ANNEAL_BY = 2.0  # inverse temperature grows by this factor
ANNEAL_AT = 1e-2  # relative residual at which it grows
WARM_SWEEPS = 3  # sweeps after each change of temperature
LEVENBERG = 1e-3  # damping relative to the residual
TRIALS = 8  # step lengths tried
SHRINK = 0.4
REFRESH = 8  # steps between two evaluations of the kernel from its logits
FAR = 100.0  # logits by which potentials may move before the kernel is evaluated again
LONGEST = 50.0  # longest step in logits; what was cut off must stay negligible
RISE = 1e-12  # rises of the semi-dual below it, relative to the plan's mass, are rounding
PATIENCE = 60  # steps without progress after which an item has stalled
BALANCE = 1e-6  # asked of every column's relative error
FLOOR = -300.0  # kernel logits and log masses are cut off here: exp of less cannot be told from 0
SEEN = 1e-120  # columns with a smaller part of the mass are left out of the balance


class _State(NamedTuple):
    """A batch of iterates, all ``(B, ...)``; masses are divided by ``exp`` of the largest log row mass."""

    h: Tensor  # short potential in logits
    pi: Tensor  # the plan's columns, each divided by its mass
    r: Tensor  # masses of the long side, optimal for h
    s: Tensor  # masses of the short side
    log_beta: Tensor  # masses of the short side that h calls for


def unbalanced_potential(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    k_p: Tensor,
    k_q: Tensor,
    method: str,
    tolerance: float,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """Solve a batch of unbalanced problems for the short side's potential; unbalanced.md derives it.

    Args:
        x: ``C / epsilon`` ``(B, s, l)`` float64; ``+inf`` forbids a pair.
        p: Short masses ``(B, s)``; an entry with mass has an allowed partner with mass.
        q: Long masses ``(B, l)``, likewise.
        k_p: ``epsilon / tau`` of the short side ``(B,)``, 0 for an exact marginal.
        k_q: The same of the long side; not both are 0.
        method: ``"newton"``, ``"newton_cg"``, ``"auto"`` or ``"sinkhorn"``.
        tolerance: Error of the short side's optimality, relative to the plan's mass, at which an item stops.
        iterations: Cap on steps and temperature changes together.

    Returns:
        ``h = g / epsilon`` ``(B, s)``, 0 where there is no mass, and the steps taken ``(B,)``.
    """
    batch, short, long = x.shape
    size = batch if x.device.type != "cpu" else max(1, CHUNK // max(1, short * long))
    potentials, steps = [torch.zeros_like(p[:0])], [k_p.new_zeros(0, dtype=torch.int64)]
    for start in range(0, batch, size):
        part = slice(start, start + size)
        loop = _Loop(x[part], p[part], q[part], k_p[part], k_q[part], method)
        h, taken = loop.run(tolerance, iterations)
        potentials.append(h)
        steps.append(taken)
    return torch.cat(potentials), torch.cat(steps)


class _Loop:
    """One chunk of a batch."""

    def __init__(self, x: Tensor, p: Tensor, q: Tensor, k_p: Tensor, k_q: Tensor, method: str) -> None:
        self.method = method
        self.some_p, self.some_q = p > 0, q > 0
        idle = ~(self.some_p[:, :, None] & self.some_q[:, None, :]) | (x == torch.inf)
        self.x, self.idle = torch.where(idle, 0.0, x), idle
        self.log_p = torch.where(self.some_p, p, 1.0).log()
        self.log_q = torch.where(self.some_q, q, 1.0).log()
        self.k_p, self.k_q = k_p, k_q

    def run(self, tolerance: float, iterations: int) -> tuple[Tensor, Tensor]:
        """Anneal and step until every item is done."""
        high = self.x.masked_fill(self.idle, -torch.inf).amax((-1, -2))
        low = self.x.masked_fill(self.idle, torch.inf).amin((-1, -2))
        something = high > -torch.inf
        span = torch.where(something, high - low, 0.0)
        beta = ANNEAL_FROM / span.clamp_min(ANNEAL_FROM)
        if self.method == "sinkhorn":
            beta = torch.ones_like(beta)
        taken = torch.zeros_like(beta, dtype=torch.int64)
        done, warm = ~something, something.clone()
        state = self.evaluate(torch.zeros_like(self.log_p), beta)
        reference = state.h
        best, best_h, since = torch.full_like(beta, torch.inf), state.h, torch.zeros_like(beta)
        stop = all_true()
        for step in range(iterations):
            if any_true(warm):
                for _ in range(WARM_SWEEPS):
                    swept = self.evaluate(state.h + self.sweep(state, beta), beta)
                    state = _choose(warm, swept, state)
                reference = torch.where(warm[:, None], state.h, reference)
            stale = ~done & ((state.h - reference).abs().amax(-1) > FAR)
            stale = stale | (~done & (step % REFRESH == REFRESH - 1))
            if any_true(stale):
                state = _choose(stale, self.evaluate(state.h, beta), state)
                reference = torch.where(stale[:, None], state.h, reference)
            error = relative_error(state)
            cold = beta >= 1
            # the best iterate at the final temperature is the answer
            better = cold & ~done & (error < best)
            since = torch.where(cold & ~(error < 0.9 * best), since + 1, 0)
            best, best_h = torch.where(better, error, best), torch.where(better[:, None], state.h, best_h)
            done = done | ~error.isfinite() | (cold & (error <= tolerance) & (self.balance(state) <= BALANCE))
            done = done | (since >= (iterations if self.method == "sinkhorn" else PATIENCE))
            if stop(done):
                break
            warm = ~done & ~cold & (error < ANNEAL_AT)
            colder = torch.where(warm, (beta * ANNEAL_BY).clamp_max(1.0), beta)
            if any_true(warm):
                state = _choose(warm, self.evaluate(state.h * (colder / beta)[:, None], colder), state)
                reference = torch.where(warm[:, None], state.h, reference)
            beta = colder
            moving = ~done & ~warm
            if any_true(moving):
                if self.method == "sinkhorn":
                    moved = self.evaluate(state.h + self.sweep(state, beta), beta)
                else:
                    moved = self.newton(state, beta, error, moving)
                state = _choose(moving, moved, state)
                taken = taken + moving
        h = torch.where(best.isfinite()[:, None], best_h, state.h)
        return torch.where(self.some_p & something[:, None], h, 0.0), taken

    # -- one iterate

    def rates(self, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``k_p`` and ``lam`` at this temperature, and ``1 - lam`` without cancellation, all ``(B, 1)``."""
        k_q = (self.k_q / beta)[:, None]
        lam = 1 / (1 + k_q)
        return (self.k_p / beta)[:, None], lam, k_q * lam

    def evaluate(self, h: Tensor, beta: Tensor) -> _State:
        """The iterate at ``h``, after the best common shift of ``h``, from logits."""
        k_p, lam, rest = self.rates(beta)
        logits = (h[:, :, None] - self.x * beta[:, None, None]).masked_fill_(self.idle, -torch.inf)
        top = logits.amax(-2, keepdim=True)
        top = torch.where(top == -torch.inf, 0.0, top)
        pi = logits.sub_(top).clamp_(min=FLOOR).exp_().masked_fill_(self.idle, 0.0)
        z = pi.sum(-2, keepdim=True)
        z = torch.where(z == 0, 1.0, z)
        pi = pi.div_(z)
        log_z = (top + z.log())[:, 0, :]
        log_r = torch.where(self.some_q, lam * self.log_q + rest * log_z, -torch.inf)
        log_beta = torch.where(self.some_p, self.log_p - k_p * h, -torch.inf)
        shift = (log_beta.logsumexp(-1, keepdim=True) - log_r.logsumexp(-1, keepdim=True)) / (rest + k_p)
        shift = torch.where(shift.isfinite(), shift, 0.0)
        log_r, log_beta = log_r + rest * shift, log_beta - k_p * shift
        unit = log_r.amax(-1, keepdim=True)
        unit = torch.where(unit == -torch.inf, 0.0, unit)
        r = torch.where(self.some_q, (log_r - unit).clamp_min(FLOOR).exp(), 0.0)
        return _State(h + shift, pi, r, times(pi, r), log_beta - unit)

    def sweep(self, state: _State, beta: Tensor) -> Tensor:
        """How far one Sinkhorn sweep moves ``h``: exact maximisation over it, the other side held."""
        k_p, *_ = self.rates(beta)
        return self.logs(state) / (1 + k_p)

    def logs(self, state: _State) -> Tensor:
        """``log`` of called-for over actual mass, entry by entry of the short side."""
        ratio = state.log_beta - state.s.clamp_min(TINY[state.s.dtype]).log()
        return torch.where(self.some_p, ratio, 0.0)

    def balance(self, state: _State) -> Tensor:
        """The largest relative error of a column that has some mass, ``(B,)``."""
        matters = state.s > SEEN * state.s.sum(-1, keepdim=True)
        return torch.where(matters, self.logs(state).abs(), 0.0).amax(-1)

    # -- a step

    def newton(self, state: _State, beta: Tensor, error: Tensor, moving: Tensor) -> _State:
        """A Newton step on the log balances, accepted if the semi-dual rises or the error falls; else a sweep."""
        k_p, lam, rest = self.rates(beta)
        logs = self.logs(state)
        right = state.s * logs
        right = right - state.s * (right.sum(-1, keepdim=True) / state.s.sum(-1, keepdim=True))
        extra = state.s * (rest + k_p + LEVENBERG * error[:, None])
        d = self.direction(state.pi, lam * state.r, extra, right, error, moving)
        d = torch.where(d.isfinite() & self.some_p, d, 0.0)
        called = state.log_beta.clamp_max(-FLOOR).exp()
        slope = ((called - state.s) * d).sum(-1)
        length = (LONGEST / d.abs().amax(-1)).clamp_max(1.0)
        accepted, taken = ~moving, state
        for _ in range(TRIALS):
            move = length[:, None] * d
            trial, rise = self.moved(state, move, called, k_p, rest)
            good = (slope > 0) & (rise > RISE * called.sum(-1)) & (rise >= 1e-4 * length * slope)
            good = (good | (relative_error(trial) <= 0.7 * error)) & ~accepted
            taken = _choose(good, trial, taken)
            accepted = accepted | good
            if not any_true(~accepted):
                return taken
            length = torch.where(accepted, length, SHRINK * length)
        return _choose(accepted, taken, self.evaluate(state.h + logs / (1 + k_p), beta))

    def moved(
        self, state: _State, move: Tensor, called: Tensor, k_p: Tensor, rest: Tensor
    ) -> tuple[_State, Tensor]:
        """The iterate at ``h + move``, best shift included, and the rise of the semi-dual: no new exponentials."""
        v = move.exp()
        z = times_transposed(state.pi, v)
        log_z = torch.where(z > 0, z, 1.0).log()
        r = state.r * (rest * log_z).exp()
        log_beta = state.log_beta - k_p * move
        shift = (log_beta.logsumexp(-1, keepdim=True) - r.sum(-1, keepdim=True).log()) / (rest + k_p)
        shift = torch.where(shift.isfinite(), shift, 0.0)
        rise = (called * relaxed(move + shift, k_p)).sum(-1) - (state.r * relaxed(log_z + shift, -rest)).sum(
            -1
        )
        pi = state.pi * v[:, :, None] / torch.where(z > 0, z, 1.0)[:, None, :]
        r = r * (rest * shift).exp()
        return _State(state.h + move + shift, pi, r, times(pi, r), log_beta - k_p * shift), rise

    def direction(
        self, pi: Tensor, rho: Tensor, extra: Tensor, right: Tensor, error: Tensor, moving: Tensor
    ) -> Tensor:
        short = pi.shape[-2]
        if self.method == "newton" or (self.method == "auto" and short <= DENSE_LIMIT):
            return graph_solve(pi, rho, extra, right)
        hybrid = self.method == "auto" and short <= HYBRID_LIMIT
        goal = error.sqrt().clamp_max(0.1)
        one = torch.ones_like(error)
        d, finished = cg_direction(pi, extra, rho, right, one, goal, short // 8 if hybrid else 200)
        if hybrid and any_true(moving & ~finished):
            d = torch.where(finished[:, None], d, graph_solve(pi, rho, extra, right))
        return d


def relative_error(state: _State) -> Tensor:
    """L1 distance of actual and called-for masses of the short side, relative to the mass ``(B,)``."""
    called = state.log_beta.clamp_max(-FLOOR).exp()
    return (state.s - called).abs().sum(-1) / state.s.sum(-1)


def relaxed(u: Tensor, k: Tensor) -> Tensor:
    """``(1 - exp(-k u)) / k``, which is ``u`` at ``k = 0``."""
    return torch.where(k == 0, u, -torch.expm1(-k * u) / torch.where(k == 0, 1.0, k))


def graph_solve(pi: Tensor, rho: Tensor, extra: Tensor, right: Tensor) -> Tensor:
    """``v`` with ``(diag(pi rho) - pi diag(rho) pi' + diag(extra)) v = right``, by one factorisation per item.

    The matrix is a graph's Laplacian plus a diagonal, and the diagonal may be tiny: then the constant is nearly in
    its kernel. The constant's part of the answer is known beforehand, since ``M 1 = extra``; what is left of the
    right-hand side sums to zero, its answer is orthogonal to ``extra``, and a rank-one term along ``extra`` makes the
    matrix regular without changing it.

    Args:
        pi: ``(B, s, l)``, columns sum to 1.
        rho: ``(B, l)``, non-negative.
        extra: ``(B, s)``, non-negative, not all zero.
        right: ``(B, s)``.

    Returns:
        ``(B, s)``, NaN where the factorisation failed.
    """
    total = extra.sum(-1, keepdim=True)
    constant = right.sum(-1, keepdim=True) / total
    half = pi * rho.sqrt()[:, None, :]
    weights = half @ half.mT
    weights.diagonal(dim1=-2, dim2=-1).zero_()
    scale = (weights.sum(-1) + extra).clamp_min(TINY[pi.dtype])
    root = scale.rsqrt()
    system = weights.neg_().mul_(root[:, :, None]).mul_(root[:, None, :])
    along = extra / total * root
    along = along / torch.linalg.vector_norm(along, dim=-1, keepdim=True)
    system.baddbmm_(along[:, :, None], along[:, None, :])
    system.diagonal(dim1=-2, dim2=-1).add_(1 + RIDGE)
    factor, info = torch.linalg.cholesky_ex(system)
    left = (right - constant * extra) * root
    v = root * torch.cholesky_solve(left[:, :, None], factor)[:, :, 0]
    v = v - (extra * v).sum(-1, keepdim=True) / total + constant
    return torch.where((info == 0)[:, None], v, torch.nan)


def _choose(flag: Tensor, new: _State, old: _State) -> _State:
    """Item by item ``new`` where ``flag`` else ``old``."""
    pairs = zip(new, old, strict=True)
    return _State(*(torch.where(flag.reshape(-1, *[1] * (a.dim() - 1)), a, b) for a, b in pairs))
