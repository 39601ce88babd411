"""soft_rank and soft_sort, method="projection", against torch.sort, torchsort and fast-soft-sort."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import oracles
from benchmarks.cases.selection import differentiated
from benchmarks.peers.libraries import library
from benchmarks.registry import Contender, Figure, Measured, Setting, case, quotient
from couplings.ordering import projection
from couplings.ordering.rows import prepare

SHAPES = ((128, 1000), (1, 100_000))
EPSILONS = {"rank": (1e-2, 1e-1, 1.0, 10.0), "sort": (10.0, 100.0, 1e3)}
OURS, SORT = "couplings projection", "torch.sort"
BAR = {"rank": 1e-6, "sort": 2e-6}  # relative to the largest rank; in standard deviations


def label(operator: str, regularization: str, shape: tuple[int, int], epsilon: float) -> str:
    return f"{operator} {regularization} {shape[0]}x{shape[1]} eps {epsilon:g}"


def fitted(scores: Any, targets: Any, kl: bool) -> Any:
    """The projection of rising scores onto the permutahedron of rising targets, block by block."""
    numpy = library("numpy", "numpy")
    if not kl:
        fit = library("scipy.optimize", "scipy").isotonic_regression
        return scores - fit(scores - targets).x
    blocks: list[list[float]] = []  # value, log sum exp of scores, of targets, entries
    for s, w in zip(scores.tolist(), targets.tolist()):
        blocks.append([s - w, s, w, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            _, s, w, size = blocks.pop()
            _, other_s, other_w, other = blocks.pop()
            s, w = float(numpy.logaddexp(s, other_s)), float(numpy.logaddexp(w, other_w))
            blocks.append([s - w, s, w, size + other])
    sizes = [int(block[3]) for block in blocks]
    return scores - numpy.repeat([block[0] for block in blocks], sizes)


def error(operator: str, x: Tensor, epsilon: float, kl: bool) -> Callable[[Tensor], float]:
    """Distance of the first row from the float64 projection by sequential pooling."""
    z, order = oracles.standardized(x[:1])[0].sort()
    place = torch.arange(1, len(z) + 1, dtype=torch.float64)
    if operator == "rank":
        truth = fitted((z / epsilon).numpy(), (place.log() if kl else place).numpy(), kl)
        found = torch.from_numpy(truth).exp() if kl else torch.from_numpy(truth)
        expected = torch.empty_like(z).scatter(0, order, found) / len(z)
        return lambda result: oracles.worst(result[0].double() / len(z), expected)
    expected = torch.from_numpy(fitted((place / epsilon).numpy(), z.numpy(), kl))
    mean, std = x[0].double().mean(), x[0].double().std(unbiased=False)
    return lambda result: oracles.worst((result[0].double() - mean) / std, expected)


def figures(rows: list[Measured]) -> list[Figure]:
    return [
        Figure(f"{where}: ours / {SORT}", quotient(rows, where, OURS, SORT), 6, at_most=True)
        for where in dict.fromkeys(row.setting for row in rows)
    ]


@case("projection", "Projection onto the permutahedron, float32, forward and backward", figures)
def permutahedron(quick: bool) -> Iterator[Setting]:
    """Error: largest difference of the first row from the float64 projection found by sequential pooling, in
    units of the largest rank or of the standard deviation. The peers get standardised scores.
    """
    for shape in SHAPES[:1] if quick else SHAPES:
        x, cotangent = torch.randn(shape), torch.randn(shape)
        z = oracles.standardized(x).float()
        for operator, epsilons in EPSILONS.items():
            ours = projection.ranks if operator == "rank" else projection.sorted_values
            for regularization in projection.REGULARIZATIONS:
                for epsilon in epsilons:

                    def forward(
                        t: Tensor, e: float = epsilon, r: str = regularization, f: Any = ours
                    ) -> Tensor:
                        result: Tensor = f(prepare(t, 1, False, None, None, True), e, regularization=r)
                        return result

                    check = error(operator, x, epsilon, regularization == "kl")
                    setting = Setting(
                        label(operator, regularization, shape, epsilon),
                        [
                            Contender(
                                OURS, differentiated(forward, x, cotangent), "ours", check, BAR[operator]
                            ),
                            Contender(
                                SORT, differentiated(lambda t: t.sort(-1).values, x, cotangent), "floor"
                            ),
                        ],
                    )
                    for module, package in (
                        ("torchsort", "torchsort"),
                        ("fast_soft_sort.pytorch_ops", "fast-soft-sort"),
                    ):

                        def peer(
                            module: str = module,
                            package: str = package,
                            e: float = epsilon,
                            r: str = regularization,
                            o: str = operator,
                            z: Tensor = z,
                            cotangent: Tensor = cotangent,
                        ) -> Contender:
                            function = getattr(library(module, package), f"soft_{o}")
                            reference = error(o, z, e, r == "kl")

                            def run(t: Tensor) -> Tensor:
                                result: Tensor = function(t, regularization_strength=e, regularization=r)
                                return result

                            note = (
                                "its kl sort is the limit of another sign" if (o, r) == ("sort", "kl") else ""
                            )
                            return Contender(
                                package, differentiated(run, z, cotangent), "peer", reference, note=note
                            )

                        setting.add(peer, package)
                    yield setting
