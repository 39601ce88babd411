"""The first part of a large solve on a CPU: one problem, a float32 kernel, and control flow in Python.

What is ``s x l`` is touched as little as possible: exponentials are taken once, temperatures change by squaring the
kernel, every step is a handful of mat-vecs and two multiplications in place. Vectors are float32, too; only the
potential gathers in float64. README.md, "The solver", has the method.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from couplings.transport.logits import kernel
from couplings.transport.newton_cg import TINY, conjugate_gradients

ANNEAL_FROM = 32.0  # logits of the first, warmest problem span at most this much
MOST_STAGES = 60  # of doublings
ANNEAL_AT = 1e-2  # residual at which inverse temperature doubles
WARM_SWEEPS = 3  # Sinkhorn sweeps after each change of temperature
LEVENBERG = 1e-2  # damping relative to the residual
SWEEP_LIMIT = 1e30  # factor by which a Sinkhorn sweep may move one entry
# Logits below it are cut off. What they stand for cannot be told from 0, and the distance to float32's least number
# is for rescaling: denormals slow every later pass down, forty times on some CPUs.
FLOOR = -60.0
FAR = 20.0  # logits by which potentials may move before the kernel is evaluated again
TRIALS = 4  # step lengths tried
SHRINK = 0.4
PATIENCE = 4  # steps without progress after which float64 has to go on
STEPS = 60
RISE = 1e-5  # rises of the semi-dual below it are rounding

REACH = 3e-7  # residual that float32 mat-vecs can reach
HANDOVER = 1e-6  # residual at which they hand over, if more is asked
HIGH_FLOOR = -500.0  # as FLOOR, in float64
BALANCE = 1e-6  # also asked of every single row in the end: its relative error, so that small masses count


class Start(NamedTuple):
    """How far float32 came."""

    h: Tensor  # potential in logits (s,) float64
    log_z: Tensor  # (l,) float64
    beta: float  # inverse temperature reached
    taken: int  # Newton steps
    done: bool  # the residual of a kernel straight from its logits is below the tolerance


def start_low(cost: Tensor, p: Tensor, q: Tensor, rate: Tensor, span: float, tolerance: float) -> Start:
    """Anneal and take Newton steps until the residual is below the tolerance or stops falling.

    Args:
        cost: ``(s, l)``, ``+inf`` forbids a pair.
        p: Short masses ``(s,)`` float64, summing to 1.
        q: Long masses ``(l,)`` float64, summing to 1.
        rate: ``1 / epsilon``.
        span: Range of the logits.
        tolerance: L1 error of the short marginal wanted in the end.

    Returns:
        Where the solve stands.
    """
    solve = _Low(cost, p, q, rate)
    certain = tolerance >= REACH
    start = solve.run(span, tolerance if certain else HANDOVER, certain)
    if certain or not solve.error <= HANDOVER or solve.beta < 1:
        return start
    done = solve.refine(p, q, tolerance)
    return Start(solve.h, solve.log_z, 1.0, start.taken + 1, done) if done else start


class _Low:
    """The iterate; ``pi`` and ``work`` are the only arrays ``(s, l)``: new memory takes as long as many mat-vecs."""

    def __init__(self, cost: Tensor, p: Tensor, q: Tensor, rate: Tensor) -> None:
        self.cost, self.rate = cost, rate
        self.log_p = p.log()
        self.p, self.q = p.float(), q.float()
        empty = self.p == 0
        self.empty = empty if bool(empty.any()) else None
        self.h = torch.zeros_like(p)
        self.log_z = torch.zeros_like(q)
        self.beta = 1.0
        self.pi: Tensor = torch.empty(cost.shape, dtype=torch.float32, device=cost.device)
        self.work: Tensor | None = None

    def run(self, span: float, tolerance: float, certain: bool) -> Start:
        span = min(max(span, ANNEAL_FROM), ANNEAL_FROM * 2.0**MOST_STAGES)
        first = self.beta = 2.0 ** -math.ceil(math.log2(span / ANNEAL_FROM))
        nearest = self.cost.amin(0).to(self.h.dtype) * (-self.beta * self.rate)
        self.log_z = torch.where(nearest.isfinite(), nearest, 0.0)
        self.build()
        self.sweep(WARM_SWEEPS)
        taken, best, since, sure = 0, math.inf, 0, False
        while True:
            if self.moved > FAR:
                self.build()
                self.measure()
            if self.beta < 1:
                if self.error < ANNEAL_AT:
                    self.cool()
                    self.sweep(WARM_SWEEPS)
                    continue
            elif self.error <= tolerance:
                if sure or not certain:
                    break
                self.build()  # what the kernel has gathered in roundings must not count as converged
                self.measure()
                sure = True
                continue
            else:
                since = 0 if self.error < 0.9 * best else since + 1
                best = min(best, self.error)
            if taken >= STEPS or since >= PATIENCE or not math.isfinite(self.error):
                break
            taken += 1
            sure = False
            if not self.newton_step():
                self.sweep(1)
        if not bool(self.h.isfinite().all()):
            return Start(torch.zeros_like(self.h), torch.zeros_like(self.log_z), first, taken, done=False)
        return Start(self.h, self.log_z, self.beta, taken, sure and self.error <= tolerance)

    def build(self) -> None:
        """The kernel from its logits."""
        slope = -self.rate * self.beta
        shift = self.log_p + self.h
        self.pi, self.log_z = kernel(self.cost, shift, self.log_z, slope, torch.float32, FLOOR, self.pi)
        self.moved = 0.0  # since then

    def measure(self) -> None:
        """Column sums are 1; how far are row sums off?"""
        self.s = torch.mv(self.pi, self.q)
        self.compare()

    def compare(self) -> None:
        self.r = self.p - self.s
        self.error = float(self.r.abs().sum())

    def rescale(self, v: Tensor, z: Tensor) -> None:
        self.pi.mul_(v[:, None]).div_(z)
        self.log_z += z.log()

    def cool(self) -> None:
        """Twice the inverse temperature and twice the potential in logits: the square, over p, normalised.

        Cut off at FLOOR once more: squares must not become denormals.
        """
        self.beta *= 2
        self.h *= 2
        over_p = 1 / self.p
        if self.empty is not None:
            over_p.masked_fill_(self.empty, 0)
        self.pi.clamp_(min=math.exp(0.5 * FLOOR))
        self.pi.mul_(self.pi).mul_(over_p[:, None])
        z = self.pi.sum(0)
        self.pi.div_(z)
        self.log_z = 2 * self.log_z + z.log()
        self.moved = 0.0

    def sweep(self, count: int) -> None:
        """Sinkhorn sweeps, as mat-vecs on the absorbed kernel."""
        weighted = self.q
        for turn in range(count):
            v = torch.div(self.p, torch.mv(self.pi, weighted)).clamp_(1 / SWEEP_LIMIT, SWEEP_LIMIT)
            if self.empty is not None:
                v.masked_fill_(self.empty, 1)
            if turn + 1 < count:
                weighted = self.q / torch.mv(self.pi.mT, v)
        log_v = v.to(self.h.dtype).log_()
        self.h += log_v
        self.moved += float(log_v.abs().amax())
        self.rescale(v, torch.mv(self.pi.mT, v))
        self.measure()

    def direction(self, s: Tensor, r: Tensor, damping: float, tolerance: float) -> Tensor:
        """Newton's direction from the float32 kernel."""
        p, q, pi = self.p, self.q, self.pi
        if self.work is None:
            self.work = torch.empty_like(pi)
        spread = torch.addcmul(pi, pi, pi, value=-1, out=self.work)  # the diagonal, without cancellation
        root = torch.mv(spread, q).add_(p, alpha=damping).clamp_min_(TINY[torch.float32]).rsqrt_()
        shift = torch.add(s, p, alpha=damping).mul_(root).mul_(root)
        left = r.sub(p, alpha=float(r.sum())).mul_(root)
        d, _ = conjugate_gradients(pi, q, root, shift, left, tolerance, 64)
        return d.sub_(float(torch.dot(p, d)))

    def refine(self, p: Tensor, q: Tensor, goal: float) -> bool:
        """Corrections of what float32 has left: only the residual has to be exact. True if they reach the goal."""
        shift, slope = self.log_p + self.h, -self.rate * self.beta
        pi, log_z = kernel(self.cost, shift, self.log_z, slope, torch.float64, HIGH_FLOOR)
        s, last = torch.mv(pi, q), math.inf
        d, v, z = torch.zeros_like(p), torch.ones_like(p), torch.ones_like(q)
        while True:
            r = p - s
            error = float(r.abs().sum())
            balance = (s / p - 1).abs_()
            if self.empty is not None:
                balance.masked_fill_(self.empty, 0)
            if error <= goal and float(balance.amax()) <= BALANCE:
                self.log_z = log_z
                return True
            if not error <= 0.2 * last:
                self.h -= d
                return False
            if last < math.inf:
                pi.mul_(v[:, None]).div_(z)
            last = error
            narrow = max(1e-6, error**0.9)
            d = self.direction(s.float(), r.float(), 0.1 * LEVENBERG * error, narrow).to(p.dtype)
            v = d.exp()
            z = torch.mv(pi.mT, v)
            s = torch.mv(pi, q / z).mul_(v)
            self.h += d
            log_z = log_z + z.log()

    def newton_step(self) -> bool:
        """A damped Newton step, if some length of it is accepted."""
        p, q, pi, error = self.p, self.q, self.pi, self.error
        d = self.direction(self.s, self.r, LEVENBERG * error, min(0.1, math.sqrt(error)))
        slope = float(torch.dot(self.r, d))
        longest = float(d.abs().amax())
        if not (slope > 0 and math.isfinite(longest)):
            return False
        length = min(1.0, FAR / longest)
        for _ in range(TRIALS):
            v = torch.mul(d, length).exp_()
            z = torch.mv(pi.mT, v)
            there = torch.mv(pi, q / z).mul_(v)
            r = p - there
            error_there = float(r.abs().sum())
            rise = -float(torch.dot(q, z.log()))  # <p, d> is 0
            good = rise > RISE and rise >= 1e-4 * length * slope
            if good or (error_there <= 0.7 * error and rise > -RISE):
                self.h.add_(d, alpha=length)
                self.moved += length * longest
                self.rescale(v, z)
                self.s, self.r, self.error = there, r, error_there
                return True
            length *= SHRINK
        return False
