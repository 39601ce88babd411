"""Eight threads at once compute what one computes, bit for bit, gradients included."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from law_entry import Operator, Outputs, Sizes, Source
from law_table import OPERATORS
from test_every_operator import gradients

THREADS = 8


def answer(operator: Operator, seed: int) -> Outputs:
    drawn = Sizes(seed, n=5 + seed % 3, m=4, ties=seed % 2 == 0, masked=True, epsilon=0.1)
    source = Source(drawn)
    tensors, settings = operator.draw(source)
    if not operator.learned:
        return operator.call(tensors, drawn.epsilon, settings)

    def ones(out: Outputs) -> list[torch.Tensor]:
        return [torch.ones_like(o) for o in out]

    out, found = gradients(operator, tensors, drawn.epsilon, settings, ones)
    return (*out, *found.values())


@pytest.mark.parametrize("group", range(4))
def test_eight_threads_are_one(group: int) -> None:
    """Every thread works through the operators from another place, each on problems of its own."""
    operators = OPERATORS[group::4]
    alone = {
        (place, seed): answer(operator, seed)
        for place, operator in enumerate(operators)
        for seed in range(THREADS)
    }
    start = Barrier(THREADS)

    def work(seed: int) -> dict[tuple[int, int], Outputs]:
        start.wait()
        places = [(seed * len(operators) // THREADS // 2 + i) % len(operators) for i in range(len(operators))]
        return {(place, seed): answer(operators[place], seed) for place in places}

    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(work, range(THREADS)):
            for key, outputs in found.items():
                for one, expected in zip(outputs, alone[key], strict=True):
                    assert torch.equal(one, expected), str(operators[key[0]])
