"""soft_permutation, method="network", against diffsort."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import couplings as cp
from benchmarks import oracles
from benchmarks.cases.selection import differentiated
from benchmarks.peers import libraries
from benchmarks.registry import Contender, Setting, case

OURS, PEER, SORT = "couplings network", "diffsort", "torch.sort"
SHAPES = ((128, 16), (128, 32), (16, 128))
EPSILON = 0.1


def comparators(wires: str, n: int) -> Iterator[tuple[int, int]]:
    """Pairs of places, the smaller value to the first: odd-even, or bitonic in its form of two directions."""
    if wires == "odd_even":
        for step in range(n):
            yield from ((i, i + 1) for i in range(step % 2, n - 1, 2))
        return
    size = 2
    while size <= n:
        step = size // 2
        while step:
            for i in range(n):
                if i & step == 0:
                    yield (i, i + step) if i & size == 0 else (i + step, i)
            step //= 2
        size *= 2


def permutation(row: Tensor, wires: str) -> Tensor:
    """The soft permutation of one row in float64, comparator by comparator, with Cauchy swaps."""
    value, matrix = row.double().tolist(), torch.eye(len(row), dtype=torch.float64)
    for low, high in comparators(wires, len(row)):
        keep = 0.5 + math.atan((value[high] - value[low]) / EPSILON) / math.pi
        a, b = value[low], value[high]
        value[low], value[high] = keep * a + (1 - keep) * b, (1 - keep) * a + keep * b
        first, second = matrix[low].clone(), matrix[high].clone()
        matrix[low], matrix[high] = keep * first + (1 - keep) * second, (1 - keep) * first + keep * second
    return matrix


@case("network", "Permutations by sorting networks, Cauchy swaps, float32, forward and backward")
def networks(quick: bool) -> Iterator[Setting]:
    """Error: largest difference of the first row's matrix from comparators one by one in float64."""
    for shape in SHAPES[:1] if quick else SHAPES:
        x, cotangent = torch.randn(shape), torch.randn(*shape, shape[1])
        for wires in ("odd_even", "bitonic"):
            expected = permutation(x[0], wires)

            def error(found: Tensor, expected: Tensor = expected) -> float:
                return oracles.worst(found[0].double(), expected)

            def ours(t: Tensor, wires: str = wires) -> Tensor:
                return cp.soft_permutation(
                    t, method="network", variant=f"{wires}_cauchy", epsilon=EPSILON, standardize=False
                )

            setting = Setting(
                f"{wires} {shape[0]}x{shape[1]}",
                [
                    Contender(OURS, differentiated(ours, x, cotangent), "ours", error, bar=1e-5),
                    Contender(SORT, lambda x=x: x.sort(), "floor"),  # type: ignore[misc]
                ],
            )

            def peer(
                x: Tensor = x,
                cotangent: Tensor = cotangent,
                wires: str = wires,
                error: Callable[[Tensor], float] = error,
            ) -> Contender:
                run = libraries.diffsort_permutation(wires, x.shape[-1], 1 / EPSILON)
                return Contender(PEER, differentiated(run, x, cotangent), "peer", error)

            setting.add(peer, "diffsort")
            yield setting
