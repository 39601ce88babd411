"""Entropic transport between point clouds whose plan does not fit into memory: every pass forms it tile by tile.

Two problems, of weights with sum 1, relative to the product of the weights: between two clouds, and of one cloud with
itself. Potentials are float64. Marginals, on which the certificate rests, are evaluated in float64; the products inside
conjugate gradients, which only choose a direction, in float32. divergence.md derives both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from couplings.transport.api import solve

BUDGET = 2**21  # entries of a tile: 16 MiB in float64
ROWS = 64  # and of its rows
SAMPLE = 1024  # points of each cloud that are solved densely for a start
PASSES = 1000  # cap on passes over all pairs
MISLED = 0.3  # error of a start that is too large to begin with
DOUBLINGS = 12  # of epsilon, to find a better one
ANNEAL_AT = 1e-2  # error at which epsilon is halved again
TRIALS = 5
SHRINK = 0.4
FALL = 0.7  # an error that falls to this part of itself is progress
RISE, ROUGH_RISE = 1e-9, 1e-3  # and so is a dual that rises by more, relative to epsilon
ROUGH = 3e-2  # error above which the next iterate is evaluated in the rough precision
LONGEST = 50.0  # longest step in logits
LEVENBERG = 1e-3
PATIENCE = 20  # steps without progress
CONJUGATE = 100  # products per step
TINY = 1e-14  # least entry of M's diagonal, relative to the largest
SINGLE_LOGITS = 2.0**14  # logits up to which float32 tiles give a usable direction
LOG2E = math.log2(math.e)
LOWEST = {torch.float32: -100.0, torch.float64: -1000.0}  # base-2 logits below are zero, and slow
HIGHEST = {torch.float32: 100.0, torch.float64: 1000.0}


class Solution(NamedTuple):
    """Potentials of ``P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon)`` in cost units, and what they cost."""

    f: Tensor
    g: Tensor
    value: Tensor  # of the dual there: right to second order in the residual
    residual: Tensor  # L1 error of both marginals, float64
    passes: int


class Clouds:
    """Points ``x`` (n, d) and ``y`` (m, d), float64, with positive weights ``a`` and ``b`` of sum 1."""

    def __init__(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, epsilon: float, p: float) -> None:
        self.x, self.y, self.a, self.b, self.epsilon, self.p = x, y, a, b, epsilon, p
        self.scale = LOG2E / epsilon
        rows = max(1, min(ROWS, BUDGET // y.shape[0], x.shape[0]))
        self.blocks = [slice(i, i + rows) for i in range(0, x.shape[0], rows)]
        reach = x.square().sum(-1).max().sqrt() + y.square().sum(-1).max().sqrt()
        # the precision in which directions are sought
        self.rough = torch.float32 if float(reach) ** p * self.scale <= SINGLE_LOGITS else torch.float64

    def logits(self, f: Tensor, g: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """``(f_i + g_j - C_ij) / epsilon`` to base 2, block of rows by block of rows, in memory that is reused."""
        c = self.scale
        out = torch.empty((min(len(self.x), self.blocks[0].stop), len(self.y)), dtype=dtype, device=f.device)
        if self.p == 2:
            left = torch.cat([self.x * (2 * c), ((f - self.x.square().sum(-1)) * c)[:, None]], -1)
            left = torch.cat([left, torch.ones_like(left[:, :1])], -1).to(dtype)
            right = torch.cat([self.y, torch.ones_like(self.y[:, :1])], -1)
            right = torch.cat([right, ((g - self.y.square().sum(-1)) * c)[:, None]], -1).to(dtype).mT
            for rows in self.blocks:
                part = left[rows]
                yield rows, torch.mm(part, right, out=out[: len(part)])
            return
        x, y, f, g = self.x.to(dtype), self.y.to(dtype), (f * c).to(dtype), (g * c).to(dtype)
        for rows in self.blocks:
            cost = distances(x[rows], y)
            if self.p != 1:
                cost = cost.pow_(self.p)
            yield rows, cost.mul_(-c).add_(f[rows, None]).add_(g)

    def kernel(self, f: Tensor, g: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The plan's density ``exp((f_i + g_j - C_ij) / epsilon)``, block by block."""
        for rows, tile in self.logits(f, g, dtype):
            yield rows, tile.clamp_(LOWEST[dtype], HIGHEST[dtype]).exp2_()

    def softmin(self, g: Tensor, dtype: torch.dtype, column: Tensor | None = None) -> Tensor:
        """``f`` for which the row marginals are exact; adds the column sums, relative to ``b``, to ``column``."""
        f = torch.empty_like(self.a)
        a, b = self.a.to(dtype), self.b.to(dtype)
        for rows, tile in self.logits(torch.zeros_like(self.a), g, dtype):
            top = tile.amax(-1)
            tile.sub_(top[:, None]).clamp_(min=LOWEST[dtype]).exp2_()
            total = tile @ b
            f[rows] = (top + total.log2()).to(f.dtype) / -self.scale
            if column is not None:
                column += (a[rows] / total) @ tile
        return f

    def at(self, epsilon: float) -> Clouds:
        """The same at another temperature."""
        return Clouds(self.x, self.y, self.a, self.b, epsilon, self.p)

    def sample(self, size: int) -> Clouds:
        """Every k-th point of each cloud."""
        i, j = (
            torch.arange(0, n, math.ceil(n / size), device=self.x.device) for n in (len(self.x), len(self.y))
        )
        a, b = self.a[i], self.b[j]
        return Clouds(self.x[i], self.y[j], a / a.sum(), b / b.sum(), self.epsilon, self.p)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances from differences, so that equal points are at distance 0 exactly."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def power_cost(x: Tensor, y: Tensor, p: float) -> Tensor:
    """``|x_i - y_j|^p`` of float64 points."""
    if p == 2:
        inner = x @ y.mT
        squares = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :]
        return inner.mul_(-2).add_(squares).clamp_(min=0)  # rounding may leave -1e-16
    out = distances(x, y)
    return out if p == 1 else out.pow_(p)


