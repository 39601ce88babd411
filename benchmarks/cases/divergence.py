"""The Sinkhorn divergence of point clouds against log-domain loops and a bare pass over all pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.registry import Contender, Setting, case
from couplings.transport.divergence import Divergence, solve_divergence

OURS = "couplings.sinkhorn_divergence"
SHARE = 0.05  # epsilon as a part of the mean cost


def two_clouds(n: int, d: int) -> tuple[Tensor, Tensor, float]:
    """Uniform cubes in low dimension, normal clouds in high; and the mean cost times SHARE."""
    if d <= 3:
        x, y = torch.rand(n, d), 0.8 * torch.rand(n, d) + 0.3
    else:
        x, y = torch.randn(n, d), 0.9 * torch.randn(n, d) + 0.2
    return x, y, SHARE * float(torch.cdist(x[:1000], y[:1000]).square().mean())


def bare_pass(x: Tensor, y: Tensor, epsilon: float) -> Callable[[], Tensor]:
    """Form exp(-C / epsilon) once in float32 tiles and sum its rows: what one sweep over all pairs does at least."""
    left = torch.cat(
        [x * (2 / epsilon), -x.square().sum(-1, keepdim=True) / epsilon, torch.ones(len(x), 1)], -1
    )
    right = torch.cat([y, torch.ones(len(y), 1), -y.square().sum(-1, keepdim=True) / epsilon], -1).mT
    tile = torch.empty(64, len(y))

    def run() -> Tensor:
        rows = []
        for part in left.split(64):
            block = torch.mm(part, right, out=tile[: len(part)]).clamp_(min=-80.0).exp_()
            rows.append(block.sum(-1))
        return torch.cat(rows)

    return run


def textbook(x: Tensor, y: Tensor, epsilon: float, sweeps: int) -> Callable[[], Tensor]:
    """Three log-domain loops on stored float32 costs, the symmetric ones averaged."""

    def problem(x: Tensor, y: Tensor, itself: bool) -> Tensor:
        cost = torch.cdist(x, y).square()
        f, g = x.new_zeros(len(x)), x.new_zeros(len(y))
        log_n, log_m = torch.tensor(float(len(x))).log(), torch.tensor(float(len(y))).log()
        for _ in range(sweeps):
            if itself:
                f = g = 0.5 * (f - epsilon * (torch.logsumexp((f - cost) / epsilon, -1) - log_n))
            else:
                f = -epsilon * (torch.logsumexp((g - cost) / epsilon, -1) - log_m)
                g = -epsilon * (torch.logsumexp((f[:, None] - cost) / epsilon, -2) - log_n)
        return f.mean() + g.mean()

    return lambda: problem(x, y, False) - 0.5 * (problem(x, x, True) + problem(y, y, True))


@case("sinkhorn_divergence", "Sinkhorn divergence of two point clouds, epsilon = 5 % of the mean cost")
def sinkhorn_divergence(quick: bool) -> Iterator[Setting]:
    """float32 points, squared distances. Error of ours: the largest marginal residual of the three problems; of
    the loop: relative to our value at 1e-10. The floor forms all pairs of one of the three problems once.
    """
    sizes = ((500, 3),) if quick else ((2000, 3), (5000, 3), (5000, 64))
    for n, d in sizes:
        x, y, epsilon = two_clouds(n, d)
        exact = float(solve_divergence(x.double(), y.double(), epsilon=epsilon).value)

        def ours(x: Tensor = x, y: Tensor = y, epsilon: float = epsilon) -> Divergence:
            return solve_divergence(x, y, epsilon=epsilon)

        def backward(x: Tensor = x, y: Tensor = y, epsilon: float = epsilon) -> Divergence:
            leaf = x.detach().requires_grad_()
            result = solve_divergence(leaf, y, epsilon=epsilon)
            result.value.backward()  # type: ignore[no-untyped-call, unused-ignore]
            return result

        def residual(result: Any) -> float:
            return float(result.residual)

        setting = Setting(
            f"n = m = {n}, d = {d}",
            [
                Contender(OURS, ours, "ours", residual, bar=2e-6, memory=True),
                Contender(f"{OURS}, forward and backward", backward, "ours", residual, bar=2e-6),
                Contender("one bare pass over all pairs", bare_pass(x, y, epsilon), "floor"),
            ],
        )
        if n <= 2000:
            loop = textbook(x, y, epsilon, 100)
            setting.contenders.append(
                Contender(
                    "log-domain loops, 100 sweeps",
                    loop,
                    "peer",
                    lambda value, exact=exact: abs(float(value) / exact - 1),  # type: ignore[misc]
                    memory=True,
                )
            )
        yield setting
