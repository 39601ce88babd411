"""The dustbin layer as matching networks paste it: a log-domain loop on the bordered scores (SuperGlue, CVPR 2020).

Written from the paper's equations.
"""

from __future__ import annotations

import torch
from torch import Tensor


def border(scores: Tensor, dustbin: float) -> tuple[Tensor, Tensor, Tensor]:
    """The scores with their dustbins and the log marginals of mass 1, ``(B, N, M) -> (B, N + 1, M + 1)``."""
    n, m = scores.shape[1:]
    bordered = torch.nn.functional.pad(scores, (0, 1, 0, 1), value=dustbin)
    mu, nu = scores.new_ones(n + 1), scores.new_ones(m + 1)
    mu[-1], nu[-1] = m, n
    return bordered, (mu / (n + m)).log(), (nu / (n + m)).log()


def log_plan(scores: Tensor, dustbin: float, sweeps: int, tolerance: float = 0.0) -> tuple[Tensor, int]:
    """The logarithm of the plan of mass N + M, and the sweeps it took.

    With a tolerance it stops when the row marginal's L1 error, relative to the mass, is below it: looked at every 10
    sweeps, so that looking costs little.
    """
    bordered, log_mu, log_nu = border(scores, dustbin)
    mu = log_mu.exp()
    mass = float(sum(scores.shape[1:]))
    u, v = torch.zeros_like(bordered[:, :, 0]), torch.zeros_like(bordered[:, 0])
    done = sweeps
    for sweep in range(1, sweeps + 1):
        row = torch.logsumexp(bordered + v[:, None, :], 2)
        if tolerance and sweep % 10 == 1 and sweep > 1:
            if float(((u + row).exp() - mu).abs().sum(-1).max()) <= tolerance:
                done = sweep - 1
                break
        u = log_mu - row
        v = log_nu - torch.logsumexp(bordered + u[:, :, None], 1)
    return bordered + u[:, :, None] + v[:, None, :] + torch.log(torch.tensor(mass)), done