def solve_clouds(clouds: Clouds, goal: float, itself: bool) -> Solution:
    """Newton and conjugate gradients from a dense solution of a sample; annealed where the sample misleads.

    Args:
        clouds: The problem.
        goal: L1 error of the marginals at which to stop.
        itself: ``x`` is ``y`` and ``a`` is ``b``: one potential, half the work.

    Returns:
        The best iterate.
    """
    kind = _OneCloud if itself else _TwoClouds
    problem = kind(clouds)
    now, passes, doublings = problem.start(), 2, 0
    while not float(now.error) <= MISLED and doublings < DOUBLINGS:
        doublings += 1
        now = kind(clouds.at(clouds.epsilon * 2.0**doublings)).start()
        passes += 2
    while doublings > 0:
        now, used = _newton(kind(clouds.at(clouds.epsilon * 2.0**doublings)), now, ANNEAL_AT, PASSES)
        doublings -= 1
        colder = kind(clouds.at(clouds.epsilon * 2.0**doublings))
        now = colder.swept(colder.evaluate(now.g, clouds.rough), clouds.rough)
        passes += used + 2
    now, used = _newton(problem, now, goal, PASSES - passes)
    if now.dtype != torch.float64:  # a loose goal: the certificate is still evaluated in float64
        now = problem.evaluate(now.g, torch.float64)
    return Solution(now.f, now.g, now.dual, now.error, passes + used)


class _Iterate(NamedTuple):
    f: Tensor
    g: Tensor
    log_column: Tensor  # log of actual over wanted mass; 0 at the solution
    error: Tensor  # L1, both marginals
    dual: Tensor
    dtype: torch.dtype  # of the pass that found them


