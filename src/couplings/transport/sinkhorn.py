"""Sinkhorn sweeps in absorbed-kernel form: a fixed number, differentiated as unrolled, or up to a tolerance.

A sweep in logits (``x = C / epsilon``), long side first as in the published codes, starting from ``h = 0``:

    e_l = log q_l - logsumexp_j(h_j - x_jl),    h_j = log p_j - logsumexp_l(e_l - x_jl)

With ``K = exp(h_ref + e_ref - x)`` absorbed at a reference the same sweep is two mat-vecs on the scalings
``u = exp(e - e_ref)``, ``v = exp(h - h_ref)``. Where a scaling drifts out of the range in which ``K`` is exact,
the sweeps are done again with log-sum-exps and the kernel is absorbed anew.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from couplings._rowwise import RowFunction
from couplings.transport._progress import all_true, any_true

BLOCK = 8  # sweeps between two looks at the scalings at first, and of one kernel in the gradient
LONGEST = 32  # sweeps between two looks later on
SINGLE = 8  # the first sweeps move far: their gradient uses one kernel each


class Absorbed:
    """The state of a batch of sweeps: a reference ``(h, e)`` and the kernel absorbed there.

    Arrays ``s x l`` are allocated once: on a CPU fresh memory costs more than the arithmetic of a sweep.

    Args:
        x: ``(B, s, l)`` float64 logits, ``+inf`` forbids a pair.
        p: Short masses ``(B, s)``.
        q: Long masses ``(B, l)``.
        dtype: Precision of the kernel, its mat-vecs and all exponentials; logits and potentials are float64.
    """

    def __init__(self, x: Tensor, p: Tensor, q: Tensor, dtype: torch.dtype) -> None:
        self.x, self.p, self.q, self.dtype = x, p, q, dtype
        self.log_p, self.log_q = p.log(), q.log()
        self.some_p, self.some_q = p > 0, q > 0
        self.zeros = any_true(~self.some_p.all(-1) | ~self.some_q.all(-1))
        self.p_low, self.q_low = p.to(dtype), q.to(dtype)
        # lowest logit kept in the kernel, and log scalings up to which what was cut off is negligible
        self.floor, self.drift = (-500.0, 200.0) if dtype == torch.float64 else (-80.0, 20.0)
        self.logits = torch.empty_like(x)
        self.terms = self.logits if dtype == x.dtype else torch.empty_like(x, dtype=dtype)
        h, e = self.exact_sweep(torch.where(self.some_p, 0.0, -torch.inf).to(x.dtype))
        self.first = (h, e)
        self.rebase(h, e)

    def exact_sweep(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """One sweep by log-sum-exps; an entry without mass is ``-inf``."""
        e = self.log_q - self.log_sum(h[:, :, None], -2)
        e = torch.where(self.some_q, e, -torch.inf)
        h = self.log_p - self.log_sum(e[:, None, :], -1)
        return torch.where(self.some_p, h, -torch.inf), e

    def log_sum(self, potential: Tensor, dim: int) -> Tensor:
        """``logsumexp(potential - x)`` along ``dim``."""
        logits = torch.sub(potential, self.x, out=self.logits)
        top = logits.amax(dim, keepdim=True)
        top = torch.where(top == -torch.inf, 0.0, top)
        terms = self.terms.copy_(logits.sub_(top)).exp_()
        return terms.sum(dim, dtype=self.x.dtype).log() + top.squeeze(dim)

    def absorb(self, h: Tensor, e: Tensor) -> Tensor:
        """``exp(h + e - x)``, exactly zero where a mass is."""
        logits = torch.add(h[:, :, None], e[:, None, :], out=self.logits).sub_(self.x)
        kernel = torch.empty_like(self.terms).copy_(logits.clamp_(min=self.floor)).exp_()
        if self.zeros:
            kernel = kernel.mul_(self.some_p[:, :, None]).mul_(self.some_q[:, None, :])
        return kernel

    def rebase(self, h: Tensor, e: Tensor, moved: Tensor | None = None) -> None:
        """Absorb the kernel at ``(h, e)``, where ``moved`` is given only for those items."""
        kernel: Tensor = self.absorb(h, e)
        v: Tensor = self.some_p.to(self.dtype)
        if moved is not None:
            where = moved[:, None]
            h, e = torch.where(where, h, self.reference[0]), torch.where(where, e, self.reference[1])
            kernel, v = torch.where(where[:, None], kernel, self.kernel), torch.where(where, v, self.v)
        self.reference: tuple[Tensor, Tensor] = (h, e)
        self.kernel: Tensor = kernel
        self.v: Tensor = v
        # batched products are fast only from the left, on rows that lie in memory as they are read
        single = kernel.shape[0] == 1
        self.rows = kernel if single else kernel.contiguous()
        self.columns = kernel.mT if single else kernel.mT.contiguous()

    def scalings(self, count: int) -> tuple[Tensor, Tensor]:
        """``v`` and ``u`` of ``count`` more sweeps, ``(count, B, s)`` and ``(count, B, l)``."""
        batch, short, long = self.x.shape
        vs = self.kernel.new_empty(count, batch, short)
        us = self.kernel.new_empty(count, batch, long)
        v = self.v
        for u, v_next in zip(us.unbind(), vs.unbind(), strict=True):
            for old, matrix, mass, some, new in (
                (v, self.rows, self.q_low, self.some_q, u),
                (u, self.columns, self.p_low, self.some_p, v_next),
            ):
                if batch == 1:
                    torch.mv(matrix[0].mT, old[0], out=new[0])
                else:
                    torch.bmm(old[:, None], matrix, out=new[:, None])
                torch.div(mass, new, out=new)
                if self.zeros:
                    new.masked_fill_(~some, 0)
            v = v_next
        return vs, us

    def sweep(self, count: int) -> tuple[Tensor, Tensor]:
        """``count`` more sweeps; returns all their potentials, ``(count, B, s)`` and ``(count, B, l)``."""
        vs, us = self.scalings(count)
        log_v, log_u = vs.to(self.x.dtype).log(), us.to(self.x.dtype).log()
        far_v = ~(log_v.abs() <= self.drift) & self.some_p
        far_u = ~(log_u.abs() <= self.drift) & self.some_q
        far = far_v.any(-1).any(0) | far_u.any(-1).any(0)
        h, e = self.reference
        hs, es = log_v.add_(h), log_u.add_(e)  # -inf twice where there is no mass
        before, self.v = self.v, vs[-1]
        if any_true(far):
            exact = [self.exact_sweep(h + before.to(self.x.dtype).log())]
            for _ in range(count - 1):
                exact.append(self.exact_sweep(exact[-1][0]))
            hs = torch.where(far[:, None], torch.stack([pair[0] for pair in exact]), hs)
            es = torch.where(far[:, None], torch.stack([pair[1] for pair in exact]), es)
            self.rebase(hs[-1], es[-1], far)
        return hs, es


def sinkhorn_potential(
    cost: Tensor, p: Tensor, q: Tensor, epsilon: Tensor, method: str, tolerance: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """Sweep until the marginals hold; arguments and result as those of ``newton_potential``."""
    batch = cost.shape[0]
    state = Absorbed(cost / epsilon[:, None, None], p, q, torch.float64)
    h = state.first[0]
    done = torch.zeros(batch, dtype=torch.bool, device=cost.device)
    taken = torch.ones(batch, dtype=torch.int64, device=cost.device)
    stop = all_true()
    for _ in range(1, iterations, BLOCK):
        hs, es = state.sweep(BLOCK)
        # after a sweep the short marginal is exact, and the next sweep's move of e is the long one's error
        error = (q * (torch.where(q > 0, es[-1] - es[-2], 0.0)).expm1().abs()).sum(-1)
        taken = taken + BLOCK * ~done
        h = torch.where(done[:, None], h, hs[-1])
        done = done | ~error.isfinite() | (error <= tolerance)
        if stop(done):
            break
    x = state.x
    h = torch.where(p > 0, h - state.log_p, 0.0)
    return fill_zero_masses(x, h, p, q) * epsilon[:, None], taken


def fill_zero_masses(x: Tensor, h: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """The density potential of entries without mass, which no solver sees: the limit of a vanishing mass.

    It is the soft c-transform ``h_j = -log sum_l q_l exp(e_l - x_jl)``; 0 where no allowed pair is left.
    """
    empty = p == 0
    if not any_true(empty):
        return h
    logits = (p.log() + h)[:, :, None] - x
    e = -torch.logsumexp(logits, -2)
    reach = torch.logsumexp(torch.where(q > 0, q.log() + e, -torch.inf)[:, None, :] - x, -1)
    return torch.where(empty, torch.where(reach.isfinite(), -reach, 0.0), h)


class Sweeps(RowFunction):
    """A fixed number of sweeps; the gradient is that of the unrolled sweeps.

    Returns the potentials of every sweep, ``(*batch, T, s)`` and ``(*batch, T, l)``, 0 where there is no mass:
    ``T (s + l)`` numbers, which with the cost are all that the backward pass needs.
    """

    @staticmethod
    def forward(x: Tensor, p: Tensor, q: Tensor, iterations: int, low: bool) -> tuple[Tensor, Tensor]:
        """The sweeps; ``low`` keeps the kernel in float32."""
        if torch.compiler.is_compiling():
            out: tuple[Tensor, Tensor] = _opaque_sweeps(x, p, q, iterations, low)
            return out
        return _run_sweeps(x, p, q, iterations, low)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep the potentials of all sweeps."""
        x, p, q, iterations, _ = inputs
        ctx.save_for_backward(x, p, q, *output)
        ctx.iterations = iterations

    @staticmethod
    def backward(ctx: Any, h_bar: Tensor, e_bar: Tensor) -> tuple[Tensor | None, ...]:
        """Sweep by sweep backwards; a block of sweeps shares a kernel and adds one thin product to dx."""
        x, p, q, hs, es = ctx.saved_tensors
        some_p, some_q = p > 0, q > 0
        over_p = torch.where(some_p, 1 / torch.where(some_p, p, 1.0), 0.0)
        over_q = torch.where(some_q, 1 / torch.where(some_q, q, 1.0), 0.0)
        idle = ~(some_p[..., :, None] & some_q[..., None, :]) | (x == torch.inf)
        finite = torch.where(idle, 0.0, x)
        grad_x = torch.zeros_like(x)
        grad_log_p, grad_log_q = torch.zeros_like(p), torch.zeros_like(q)
        carry = torch.zeros_like(p)
        for start, stop in reversed(_blocks(ctx.iterations)):
            h_ref, e_ref = hs[..., stop - 1, :].detach(), es[..., stop - 1, :].detach()
            logits = h_ref[..., :, None] + e_ref[..., None, :] - finite
            kernel = torch.where(idle, -torch.inf, logits).exp()
            left, right = [], []
            for t in range(stop - 1, start - 1, -1):
                v = torch.where(some_p, (hs[..., t, :] - h_ref).exp(), 0.0)
                u = torch.where(some_q, (es[..., t, :] - e_ref).exp(), 0.0)
                before = hs[..., t - 1, :] if t > 0 else torch.zeros_like(p)
                v_before = torch.where(some_p, (before - h_ref).exp(), 0.0)
                down = h_bar[..., t, :] + carry
                grad_log_p = grad_log_p + down
                scaled = v * down * over_p
                across = e_bar[..., t, :] - u * (scaled[..., None, :] @ kernel)[..., 0, :]
                grad_log_q = grad_log_q + across
                weighted = u * across * over_q
                carry = -v_before * (kernel @ weighted[..., None])[..., 0]
                left += [scaled, v_before]
                right += [u, weighted]
            thin = torch.stack(left, -1) @ torch.stack(right, -2)
            grad_x = grad_x + kernel * thin
        return grad_x, grad_log_p * over_p, grad_log_q * over_q, None, None


