"""Doubly stochastic matrices in bulk, as in routing and hyper-connections, against the loop of 20 sweeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.registry import Contender, Figure, Measured, Setting, case, quotient
from couplings.matching.normalize import sinkhorn_normalize

OURS, LOOP = "sinkhorn_normalize", "log-sum-exp loop, 20 sweeps"
BACK = ", forward and backward"
FLOOR = "exp of every entry, written once"
SWEEPS = 20
SPREADS = (1, 3, 6, 20, 100)
PROMISED = (1, 3, 6)  # standard deviations at which a figure is promised


def loop(logits: Tensor) -> Tensor:
    """What mixture-of-experts and hyper-connection codes write: rows, then columns, of the potentials."""
    column = torch.zeros_like(logits[..., :1, :])
    for _ in range(SWEEPS):
        row = -torch.logsumexp(logits + column, -1, keepdim=True)
        column = -torch.logsumexp(logits + row, -2, keepdim=True)
    return torch.exp(logits + row + column)


def errors(plan: Tensor) -> Tensor:
    """L1 error of both marginals of each matrix, in float64, over its mass n."""
    plan = plan.detach().double()
    return ((plan.sum(-1) - 1).abs().sum(-1) + (plan.sum(-2) - 1).abs().sum(-1)) / plan.shape[-1]


def contender(name: str, run: Callable[[], Tensor], bar: float | None) -> Contender:
    """One way to do it; the note says how many matrices have a row or column sum that is plainly wrong."""
    made = Contender(name, run, "peer" if bar is None else "ours", bar=bar, memory=True)

    def error(plan: Tensor) -> float:
        found = errors(plan)
        off = (plan.detach().double().sum(-1) - 1).abs().amax(-1) > 1e-2
        made.note = (
            f"{100 * float(off.double().mean()):.0f} % with a row sum off by 1e-2" if bar is None else ""
        )
        return float(found.max())

    made.error = error
    return made


def backward(function: Callable[[Tensor], Tensor], logits: Tensor, cotangent: Tensor) -> Callable[[], Tensor]:
    """The same with a gradient."""

    def run() -> Tensor:
        leaf = logits.detach().requires_grad_()
        plan = function(leaf)
        plan.backward(cotangent)
        return plan.detach()

    return run


def figures(rows: list[Measured]) -> list[Figure]:
    """Half the loop's time, solved."""
    settings = dict.fromkeys(row.setting for row in rows)
    promised = [f"x 4 x 4, float32, std {std}" for std in PROMISED]
    return [
        Figure(f"{where}: ours / {LOOP}", quotient(rows, where, OURS, LOOP), 0.5, at_most=True)
        for where in settings
        if where.endswith(tuple(promised))
    ]


@case("normalize", "Doubly stochastic matrices in bulk: every one certified, against 20 sweeps", figures)
def normalize(quick: bool) -> Iterator[Setting]:
    """Normal logits. Error: the largest L1 residual of both marginals over the batch, in float64, over the mass n; ours
    must keep 2e-6 in float32 and 1e-9 in float64, the loop's is only reported. The floor is one pass over the data.
    """
    count = 8192 if quick else 131072
    problems = [(4, torch.float32, std) for std in SPREADS] + [(4, torch.float64, 3), (3, torch.float32, 3)]
    for n, dtype, std in [*problems, (8, torch.float32, 3)]:
        batch = count if n < 8 else count // 8
        logits = (std * torch.randn(batch, n, n)).to(dtype)
        cotangent = torch.randn_like(logits)
        bar = 2e-6 if dtype == torch.float32 else 1e-9
        yield Setting(
            f"{batch} x {n} x {n}, {str(dtype).removeprefix('torch.')}, std {std}",
            [
                contender(OURS, lambda logits=logits: sinkhorn_normalize(logits), bar),  # type: ignore[misc]
                contender(LOOP, lambda logits=logits: loop(logits), None),  # type: ignore[misc]
                contender(OURS + BACK, backward(sinkhorn_normalize, logits, cotangent), bar),
                contender(LOOP + BACK, backward(loop, logits, cotangent), None),
                Contender(FLOOR, lambda logits=logits: logits.exp(), "floor"),  # type: ignore[misc]
            ],
        )
