"""solve on dense costs against the log-domain loop, POT and OTT-JAX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import couplings as cp
from benchmarks import oracles
from benchmarks.peers import libraries, soft
from benchmarks.registry import Contender, Figure, Measured, Setting, case, pick, quotient

OURS, LOOP = "couplings.solve", "log-domain Sinkhorn loop"
SWEEP = "log-sum-exp of rows and columns"
BAR = 1e-6


def descriptor_scores(n: int, m: int, deviation: float, dtype: torch.dtype) -> Tensor:
    """Inner products of unit descriptors, half of them with a noisy partner, of a given deviation."""
    left = torch.nn.functional.normalize(torch.randn(n, 64, dtype=torch.float64), dim=-1)
    right = torch.randn(m, 64, dtype=torch.float64) / 8
    half = min(n, m) // 2
    right[:half] = left[:half] + 0.3 * right[:half]
    scores = left @ torch.nn.functional.normalize(right[torch.randperm(m)], dim=-1).T
    return (scores * (deviation / scores.std())).to(dtype)


def uniform(n: int, dtype: torch.dtype) -> Tensor:
    """Equal weights of total mass 1."""
    return torch.full((n,), 1 / n, dtype=dtype)


def solution_error(cost: Tensor) -> Callable[[Tensor], float]:
    """The larger of the L1 residual of both marginals and a millionth of the departure from Gibbs form.

    At float32 and costs in the hundreds a plan's logarithm is only good to 1e-4; a wrong plan is off by 1
    or more.
    """
    a, b = uniform(cost.shape[-2], torch.float64), uniform(cost.shape[-1], torch.float64)

    def error(plan: Tensor) -> float:
        return max(oracles.residual(plan, a, b), oracles.gibbs_defect(plan, cost) * 1e-6)

    return error


def ours(cost: Tensor, tolerance: float | None = BAR, bar: float = 4 * BAR) -> Contender:
    """The certified solve, forward only, plan included."""

    def run() -> Tensor:
        plan: Tensor = cp.solve(cost, epsilon=1.0, tolerance=tolerance).plan()
        return plan

    return Contender(OURS, run, "ours", solution_error(cost), bar=bar, memory=True, note="plan included")


def ours_backward(cost: Tensor) -> Contender:
    """The same with the implicit gradient of the plan."""
    cotangent = torch.randn_like(cost)

    def run() -> Tensor:
        leaf = cost.detach().requires_grad_()
        plan: Tensor = cp.solve(leaf, epsilon=1.0, tolerance=BAR).plan()
        plan.backward(cotangent)
        return plan.detach()

    return Contender(f"{OURS}, forward and backward", run, "ours", solution_error(cost), bar=4 * BAR)


def loop(cost: Tensor, sweeps: int, tolerance: float) -> Contender:
    """The loop to the same residual, with where it stands when it is not reached in the note."""
    a, b = uniform(cost.shape[-2], cost.dtype), uniform(cost.shape[-1], cost.dtype)
    error = solution_error(cost)

    def run() -> tuple[Tensor, int]:
        return soft.dense(cost, a, b, 1.0, sweeps=sweeps, tolerance=tolerance)

    contender = Contender(LOOP, run, "peer", memory=True)

    def judged(result: tuple[Tensor, int]) -> float:
        contender.note = f"{result[1]} sweeps" + (", not there" if tolerance and result[1] == sweeps else "")
        return error(result[0])

    contender.error = judged
    return contender


def dense_figures(rows: list[Measured]) -> list[Figure]:
    at_20 = pick(rows, "std 20, float64", OURS)
    return [
        Figure(
            f"std 5, {dtype}: {LOOP} / ours", quotient(rows, f"std 5, {dtype}", LOOP, OURS), 20, at_most=False
        )
        for dtype in ("float64", "float32")
    ] + [
        Figure(
            "std 20, float64: error of ours",
            float("nan") if at_20 is None or at_20.error is None else at_20.error,
            BAR,
            at_most=True,
        )
    ]


@case("dense", "Dense transport: 512 x 512 to a residual of 1e-6", dense_figures)
def dense(quick: bool) -> Iterator[Setting]:
    """Cost = -scores, epsilon = 1, uniform marginals of mass 1; scores are inner products of descriptors,
    half of which have a partner. Error: L1 residual of both marginals in float64 (or a millionth of the
    departure from exp((f + g - C)/epsilon), if larger). Peers get 3000 sweeps.
    """
    n, sweeps = (128, 300) if quick else (512, 3000)
    for deviation in (5, 20):
        for dtype in (torch.float64, torch.float32):
            cost = -descriptor_scores(n, n, deviation, dtype)
            a, b = uniform(n, dtype), uniform(n, dtype)
            error = solution_error(cost)

            def pot(
                name: str = "POT ot.sinkhorn, log domain",
                build: Callable[..., Callable[[], Any]] = libraries.pot_dense,
                cost: Tensor = cost,
                a: Tensor = a,
                b: Tensor = b,
                error: Callable[[Tensor], float] = error,
            ) -> Contender:
                run = build(cost, a, b, 1.0, sweeps=sweeps, tolerance=BAR)
                return Contender(
                    name,
                    run,
                    "peer",
                    lambda plan: error(plan if isinstance(plan, Tensor) else libraries.to_torch(plan)),
                )

            setting = Setting(
                f"std {deviation}, {str(dtype).removeprefix('torch.')}",
                [
                    ours(cost),
                    ours_backward(cost),
                    Contender(
                        SWEEP,
                        lambda cost=cost: (torch.logsumexp(cost, -1), torch.logsumexp(cost, -2)),  # type: ignore[misc]
                        "floor",
                        note="one sweep of a log-domain loop",
                    ),
                    loop(cost, sweeps, BAR),
                ],
            )
            setting.add(pot, "POT")
            setting.add(
                lambda pot=pot: pot("POT ot.batch, log domain", libraries.pot_batch),  # type: ignore[misc]
                "POT ot.batch",
            )
            setting.add(
                lambda pot=pot: pot("OTT-JAX Sinkhorn, jitted", libraries.ott_dense),  # type: ignore[misc]
                "OTT-JAX",
            )
            yield setting


@case("dense_scales", "Dense transport where Sinkhorn stalls: 64 .. 1024, score standard deviation up to 100")
def dense_scales(quick: bool) -> Iterator[Setting]:
    """float64, cost = -scores, epsilon = 1, ours to its default tolerance, 1e-9. The error of the loop is what 1000
    sweeps leave: Newton is needed where it is above 1e-4.
    """
    for n in (64, 256) if quick else (64, 256, 1024):
        for deviation in (5, 20, 50, 100):
            cost = -descriptor_scores(n, n, deviation, torch.float64)
            yield Setting(
                f"{n} x {n}, std {deviation}",
                [ours(cost, tolerance=None, bar=1e-9), loop(cost, 100 if quick else 1000, 0.0)],
            )


def sweep_figures(rows: list[Measured]) -> list[Figure]:
    settings = dict.fromkeys(row.setting for row in rows)
    return [
        Figure(f"{where}: {LOOP} / ours, per sweep", quotient(rows, where, LOOP, FIXED), 10, at_most=False)
        for where in settings
    ]


FIXED = 'couplings.solve, solver="sinkhorn"'


BARE = "two bare matrix-vector products and two divisions"


def bare_sweeps(cost: Tensor, sweeps: int) -> Callable[[], Tensor]:
    """What a sweep with a stored kernel (n, m) does at least: no kernel, no drift, no certificate, no plan."""
    kernel = (cost - cost.amin()).neg().exp()
    u, v = kernel.new_ones(kernel.shape[0]), kernel.new_ones(kernel.shape[1])

    def run() -> Tensor:
        v.fill_(1)
        for _ in range(sweeps):
            torch.mv(kernel, v, out=u).reciprocal_()
            torch.mv(kernel.mT, u, out=v).reciprocal_()
        return v

    return run


@case("sinkhorn_sweeps", "Sinkhorn with a fixed number of sweeps: time per sweep", sweep_figures)
def sinkhorn_sweeps(quick: bool) -> Iterator[Setting]:
    """100 sweeps, plan included; times are per sweep. Scores of standard deviation 5, epsilon = 1. Error:
    L1 distance of the plan from that of the log-domain loop in float64 after as many sweeps. The floor is what a
    sweep with a stored kernel cannot do without.
    """
    sweeps = 20 if quick else 100
    for batch in ((), (8,)):
        for dtype in (torch.float32, torch.float64):
            scores = [descriptor_scores(512, 512, 5, dtype) for _ in range(max(1, *batch, 1))]
            cost = -torch.stack(scores).reshape(*batch, 512, 512)
            a = b = uniform(512, dtype).expand(*batch, 512)
            truth, _ = soft.dense(cost.double(), a.double(), b.double(), 1.0, sweeps=sweeps)

            def error(plan: Tensor, truth: Tensor = truth) -> float:
                return float((plan.detach().double() - truth).abs().sum((-1, -2)).max())

            def fixed(cost: Tensor = cost) -> Tensor:
                plan: Tensor = cp.solve(
                    cost, epsilon=1.0, solver="sinkhorn", iterations=sweeps, on_fail="ignore"
                ).plan()
                return plan

            def textbook(cost: Tensor = cost, a: Tensor = a, b: Tensor = b) -> Tensor:
                return soft.dense(cost, a, b, 1.0, sweeps=sweeps)[0]

            yield Setting(
                " x ".join(map(str, (*batch, 512, 512))) + f", {str(dtype).removeprefix('torch.')}",
                [
                    Contender(FIXED, fixed, "ours", error, bar=1e-3, scale=1 / sweeps, memory=True),
                    Contender(LOOP, textbook, "peer", error, scale=1 / sweeps, memory=True),
                    *(
                        ()
                        if batch
                        else (Contender(BARE, bare_sweeps(cost, sweeps), "floor", scale=1 / sweeps),)
                    ),
                ],
            )
