"""soft_rank, soft_sort and soft_quantile against OTT-JAX, torchsort, fast-soft-sort, softtorch and torch.sort."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import couplings as cp
from benchmarks import oracles
from benchmarks.cases.selection import differentiated, slope
from benchmarks.peers import libraries
from benchmarks.registry import Contender, Figure, Measured, Setting, case, pick, quotient
from couplings.testing.ordering import ordered_plan

OURS, SORT, OTT = "couplings", "torch.sort", "OTT-JAX ranks, threshold 1e-5"
OTT_BARS = {"2048 eps 0.1": 25, "2048 eps 0.01": 200, "2048 eps 0.001": 600, "16x512 eps 0.01": 100}


def squashed(x: Tensor) -> Tensor:
    """What both solvers are given, (rows, n) float64."""
    return torch.sigmoid(oracles.standardized(x) * math.pi / math.sqrt(3))


def rank_error(x: Tensor, epsilon: float) -> Callable[[Tensor], float]:
    """Largest distance over n of the first row's ranks from those of a dense float64 Newton."""
    n = x.shape[-1]
    even = torch.full((n,), 1 / n, dtype=torch.float64)
    plan = ordered_plan(squashed(x)[0], even, torch.linspace(0, 1, n, dtype=torch.float64), even, epsilon)
    expected = plan.given_point @ torch.arange(1, n + 1, dtype=torch.float64)
    return lambda found: oracles.worst(found[0].double() / n, expected / n)


def against_ott(rows: list[Measured]) -> list[Figure]:
    return [
        Figure(f"{where}: {OTT} / ours", quotient(rows, where, OTT, OURS), bar, at_most=False)
        for where, bar in OTT_BARS.items()
    ]


@case("ordering_ranks", "Soft ranks by transport, forward, float32", against_ott)
def ranks(quick: bool) -> Iterator[Setting]:
    """Error: largest distance of a rank over n from a dense float64 Newton solve on the same squashed scores; OTT-JAX
    gets the standardised and squashed scores and stops at a marginal error of 1e-5. torchsort, fast-soft-sort and
    softtorch solve other problems and stand for time only.
    """
    for shape, epsilons in (((1, 2048), (1e-1, 1e-2, 1e-3)), ((16, 512), (1e-2,))):
        x = torch.randn(shape)
        for epsilon in epsilons[:2] if quick else epsilons:
            error = rank_error(x, epsilon)
            size = str(shape[1]) if shape[0] == 1 else f"{shape[0]}x{shape[1]}"

            def ours(x: Tensor = x, e: float = epsilon) -> Tensor:
                return cp.soft_rank(x, epsilon=e)

            def hard(x: Tensor = x) -> Tensor:
                return x.sort().values

            setting = Setting(
                f"{size} eps {epsilon:g}",
                [Contender(OURS, ours, "ours", error, bar=2e-6), Contender(SORT, hard, "floor")],
            )

            def ott(x: Tensor = x, e: float = epsilon, error: Callable[[Tensor], float] = error) -> Contender:
                run = libraries.ott_ranks(squashed(x).float(), e, threshold=1e-5)
                return Contender(OTT, run, "peer", lambda found: error(libraries.to_torch(found)))

            def torchsort(x: Tensor = x) -> Contender:
                soft = libraries.library("torchsort", "torchsort").soft_rank
                return Contender("torchsort l2", lambda: soft(x, regularization_strength=0.1), "peer")

            def fast_soft_sort(x: Tensor = x) -> Contender:
                soft = libraries.library("fast_soft_sort.pytorch_ops", "fast-soft-sort").soft_rank
                return Contender("fast-soft-sort l2", lambda: soft(x, regularization_strength=0.1), "peer")

            def softtorch(x: Tensor = x, e: float = epsilon) -> Contender:
                run = libraries.softtorch_rank(squashed(x).float(), e, "ot")
                return Contender("softtorch rank, ot", run, "peer", note="its own scale of softness")

            setting.add(ott, "OTT-JAX")
            setting.add(torchsort, "torchsort")
            setting.add(fast_soft_sort, "fast-soft-sort")
            setting.add(softtorch, "softtorch")
            yield setting


