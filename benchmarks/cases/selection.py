"""soft_topk_mask and soft_topk against SOFT's loop, OTT-JAX, softtorch and the floors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import couplings as cp
from benchmarks import oracles
from benchmarks.peers import libraries, soft
from benchmarks.registry import Contender, Figure, Measured, Missing, Setting, case, quotient

EPSILONS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
LOOP, PLAIN = "SOFT loop, log domain, 200 sweeps", "SOFT loop, plain domain, 200 sweeps"
MASK, SORTED = "couplings.soft_topk_mask", "couplings.soft_topk"
TOPK, SIGMOID = "torch.topk", "torch.sigmoid, one pass"


def label(epsilon: float) -> str:
    """How the tables name an epsilon."""
    return f"eps 1e{round(math.log10(epsilon))}"


def differentiated(forward: Callable[[Tensor], Tensor], x: Tensor, cotangent: Tensor) -> Callable[[], Tensor]:
    """Forward and backward from a fresh leaf; returns the forward's result."""

    def run() -> Tensor:
        leaf = x.detach().requires_grad_()
        result = forward(leaf)
        result.backward(cotangent)
        return result.detach()

    return run


class InTurn:
    """Each call works on another draw and returns (which, result).

    A branch predictor learns an input that comes again and again: ``torch.topk`` of 128 x 1000 takes half its time
    then. In training no input comes twice.
    """

    def __init__(self, function: Callable[[Tensor], Any], draws: list[Tensor]) -> None:
        self.function, self.draws, self.calls = function, draws, 0

    def __call__(self) -> tuple[int, Any]:
        which = self.calls % len(self.draws)
        self.calls += 1
        return which, self.function(self.draws[which])


def floors(x: Tensor, k: int) -> list[Contender]:
    """The discrete answer, and one read-and-write of the scores."""
    return [
        Contender(TOPK, lambda: torch.topk(x, k), "floor"),
        Contender(SIGMOID, lambda: torch.sigmoid(x), "floor"),
    ]


def mask_figures(rows: list[Measured]) -> list[Figure]:
    found = []
    for epsilon in EPSILONS:
        where = label(epsilon)
        found.append(Figure(f"{where}: {LOOP} / ours", quotient(rows, where, LOOP, MASK), 300, at_most=False))
        found.append(
            Figure(
                f"{where}: ours / ({TOPK} + one sigmoid pass)",
                quotient(rows, where, MASK, (TOPK, SIGMOID)),
                9,
                at_most=True,
            )
        )
    return found


AGAIN = "torch.topk, the same input again and again"
DRAWS = 16


@case("topk_mask", "Soft top-k mask: 128 x 1000, k = 10, float32, forward and backward", mask_figures)
def topk_mask(quick: bool) -> Iterator[Setting]:
    """Every call of ours, of the loops and of the floors works on another draw of the scores, as in training. Error:
    largest absolute difference from the float64 mask found by bisection (softtorch solves a problem of its own: its
    error is how far an entry exceeds 1). The SOFT loop is the textbook algorithm of the paper's appendix, 200 sweeps
    and the implicit gradient, on the same standardised scores; epsilon is in units of the row's standard deviation.
    """
    k = 10
    draws, cotangent = [torch.randn(128, 1000) for _ in range(DRAWS)], torch.randn(128, 1000)
    x = draws[0]
    sweeps = 20 if quick else 200
    extrapolated = f"{sweeps} sweeps timed, x {200 // sweeps}" if quick else ""
    for epsilon in EPSILONS:
        truths = [oracles.topk_mask(draw, k, epsilon) for draw in draws]

        def turned(found: tuple[int, Tensor], truths: list[Tensor] = truths) -> float:
            return oracles.worst(found[1], truths[found[0]])

        def error(found: Tensor, truth: Tensor = truths[0]) -> float:
            return oracles.worst(found, truth)

        def both(forward: Callable[[Tensor], Tensor]) -> InTurn:
            return InTurn(lambda z: differentiated(forward, z, cotangent)(), draws)

        def ours(z: Tensor, epsilon: float = epsilon) -> Tensor:
            return cp.soft_topk_mask(z, k, epsilon=epsilon)

        setting = Setting(
            label(epsilon),
            [
                Contender(MASK, both(ours), "ours", turned, bar=1e-4, memory=True),
                Contender(TOPK, InTurn(lambda z: torch.topk(z, k), draws), "floor"),
                Contender(SIGMOID, InTurn(torch.sigmoid, draws), "floor"),
                Contender(AGAIN, lambda: torch.topk(x, k), "floor"),
            ],
        )
        for name, stabilized in ((LOOP, True), (PLAIN, False)):

            def loop(z: Tensor, epsilon: float = epsilon, stabilized: bool = stabilized) -> Tensor:
                return soft.mask(z, k, epsilon, sweeps=sweeps, stabilized=stabilized)

            setting.contenders.append(
                Contender(
                    name, both(loop), "peer", turned, scale=200 / sweeps, memory=True, note=extrapolated
                )
            )

        def ott(epsilon: float = epsilon, error: Callable[[Tensor], float] = error) -> Contender:
            run = libraries.ott_mask(x, k, epsilon, cotangent, threshold=1e-5)
            return Contender(
                "OTT-JAX topk_mask, jitted",
                run,
                "peer",
                lambda result: error(libraries.to_torch(result[0])),
                note="threshold 1e-5, at most 2000 sweeps",
            )

        def softtorch(epsilon: float = epsilon) -> Contender:
            libraries.library("softtorch", "softtorch (Python >= 3.12)")

            def forward(z: Tensor) -> Tensor:
                return libraries.softtorch_topk(z, k, epsilon, "softsort")[1].sum(-2)

            return Contender(
                "softtorch topk, softsort",
                differentiated(forward, x, cotangent),
                "peer",
                lambda found: max(0.0, float(found.max()) - 1),
                note="another relaxation, squashed scores; sums to k",
            )

        if not (quick and epsilon < 1e-2):
            setting.add(ott, "OTT-JAX")
        setting.add(softtorch, "softtorch")
        setting.add(lapsum, "LapSum")
        yield setting


