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
    vector_low = vector.to(kernel.dtype)
    if kernel.shape[0] == 1:  # a plain product starts sooner than a batched one
        return torch.mv(kernel[0], vector_low[0])[None].to(vector.dtype)
    return (kernel @ vector_low[..., None])[..., 0].to(vector.dtype)


def times_transposed(kernel: Tensor, vector: Tensor) -> Tensor:
    """``kernel' @ vector`` for ``(B, s, l)`` and ``(B, s)``, in the kernel's precision."""
    vector_low = vector.to(kernel.dtype)
    if kernel.shape[0] == 1:
        return torch.mv(kernel[0].mT, vector_low[0])[None].to(vector.dtype)
    return (vector_low[..., None, :] @ kernel)[..., 0, :].to(vector.dtype)


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

    The system is scaled to unit diagonal. The diagonal is summed from ``pi (1 - pi)``, so that it cannot cancel to
    less than nothing.

    Arguments as in :func:`dense_direction`, and:

    Args:
        pi: As there; columns of less than 1 do no harm.
        p: As there.
        q: As there.
        r: As there.
        lam: As there.
        tolerance: Relative residual of the scaled system, in the Euclidean norm, at which an item stops ``(B,)``.
        iterations: Cap.

    Returns:
        The direction ``(B, s)`` and whether it reached the tolerance ``(B,)``. An item's answer is frozen when
        it stops, so other items cannot change it.
    """
    dtype, wanted = pi.dtype, r.dtype
    p, q, left, lam, tolerance = (t.to(dtype) for t in (p, q, r, lam, tolerance))
    ridge = lam[:, None] * p
    diagonal = times(torch.addcmul(pi, pi, pi, value=-1), q) + ridge
    root = diagonal.clamp_min(TINY[dtype]).rsqrt()
    shift = (times(pi, q) + ridge) * root * root
    left = left * root
    if pi.shape[0] == 1 and pi.device.type == "cpu":
        answer, reached = conjugate_gradients(
            pi[0], q[0], root[0], shift[0], left[0], float(tolerance), iterations
        )
        return answer[None].to(wanted), torch.full_like(lam, reached, dtype=torch.bool)
    d = torch.zeros_like(left)
    direction = left
    size = (left * left).sum(-1)
    goal = tolerance * tolerance * size
    active = size > goal
    stop = all_true()
    for _ in range(iterations):
        image = root * times(pi, q * times_transposed(pi, root * direction))
        image = shift * direction - image
        curvature = (direction * image).sum(-1)
        active = active & (curvature > 0)
        # an item that has stopped takes steps of length 0
        step = torch.where(active, size / curvature, 0.0)[:, None]
        d = torch.addcmul(d, step, direction)
        left = torch.addcmul(left, step, image, value=-1)
        before, size = size, (left * left).sum(-1)
        active = active & (size > goal)
        if stop(~active):
            break
        direction = torch.addcmul(left, torch.where(active, size / before, 0.0)[:, None], direction)
    return (root * d).to(wanted), size <= goal


def conjugate_gradients(
    pi: Tensor, q: Tensor, root: Tensor, shift: Tensor, right: Tensor, tolerance: float, iterations: int
) -> tuple[Tensor, bool]:
    """The same for one system on a CPU, where looking at a number is free.

    Args:
        pi: ``(s, l)``.
        q: ``(l,)``.
        root: The scaling ``(s,)``: 1 over the root of the system's diagonal.
        shift: The system's diagonal part, scaled on both sides ``(s,)``.
        right: Right-hand side, scaled ``(s,)``.
        tolerance: Relative residual in the Euclidean norm.
        iterations: Cap.

    Returns:
        The answer ``(s,)``, no longer scaled, and whether it reached the tolerance.
    """
    d, left, direction = torch.zeros_like(right), right.clone(), right.clone()
    across = pi.mT
    size = float(torch.dot(left, left))
    goal = tolerance * tolerance * size
    for _ in range(iterations):
        spread = torch.mv(across, root * direction).mul_(q)
        image = torch.mv(pi, spread).mul_(root).neg_().addcmul_(shift, direction)
        curvature = float(torch.dot(direction, image))
        if not curvature > 0:
            break
        step = size / curvature
        d.add_(direction, alpha=step)
        left.sub_(image, alpha=step)
        before, size = size, float(torch.dot(left, left))
        if size <= goal:
            break
        direction.mul_(size / before).add_(left)
    return d.mul_(root), size <= goal
