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
from couplings.transport.newton_cg import times, times_transposed

BLOCK = 8  # sweeps between two looks at the scalings
SINGLE = 8  # the first sweeps move far: their gradient uses one kernel each


class Absorbed:
    """The state of a batch of sweeps: a reference ``(h, e)`` and the kernel absorbed there.

    Args:
        x: ``(B, s, l)`` float64 logits, ``+inf`` forbids a pair.
        p: Short masses ``(B, s)``.
        q: Long masses ``(B, l)``.
        dtype: Precision of the kernel and its mat-vecs; potentials are float64.
    """

    def __init__(self, x: Tensor, p: Tensor, q: Tensor, dtype: torch.dtype) -> None:
        self.x, self.p, self.q, self.dtype = x, p, q, dtype
        self.log_p, self.log_q = p.log(), q.log()
        self.some_p, self.some_q = p > 0, q > 0
        self.zeros = any_true(~self.some_p.all(-1) | ~self.some_q.all(-1))
        self.p_low, self.q_low = p.to(dtype), q.to(dtype)
        # lowest logit kept in the kernel, and log scalings up to which what was cut off is negligible
        self.floor, self.drift = (-500.0, 200.0) if dtype == torch.float64 else (-80.0, 20.0)
        h, e = self.exact_sweep(torch.where(self.some_p, 0.0, -torch.inf).to(x.dtype))
        self.first = (h, e)
        self.reference = (h, e)
        self.kernel = self.absorb(h, e)
        self.v = self.some_p.to(dtype)

    def exact_sweep(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """One sweep by log-sum-exps; an entry without mass is ``-inf``."""
        e = self.log_q - torch.logsumexp(h[:, :, None] - self.x, -2)
        e = torch.where(self.some_q, e, -torch.inf)
        h = self.log_p - torch.logsumexp(e[:, None, :] - self.x, -1)
        return torch.where(self.some_p, h, -torch.inf), e

    def absorb(self, h: Tensor, e: Tensor) -> Tensor:
        """``exp(h + e - x)``, exactly zero where a mass is."""
        logits = (h[:, :, None] + e[:, None, :] - self.x).to(self.dtype).clamp_(min=self.floor).exp_()
        if self.zeros:
            logits = logits.mul_(self.some_p[:, :, None]).mul_(self.some_q[:, None, :])
        return logits

    def sweep(self, count: int) -> tuple[Tensor, Tensor]:
        """``count`` more sweeps; returns all their potentials, ``(count, B, s)`` and ``(count, B, l)``."""
        vs, us, v = [], [], self.v
        for _ in range(count):
            u = self.q_low / times_transposed(self.kernel, v)
            u = torch.where(self.some_q, u, 0.0) if self.zeros else u
            v = self.p_low / times(self.kernel, u)
            v = torch.where(self.some_p, v, 0.0) if self.zeros else v
            us.append(u)
            vs.append(v)
        log_v, log_u = torch.stack(vs).to(self.x.dtype).log(), torch.stack(us).to(self.x.dtype).log()
        h, e = self.reference
        hs, es = h + log_v, e + log_u  # -inf twice where there is no mass
        far_v = ~(log_v.abs() <= self.drift) & self.some_p
        far_u = ~(log_u.abs() <= self.drift) & self.some_q
        far = far_v.any(-1).any(0) | far_u.any(-1).any(0)
        if any_true(far):
            exact = [self.exact_sweep(h + self.v.to(self.x.dtype).log())]
            for _ in range(count - 1):
                exact.append(self.exact_sweep(exact[-1][0]))
            hs = torch.where(far[:, None], torch.stack([pair[0] for pair in exact]), hs)
            es = torch.where(far[:, None], torch.stack([pair[1] for pair in exact]), es)
            self.kernel = torch.where(far[:, None, None], self.absorb(hs[-1], es[-1]), self.kernel)
            h, e = torch.where(far[:, None], hs[-1], h), torch.where(far[:, None], es[-1], e)
            v = torch.where(far[:, None], self.some_p.to(self.dtype), v)
            self.reference = (h, e)
        self.v = v
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
        for start in range(1, iterations, BLOCK):
            h, e = state.sweep(min(BLOCK, iterations - start))
            hs.append(h)
            es.append(e)
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