def lapsum() -> Contender:
    """LapSum's authors publish a notebook."""
    raise Missing('no package to install; its threshold family is ours as method="laplace"')


def large_figures(rows: list[Measured]) -> list[Figure]:
    return [
        Figure(
            f"{row.setting}: ours / one sigmoid pass", quotient(rows, row.setting, MASK, SIGMOID), 45, True
        )
        for row in rows
        if row.role == "ours"
    ]


@case(
    "topk_mask_large", "Soft top-k mask: 8 x 1,000,000, k = 100, float32, forward and backward", large_figures
)
def topk_mask_large(quick: bool) -> Iterator[Setting]:
    """Error: largest absolute difference from the float64 mask found by bisection. Bandwidth decides here:
    read the ratio to one sigmoid pass over the scores.
    """
    k, n = 100, 10**5 if quick else 10**6
    x, cotangent = torch.randn(8, n), torch.randn(8, n)
    for epsilon in EPSILONS:
        truth = oracles.topk_mask(x, k, epsilon)

        def ours(z: Tensor, epsilon: float = epsilon) -> Tensor:
            return cp.soft_topk_mask(z, k, epsilon=epsilon)

        def error(found: Tensor, truth: Tensor = truth) -> float:
            return oracles.worst(found, truth)

        run = differentiated(ours, x, cotangent)
        yield Setting(
            label(epsilon), [Contender(MASK, run, "ours", error, bar=2e-4, memory=True), *floors(x, k)]
        )


def slope(rows: list[Measured], name: str, quantity: str) -> float:
    """Least-squares slope of log quantity against log n over one contender's rows."""
    points = [(row.values["n"], getattr(row, quantity)) for row in rows if row.name == name]
    if len(points) < 2 or any(not value for _, value in points):
        return float("nan")
    logs = torch.tensor(points, dtype=torch.float64).log()
    centred = logs - logs.mean(0)
    return float((centred[:, 0] @ centred[:, 1]) / (centred[:, 0] @ centred[:, 0]))


def slopes(name: str) -> Callable[[list[Measured]], list[Figure]]:
    """Time and memory must grow no faster than n to the 1.1."""

    def figures(rows: list[Measured]) -> list[Figure]:
        return [
            Figure("log-log slope of time in n", slope(rows, name, "seconds"), 1.1, True),
            Figure("log-log slope of extra memory in n", slope(rows, name, "memory"), 1.1, True),
        ]

    return figures


@case("topk_mask_linear", "Soft top-k mask: time and memory linear in n (k = 100, eps 1e-2)", slopes(MASK))
def topk_mask_linear(quick: bool) -> Iterator[Setting]:
    """One row of n float32 scores, forward and backward. Error: largest absolute difference from the
    float64 mask found by bisection.
    """
    k, epsilon = 100, 1e-2
    for power in range(4, 7 if quick else 8):
        n = 10**power
        x, cotangent = torch.randn(1, n), torch.randn(1, n)
        truth = oracles.topk_mask(x, k, epsilon)

        def error(found: Tensor, truth: Tensor = truth) -> float:
            return oracles.worst(found, truth)

        run = differentiated(lambda z: cp.soft_topk_mask(z, k, epsilon=epsilon), x, cotangent)
        yield Setting(
            f"n = 1e{power}",
            [Contender(MASK, run, "ours", error, bar=2e-4, memory=True), *floors(x, k)],
            values={"n": n},
        )