def long_rows(rows: list[Measured]) -> list[Figure]:
    found = []
    million, ten = "n = 1e6, eps 0.01", "n = 1e7, eps 0.01"
    for where, name, bound in (
        (million, OURS, 0.5),
        (million, f"{OURS}, forward and backward", 0.9),
        (million, f"{OURS}, ranks and sorted values", 1.0),
        (ten, OURS, 0.35),
    ):
        found.append(
            Figure(f"{where}: {name} / {SORT}", quotient(rows, where, name, SORT), bound, at_most=True)
        )
    row = pick(rows, ten, OURS)
    if row is not None and row.memory is not None:
        found.append(Figure("n = 1e7: extra memory, GiB", row.memory / 2**30, 1.0, at_most=True))
    line = [row for row in rows if row.name == OURS and row.setting.endswith("eps 0.01")]
    if len(line) > 2:
        times = slope(line, OURS, "seconds")
        found.append(Figure("eps 0.01: log-log slope of time in n", times, 1.05, at_most=True))
    cold, warm = (pick(rows, f"n = 1e5, eps {epsilon}", OURS) for epsilon in ("0.0001", "0.1"))
    if cold is not None and warm is not None:
        ratio = cold.seconds / warm.seconds
        found.append(Figure("n = 1e5: time at eps 1e-4 / 1e-1", ratio, 20, at_most=True))
    quantiles = "n = 1e6, eps 0.01, 9 quantiles"
    value = quotient(rows, quantiles, f"{OURS} soft_quantile", SORT)
    found.append(Figure(f"{quantiles}: ours / {SORT}", value, 10, at_most=True))
    return found


def marginals(x: Tensor, epsilon: float) -> Callable[[object], float]:
    """The measured residual of the plan: exact marginals of 16 entries and 16 targets."""
    return lambda _: float(cp.order_certificate(x, epsilon=epsilon, samples=16).residual)


@case("ordering_long", "Soft ranks, sorted values and quantiles of long rows, float32", long_rows)
def long(quick: bool) -> Iterator[Setting]:
    """Error: L1 error of both marginals, from exact marginals at 16 entries and 16 targets (order_certificate); of the
    quantiles, distance from the exact ones in standard deviations, which is mostly the bias of epsilon.
    """
    settings = [(10**power, 1e-2) for power in range(4, 7 if quick else 8)]
    settings += [(10**5, epsilon) for epsilon in (1e-1, 1e-3, 1e-4)]
    for n, epsilon in settings:
        x = torch.randn(n)
        cotangent = torch.randn(n)
        error = marginals(x, epsilon)

        def both(x: Tensor = x, e: float = epsilon) -> tuple[Tensor, Tensor]:
            return cp.soft_rank(x, epsilon=e), cp.soft_sort(x, epsilon=e)

        def forward(x: Tensor, e: float = epsilon) -> Tensor:
            return cp.soft_rank(x, epsilon=e)

        yield Setting(
            f"n = 1e{round(math.log10(n))}, eps {epsilon:g}",
            [
                Contender(OURS, lambda x=x, f=forward: f(x), "ours", error, bar=2e-6, memory=True),  # type: ignore[misc]
                Contender(f"{OURS}, forward and backward", differentiated(forward, x, cotangent), "ours"),
                Contender(f"{OURS}, ranks and sorted values", both, "ours"),
                Contender(SORT, lambda x=x: x.sort(), "floor"),  # type: ignore[misc]
            ],
            values={"n": n},
        )
    x = torch.randn(10**6)
    levels = torch.linspace(0.1, 0.9, 9)
    exact = torch.quantile(x.double(), levels.double())
    yield Setting(
        "n = 1e6, eps 0.01, 9 quantiles",
        [
            Contender(
                f"{OURS} soft_quantile",
                lambda: cp.soft_quantile(x, levels, epsilon=1e-2),
                "ours",
                lambda found: oracles.worst(found, exact),
                bar=1e-1,
            ),
            Contender(SORT, lambda: x.sort(), "floor"),
        ],
        values={"n": 10**6},
    )
