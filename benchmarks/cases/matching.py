"""Matching with dustbins against the layer that matching networks paste."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import couplings as cp
from benchmarks.cases.dense import descriptor_scores
from benchmarks.peers import dustbin as layer
from benchmarks.registry import Contender, Figure, Measured, Setting, case, pick, quotient

OURS, LOOP = "match_with_dustbin, to that residual", "log-sum-exp loop"
DEFAULT = "match_with_dustbin, default tolerance 1e-11"
PARITY = "log_optimal_transport, 100 sweeps"
SWEEP = "one log-sum-exp of rows and columns"
LEAST = "one exponential, both sums, the log plan"
BAR = 2e-6


def residual(log_plan: Tensor) -> float:
    """L1 error of both marginals in float64, relative to the mass; the largest of the batch."""
    plan = log_plan.detach().double().exp()
    n, m = plan.shape[-2] - 1, plan.shape[-1] - 1
    a, b = plan.new_ones(n + 1), plan.new_ones(m + 1)
    a[-1], b[-1] = m, n
    error = (plan.sum(-1) - a).abs().sum(-1) + (plan.sum(-2) - b).abs().sum(-1)
    return float(error.max()) / (n + m)


def floor(scores: Tensor) -> Contender:
    """What one sweep of the loop costs."""
    return Contender(SWEEP, lambda: (torch.logsumexp(scores, -1), torch.logsumexp(scores, -2)), "floor")


def least(scores: Tensor, dustbin: float) -> Contender:
    """What any solver must do: one exponential of every entry, the sums of both directions, and the log plan."""
    bordered, log_mu, _ = layer.border(scores, dustbin)

    def run() -> tuple[Tensor, ...]:
        terms = bordered.exp2()
        return terms.sum(-1), terms.sum(-2), bordered + log_mu[:, None]

    return Contender(LEAST, run, "floor")


def matching_figures(rows: list[Measured]) -> list[Figure]:
    figures = []
    for where in dict.fromkeys(row.setting for row in rows):
        loop = pick(rows, where, LOOP)
        if loop is not None and "not there" not in loop.note:
            for name, below in (("ours", OURS), ("the least any solver must do", LEAST)):
                value = quotient(rows, where, LOOP, below)
                figures.append(Figure(f"{where}: {LOOP} / {name}", value, 30, at_most=False))
    return figures


def most_sweeps(n: int, deviation: float) -> int:
    """What the loop gets: as many as fit into this case's five minutes."""
    if n <= 128 or (n <= 512 and deviation < 20):
        return 20_000
    return 1000 if n < 2048 else 300


@case("dustbin", "Matching with dustbins, solved to a residual of 2e-6 of the mass", matching_figures)
def dustbin(quick: bool) -> Iterator[Setting]:
    """float32, dustbin score at the scores' standard deviation, log plan included. Descriptors: inner products of
    which half have a partner; Gaussian: independent scores. Error: L1 residual of both marginals in float64
    over the mass. The loop gets 20,000 sweeps to reach the same residual (from 512 x 512, std 20 on: 1000, and 300 of
    2048 x 2048). With Gaussian scores of std 1 it needs 5 to 10 sweeps: the time of some ten to thirty passes with an
    exponential each. The second floor, one such pass with both sums and the log plan, bounds what any solver could
    gain, and the figures print that bound; a certified solve takes at least three (kernel, plan, their checks).
    """
    for n, m in ((64, 64),) if quick else ((128, 128), (512, 512), (1024, 900), (2048, 2048)):
        for kind, deviation in (("descriptors", 5), ("descriptors", 20), ("Gaussian", 1), ("Gaussian", 5)):
            sweeps = 100 if quick else most_sweeps(n, deviation)
            if kind == "descriptors":
                scores = descriptor_scores(n, m, deviation, torch.float32)[None]
            else:
                scores = deviation * torch.randn(1, n, m)

            def ours(
                scores: Tensor = scores, deviation: int = deviation, tolerance: float | None = BAR
            ) -> Tensor:
                out = cp.match_with_dustbin(scores, float(deviation), tolerance=tolerance, on_fail="raise")
                return out.log_plan()

            loop = Contender(
                LOOP, _loop(scores, float(deviation), sweeps), "peer", lambda out: residual(out[0])
            )
            loop.error = _judge(loop, sweeps)
            yield Setting(
                f"{n} x {m}, {kind}, std {deviation}",
                [
                    Contender(OURS, ours, "ours", residual, bar=1.2 * BAR, memory=True),
                    Contender(DEFAULT, lambda ours=ours: ours(tolerance=None), "ours", residual, bar=BAR),  # type: ignore[misc]
                    loop,
                    floor(scores),
                    least(scores, float(deviation)),
                ],
            )


def _loop(scores: Tensor, deviation: float, sweeps: int) -> Callable[[], tuple[Tensor, int]]:
    return lambda: layer.log_plan(scores, deviation, sweeps, BAR / 2)


def _judge(loop: Contender, sweeps: int) -> Callable[[tuple[Tensor, int]], float]:
    def judged(result: tuple[Tensor, int]) -> float:
        loop.note = f"{result[1]} sweeps" + (", not there" if result[1] == sweeps else "")
        return residual(result[0])

    return judged


def parity_figures(rows: list[Measured]) -> list[Figure]:
    return [
        Figure(f"{where}: {LOOP} / ours", quotient(rows, where, LOOP, PARITY), 10, at_most=False)
        for where in dict.fromkeys(row.setting for row in rows)
    ]


@case("dustbin_parity", "The published layer's 100 sweeps, the same answer", parity_figures)
def dustbin_parity(quick: bool) -> Iterator[Setting]:
    """log_optimal_transport(scores, alpha, 100) against the loop it replaces; float32. Error: largest distance of the
    log plan from the loop's in float64; rounding that to float32 alone costs 2e-6 at deviation 5 and 8e-6 at 20.
    """
    size = 64 if quick else 512
    for batch in (1, 8):
        for deviation in (5, 20):
            drawn = [descriptor_scores(size, size, deviation, torch.float32) for _ in range(batch)]
            scores = torch.stack(drawn)
            truth = layer.log_plan(scores.double(), float(deviation), 100)[0]

            def error(log_plan: Tensor, truth: Tensor = truth) -> float:
                return float((log_plan.double() - truth).abs().max())

            def ours(scores: Tensor = scores, deviation: int = deviation) -> Tensor:
                return cp.log_optimal_transport(scores, float(deviation), 100)

            def theirs(scores: Tensor = scores, deviation: int = deviation) -> Tensor:
                return layer.log_plan(scores, float(deviation), 100)[0]

            yield Setting(
                f"{batch} x {size} x {size}, std {deviation}",
                [
                    Contender(PARITY, ours, "ours", error, bar=1e-5, memory=True),
                    Contender(LOOP, theirs, "peer", error, memory=True),
                    floor(scores),
                ],
            )