def _blocks(iterations: int) -> list[tuple[int, int]]:
    """Ranges of sweeps that share a kernel in the backward pass: single ones first, then blocks."""
    cuts = [*range(min(SINGLE, iterations)), *range(SINGLE, iterations, BLOCK), iterations]
    return list(pairwise(cuts))


def _run_sweeps(x: Tensor, p: Tensor, q: Tensor, iterations: int, low: bool) -> tuple[Tensor, Tensor]:
    batch = x.shape[:-2]
    short, long = x.shape[-2:]
    state = Absorbed(
        x.reshape(-1, short, long),
        p.reshape(-1, short),
        q.reshape(-1, long),
        torch.float32 if low else torch.float64,
    )
    hs, es = [state.first[0][None]], [state.first[1][None]]
    with torch.autocast(x.device.type, enabled=False):  # it would run the mat-vecs in half precision
        start = 1
        while start < iterations:
            h, e = state.sweep(min(BLOCK if start < LONGEST else LONGEST, iterations - start))
            hs.append(h)
            es.append(e)
            start += len(h)
    h = torch.cat(hs).movedim(0, 1)
    e = torch.cat(es).movedim(0, 1)
    h = torch.where(state.some_p[:, None, :], h, 0.0)
    e = torch.where(state.some_q[:, None, :], e, 0.0)
    return h.reshape(*batch, iterations, short), e.reshape(*batch, iterations, long)


_opaque_sweeps = torch.library.custom_op("couplings::sinkhorn_sweeps", _run_sweeps, mutates_args=())


@_opaque_sweeps.register_fake
def _(x: Tensor, p: Tensor, q: Tensor, iterations: int, low: bool) -> tuple[Tensor, Tensor]:
    batch = x.shape[:-2]
    return x.new_empty(*batch, iterations, x.shape[-2]), x.new_empty(*batch, iterations, x.shape[-1])
