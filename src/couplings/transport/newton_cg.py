"""Newton directions of the semi-dual: by a dense factorisation, and matrix-free by conjugate gradients.

Both solve ``(S + lam diag(p)) d = r`` with ``S = diag(s) - pi diag(q) pi'``, a graph Laplacian: its
off-diagonal entries are ``-sum_l q_l pi_jl pi_kl <= 0`` and its rows sum to zero. README.md has the derivation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from couplings.transport._progress import all_true

TINY = (
    1e-290  # keeps a division by an unreachable row's zero diagonal finite; its right-hand side is zero too
)
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
    scale = (diagonal + lam[:, None] * p).clamp_min(TINY)
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
    mass = times(pi, q)
    shift = mass + lam[:, None] * p
    diagonal = (shift - times(pi * pi, q)).clamp_min(TINY)
    d = torch.zeros_like(r)
    left = r
    z = left / diagonal
    direction = z
    rz = (left * z).sum(-1)
    goal = tolerance * r.abs().sum(-1)
    active = r.abs().sum(-1) > goal
    curved = active
    stop = all_true()
    for _ in range(iterations):
        image = shift * direction - times(pi, q * times_transposed(pi, direction))
        curvature = (direction * image).sum(-1)
        curved = curved & (curvature > 0)
        active = active & curved
        step = torch.where(active, rz / curvature, 0.0)[:, None]
        d = torch.where(active[:, None], d + step * direction, d)
        left = torch.where(active[:, None], left - step * image, left)
        active = active & (left.abs().sum(-1) > goal)
        if stop(~active):
            break
        z = left / diagonal
        rz_next = (left * z).sum(-1)
        direction = torch.where(active[:, None], z + (rz_next / rz)[:, None] * direction, direction)
        rz = torch.where(active, rz_next, rz)
    return d, left.abs().sum(-1) <= goal