def plan_error(x: Tensor, k: int, epsilon: float) -> Callable[[tuple[Tensor, Tensor]], float]:
    """The larger of the marginals' L1 residual and a hundredth of the departure from Gibbs form."""
    z = oracles.standardized(x)
    n = x.shape[-1]
    targets = torch.arange(k, 0, -1, dtype=torch.float64)

    def error(result: tuple[Tensor, Tensor]) -> float:
        weights = result[1].detach().double()
        rest = (1 - weights.sum(-2)).clamp_max(0).abs().sum(-1) * 2 / n
        rows = (weights.sum(-1) - 1).abs().sum(-1) * 2 / n
        sums = float((rows + rest).max())
        if math.isnan(sums):
            return math.nan
        cost = -2 * z[..., None, :] * targets[:, None] / epsilon
        return max(sums, oracles.gibbs_defect(weights, cost) / 100)

    return error


def sorted_figures(rows: list[Measured]) -> list[Figure]:
    return [
        Figure(
            f"{label(epsilon)}: {LOOP} / ours",
            quotient(rows, label(epsilon), LOOP, SORTED),
            60 if epsilon > 1e-3 else 300,
            at_most=False,
        )
        for epsilon in EPSILONS
    ]


@case("sorted_topk", "Sorted soft top-k: 64 x 1000, k = 10, float32, forward", sorted_figures)
def sorted_topk(quick: bool) -> Iterator[Setting]:
    """Error: L1 residual of the marginals (mass 1), or a hundredth of the departure from the plan's
    exponential form if that is larger. The SOFT loop is the textbook algorithm of the paper's appendix with
    targets 0..10 on the same standardised scores. softtorch's error is that of its rows' and columns' sums.
    """
    k = 10
    x = torch.randn(64, 1000)
    sweeps = 20 if quick else 200
    for epsilon in EPSILONS:
        error = plan_error(x, k, epsilon)

        def ours(epsilon: float = epsilon) -> tuple[Tensor, Tensor]:
            values, weights = cp.soft_topk(x, k, epsilon=epsilon)
            return values, weights

        def loop(epsilon: float = epsilon) -> tuple[Tensor, Tensor]:
            return soft.sorted_topk(x, k, epsilon, sweeps=sweeps)

        def softtorch(epsilon: float = epsilon) -> Contender:
            libraries.library("softtorch", "softtorch (Python >= 3.12)")
            return Contender(
                "softtorch topk, softsort",
                lambda: libraries.softtorch_topk(x, k, epsilon, "softsort"),
                "peer",
                lambda found: float((found[1].double().sum(-2) - 1).clamp_min(0).sum(-1).max()),
                note="another relaxation; error: how much entries are selected more than once",
            )

        setting = Setting(
            label(epsilon),
            [
                Contender(SORTED, ours, "ours", error, bar=1e-5, memory=True),
                Contender(TOPK, lambda: torch.topk(x, k), "floor"),
                Contender(
                    LOOP,
                    loop,
                    "peer",
                    error,
                    scale=200 / sweeps,
                    memory=True,
                    note=f"{sweeps} sweeps timed, x {200 // sweeps}" if quick else "",
                ),
            ],
        )
        setting.add(softtorch, "softtorch")
        yield setting


@case(
    "sorted_topk_linear", "Sorted soft top-k: time and memory linear in n (k = 10, eps 1e-2)", slopes(SORTED)
)
def sorted_topk_linear(quick: bool) -> Iterator[Setting]:
    """One row of n float32 scores, forward and backward (through the values). Error as in sorted_topk."""
    k, epsilon = 10, 1e-2
    for power in range(4, 6 if quick else 8):
        n = 10**power
        x = torch.randn(1, n)

        def run(x: Tensor = x) -> tuple[Tensor, Tensor]:
            leaf = x.detach().requires_grad_()
            values, weights = cp.soft_topk(leaf, k, epsilon=epsilon)
            values.sum().backward()
            return values.detach(), weights.detach()

        yield Setting(
            f"n = 1e{power}",
            [
                Contender(SORTED, run, "ours", plan_error(x, k, epsilon), bar=1e-5, memory=True),
                Contender(TOPK, lambda x=x: torch.topk(x, k), "floor"),  # type: ignore[misc]
            ],
            values={"n": n},
        )