class _TwoClouds:
    """The semi-dual of ``g``: rows are exact, ``M = diag(b column) - b K' a K b``."""

    constant = True  # M 1 = 0

    def __init__(self, clouds: Clouds) -> None:
        self.clouds, self.weights = clouds, clouds.b

    def start(self) -> _Iterate:
        """From the potential of a sample of both clouds, extended by its optimality condition; then a sweep."""
        clouds = self.clouds
        small = clouds.sample(SAMPLE)
        cost = power_cost(small.x, small.y, clouds.p)
        f, _ = solve(cost, small.a, small.b, epsilon=clouds.epsilon, on_fail="ignore").potentials
        there = Clouds(clouds.y, small.x, clouds.b, small.a, clouds.epsilon, clouds.p)
        g = there.softmin(f - clouds.epsilon * small.a.log(), torch.float64)
        return self.swept(self.evaluate(g, clouds.rough), clouds.rough)

    def evaluate(self, g: Tensor, dtype: torch.dtype) -> _Iterate:
        """One pass in that precision."""
        a, b = self.clouds.a, self.clouds.b
        column = torch.zeros_like(b)
        f = self.clouds.softmin(g, dtype, column)
        error, dual = (b * (column - 1).abs()).sum(), (a * f).sum() + (b * g).sum()
        return _Iterate(f, g, column.clamp_min(1e-250).log(), error, dual, dtype)

    def swept(self, now: _Iterate, dtype: torch.dtype) -> _Iterate:
        """A Sinkhorn sweep."""
        return self.evaluate(now.g - self.clouds.epsilon * now.log_column, dtype)

    def matrix(self, now: _Iterate, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """Products with M, a pass each, and its diagonal: the exact one, a pass more, where much cancels in it."""
        a, b, column = self.clouds.a, self.clouds.b, now.log_column.exp()
        low_a, low_b = a.to(dtype), b.to(dtype)
        diagonal = b * column
        if dtype == torch.float64:
            diagonal = torch.zeros_like(b)
            for rows, tile in self.clouds.kernel(now.f, now.g, dtype):
                tile.mul_(b)
                diagonal += a[rows] @ tile.addcmul_(tile, tile, value=-1)
            diagonal = diagonal.clamp_min(TINY * diagonal.max())

        def times(u: Tensor) -> Tensor:
            out, bu = torch.zeros_like(low_b), low_b * u.to(dtype)
            for rows, tile in self.clouds.kernel(now.f, now.g, dtype):
                out += (low_a[rows] * (tile @ bu)) @ tile
            return b * (column * u - out.to(u.dtype))

        return times, diagonal


class _OneCloud:
    """One potential, ``f = softmin f``: ``M = diag(a column) + a K a``, of condition 2 where the kernel is positive."""

    constant = False

    def __init__(self, clouds: Clouds) -> None:
        self.clouds, self.weights = clouds, clouds.a

    def start(self) -> _Iterate:
        """As above."""
        clouds = self.clouds
        small = clouds.sample(SAMPLE)
        cost = power_cost(small.x, small.y, clouds.p)
        f, g = solve(cost, small.a, small.b, epsilon=clouds.epsilon, on_fail="ignore").potentials
        there = Clouds(clouds.x, small.x, clouds.a, small.a, clouds.epsilon, clouds.p)
        f = there.softmin(0.5 * (f + g) - clouds.epsilon * small.a.log(), torch.float64)
        return self.swept(self.evaluate(f, clouds.rough), clouds.rough)

    def evaluate(self, f: Tensor, dtype: torch.dtype) -> _Iterate:
        """One pass in that precision."""
        a, eps = self.clouds.a, self.clouds.epsilon
        log_column = ((f - self.clouds.softmin(f, dtype)) / eps).clamp(-575.0, 575.0)
        column = log_column.exp()
        error, dual = 2 * (a * (column - 1).abs()).sum(), 2 * (a * f).sum() - eps * (a * (column - 1)).sum()
        return _Iterate(f, f, log_column, error, dual, dtype)

    def swept(self, now: _Iterate, dtype: torch.dtype) -> _Iterate:
        """The averaged sweep (Feydy et al. 2019), which contracts where the plain one oscillates."""
        return self.evaluate(now.g - 0.5 * self.clouds.epsilon * now.log_column, dtype)

    def matrix(self, now: _Iterate, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """Products with M, a pass each, and a diagonal."""
        a, column = self.clouds.a, now.log_column.exp()
        low_a = a.to(dtype)

        def times(u: Tensor) -> Tensor:
            out, au = torch.empty_like(u), low_a * u.to(dtype)
            for rows, tile in self.clouds.kernel(now.f, now.g, dtype):
                out[rows] = (tile @ au).to(u.dtype)
            return a * (column * u + out)

        return times, a * column


def _newton(problem: _TwoClouds | _OneCloud, now: _Iterate, goal: float, budget: int) -> tuple[_Iterate, int]:
    """Newton on the logarithms of the column sums; a step that is not accepted gives way to a sweep."""
    eps, weights = problem.clouds.epsilon, problem.weights
    best, passes, idle, low = now, 0, 0, problem.clouds.rough
    while passes < budget and idle < PATIENCE:
        error = float(now.error)
        if error <= goal:
            if now.dtype == torch.float64:
                break
            now = best = problem.evaluate(
                now.g, torch.float64
            )  # float32 may see an error of 0 where there is one
            passes += 1
            continue
        times, diagonal = problem.matrix(now, low)
        actual = weights * now.log_column.exp()
        tolerance = max(min(0.1, error), 0.3 * goal / error)
        d, used = _conjugate_gradients(
            times,
            -actual * now.log_column,
            diagonal,
            actual,
            LEVENBERG * min(error, 1.0) * weights,
            tolerance,
            problem.constant,
        )
        passes += used
        length = min(1.0, LONGEST / max(float(d.abs().max()), 1e-300))
        # the next error is about the square of this one: rough while that is all there is to see
        dtype = low if error > ROUGH else torch.float64
        rise = RISE if dtype == torch.float64 and now.dtype == dtype else ROUGH_RISE
        for _ in range(TRIALS):
            trial = problem.evaluate(now.g + (eps * length) * d, dtype)
            passes += 1
            if float(trial.error) <= FALL * error or float(trial.dual - now.dual) > rise * eps:
                break
            length *= SHRINK
        else:
            trial = problem.swept(now, dtype)
            passes += 1
        now = trial
        if float(now.error) > 0.3 * error and error < ROUGH:  # nearly hard plans: float32 sees nothing of M
            low = torch.float64
        idle = 0 if float(now.error) < 0.9 * float(best.error) else idle + 1
        best = now if float(now.error) < float(best.error) else best
    return best, passes


def _conjugate_gradients(
    times: Callable[[Tensor], Tensor],
    right: Tensor,
    diagonal: Tensor,
    mass: Tensor,
    shift: Tensor,
    tolerance: float,
    constant: bool,
) -> tuple[Tensor, int]:
    """Solve ``(M + diag(shift)) d = right`` with a diagonal preconditioner; ``constant``: M 1 = 0 and right'1 = 0."""
    total = mass.sum()

    def project(v: Tensor) -> Tensor:
        return v - mass * (v.sum() / total) if constant else v

    left = project(right)
    inverse = 1 / (diagonal + shift)
    d = torch.zeros_like(left)
    direction = z = inverse * left
    rz = (left * z).sum()
    goal = tolerance * float(left.abs().sum())
    used = 0
    while used < CONJUGATE:
        image = times(direction) + shift * direction
        used += 1
        curvature = (direction * image).sum()
        if float(curvature) <= 0:
            break
        step = rz / curvature
        d = d + step * direction
        left = project(left - step * image)
        if float(left.abs().sum()) <= goal:
            break
        z = inverse * left
        before, rz = rz, (left * z).sum()
        direction = z + (rz / before) * direction
    return d, used
