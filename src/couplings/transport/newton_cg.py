"""Newton directions of the semi-dual: by a dense factorisation, and matrix-free by conjugate gradients.

Both solve ``(S + lam diag(p)) d = r`` with ``S = diag(s) - pi diag(q) pi'``, a graph Laplacian: its
off-diagonal entries are ``-sum_l q_l pi_jl pi_kl <= 0`` and its rows sum to zero. README.md has the derivation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from couplings.transport._progress import all_true

# keeps a division by an unreachable row's zero diagonal finite; its right-hand side is zero too
TINY = {torch.float64: 1e-290, torch.float32: 1e-36}
RIDGE = 1e-14  # relative; bounds the answer along blocks that float64 cannot tell from decoupled ones


def times(kernel: Tensor, vector: Tensor) -> Tensor:
    """``kernel @ vector`` for ``(B, s, l)`` and ``(B, l)``, in the kernel's precision."""
    return (kernel @ vector[..., None].to(kernel.dtype))[..., 0].to(vector.dtype)


def times_transposed(kernel: Tensor, vector: Tensor) -> Tensor:
    """``kernel' @ vector`` for ``(B, s, l)`` and ``(B, s)``, in the kernel's precision."""
    return (vector[..., None, :].to(kernel.dtype) @ kernel)[..., 0, :].to(vector.dtype)


def dense_direction(pi: Tensor, p: Tensor, q: Tensor, r: Tensor, lam: Tensor) -> Tensor:
    """Solve with one symmetric factorisation per item.

    The diagonal is summed from the off-diagonal entries, so that nothing cancels where the plan is nearly hard,
    and the system is scaled to unit diagonal. The constant direction is made regular exactly, by a rank-one term
    that the right-hand side (which sums to zero) does not see.

    Args:
        pi: ``(B, s, l)``, columns sum to 1.
        p: Short masses ``(B, s)``.
        q: Long masses ``(B, l)``.
        r: Right-hand side ``(B, s)``, summing to zero.
        lam: Levenberg term ``(B,)``.

    Returns:
        ``(B, s)``, NaN where the factorisation failed.
    """
    half = pi * q.sqrt()[:, None, :].to(pi.dtype)
    weights = (half @ half.mT).to(p.dtype)
    weights.diagonal(dim1=-2, dim2=-1).zero_()
    diagonal = weights.sum(-1)
    scale = (diagonal + lam[:, None] * p).clamp_min(TINY[p.dtype])
    root = scale.rsqrt()
    system = weights.neg_().mul_(root[:, :, None]).mul_(root[:, None, :])
    null = scale.sqrt()
    null = null / torch.linalg.vector_norm(null, dim=-1, keepdim=True)
    system.baddbmm_(null[:, :, None], null[:, None, :])
    system.diagonal(dim1=-2, dim2=-1).add_(1 + RIDGE)
    factor, info = torch.linalg.cholesky_ex(system)
    d = root * torch.cholesky_solve((r * root)[:, :, None], factor)[:, :, 0]
    return torch.where((info == 0)[:, None], d, torch.nan)


def cg_direction(
    pi: Tensor, p: Tensor, q: Tensor, r: Tensor, lam: Tensor, tolerance: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """Solve by conjugate gradients with the exact diagonal as preconditioner, two mat-vecs a step.

    Arguments as in :func:`dense_direction`, and:

    Args:
        pi: As there.
        p: As there.
        q: As there.
        r: As there.
        lam: As there.
        tolerance: Relative L1 residual at which an item stops ``(B,)``.
        iterations: Cap.

    Returns:
        The direction ``(B, s)`` and whether it reached the tolerance ``(B,)``. An item's answer is frozen when
        it stops, so other items cannot change it.
    """
    dtype, wanted = pi.dtype, r.dtype
    p, q, left, lam, tolerance = (t.to(dtype) for t in (p, q, r, lam, tolerance))
    mass = times(pi, q)
    shift = mass + lam[:, None] * p
    inverse = 1 / (shift - times(pi * pi, q)).clamp_min(TINY[dtype])
    d = torch.zeros_like(left)
    direction = z = left * inverse
    rz = (left * z).sum(-1)
    size = left.abs().sum(-1)
    goal = tolerance * size
    active = size > goal
    stop = all_true()
    for _ in range(iterations):
        image = shift * direction - times(pi, q * times_transposed(pi, direction))
        curvature = (direction * image).sum(-1)
        active = active & (curvature > 0)
        # an item that has stopped takes steps of length 0
        step = torch.where(active, rz / curvature, 0.0)[:, None]
        d = torch.addcmul(d, step, direction)
        left = torch.addcmul(left, step, image, value=-1)
        size = left.abs().sum(-1)
        active = active & (size > goal)
        if stop(~active):
            break
        z = left * inverse
        before, rz = rz, (left * z).sum(-1)
        direction = torch.addcmul(z, torch.where(active, rz / before, 0.0)[:, None], direction)
    return d.to(wanted), size <= goal
