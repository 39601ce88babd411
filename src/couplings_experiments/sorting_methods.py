"""Sorting 4-digit numbers: from digit images to numbers, the losses that see only the order, and what is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import couplings as cp
from couplings_experiments.data import Split

DIGITS = 4  # of a number
VALIDATION = (400, 1000)  # numbers, and sequences of them, looked at after every epoch
_TINY = 1e-20  # inside the logarithm of a probability


@dataclass(frozen=True)
class Choice:
    """The settings of one method.

    Attributes:
        learning_rate: of SGD.
        epsilon: of the operator.
        target: what the loss compares: the soft "permutation" with the true one by cross-entropy, or the soft
            "ranks" with the true ones by squared error.
        standardize: whether every sequence of scores is measured in its own standard deviations.
        squash: of the scores, ``method="transport"`` only.
        variant: of the method.
    """

    learning_rate: float
    epsilon: float
    target: str = "permutation"
    standardize: bool = False
    squash: str | None = None
    variant: str | None = None


class Score(NamedTuple):
    """Shares of sequences whose order is exactly right, and of elements whose rank is."""

    exact: float
    ranks: float


def compose(digits: Split) -> tuple[Tensor, Tensor]:
    """Numbers (m, channels, h, 4 w) and their values (m,) from 4 m digit images, four after four.

    Any images with labels serve as digits: a label's last digit counts.
    """
    count, channels, height, width = digits.images.shape
    four = digits.images.reshape(count // DIGITS, DIGITS, channels, height, width)
    images = four.permute(0, 2, 3, 1, 4).reshape(count // DIGITS, channels, height, DIGITS * width)
    places = torch.tensor([10**i for i in range(DIGITS - 1, -1, -1)], device=digits.labels.device)
    return images, (digits.labels.reshape(-1, DIGITS) % 10 * places).sum(-1)


def draw_numbers(digits: Split, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` numbers of digits drawn with replacement from ``digits``."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(digits), (DIGITS * count,), generator=generator).to(digits.labels.device)
    return compose(Split(digits.images[index], digits.labels[index]))


def ranks_of(x: Tensor) -> Tensor:
    """Ranks 0..n-1 along the last dimension; equal entries in the order in which they come."""
    return x.argsort(dim=-1, stable=True).argsort(dim=-1)


def sequences_of(values: Tensor, length: int, count: int, seed: int) -> Tensor:
    """Indices (at most count, length) of sequences of different numbers: equal ones have no right order."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(values), (count, length), generator=generator).to(values.device)
    return index[(values[index].sort(dim=-1).values.diff(dim=-1) > 0).all(-1)]


class Sorter:
    """A network that scores images of numbers, trained by nothing but the order of short sequences of them."""

    def __init__(self, network: nn.Module, method: str, choice: Choice, length: int) -> None:
        self.module = network
        self.method = method
        self.choice = choice
        self.length = length

    def loss(self, queries: Split, templates: Split, noise: torch.Generator) -> Tensor:
        """Of sequences made of the digit images ``queries``; ``templates`` are not used."""
        images, values = compose(queries)
        scores = self.module(images).reshape(-1, self.length)
        return order_loss(scores, values.reshape(-1, self.length), self.method, self.choice, noise)

    def accuracy(self, train: Split, held: Split) -> float:
        """Share of sequences of held digits that are sorted exactly."""
        return self.score(held, *VALIDATION).exact

    def score(self, held: Split, numbers: int, sequences: int) -> Score:
        """What is measured, on sequences drawn from so many numbers; the same ones for every method and seed."""
        images, values = draw_numbers(held, numbers, seed=0)
        scores = self.scores(images)
        index = sequences_of(values, self.length, sequences, seed=self.length)
        right = ranks_of(scores[index]) == ranks_of(values[index])
        return Score(float(right.all(-1).double().mean()), float(right.double().mean()))

    def scores(self, images: Tensor) -> Tensor:
        """(m,) without gradients, a batch at a time."""
        with torch.no_grad():
            return torch.cat([self.module(part) for part in images.split(500)])


def order_loss(
    scores: Tensor, values: Tensor, method: str, choice: Choice, noise: torch.Generator | None
) -> Tensor:
    """How far the soft order of ``scores`` (b, n) is from the order of ``values`` (b, n)."""
    transport = method == "transport"
    operator = cp.soft_rank if choice.target == "ranks" else cp.soft_permutation
    soft = operator(
        scores,
        method=method,
        variant=choice.variant,
        epsilon=choice.epsilon,
        standardize=choice.standardize,
        squash=choice.squash if transport else "logistic",
        generator=noise if choice.variant == "stochastic" else None,
    )
    if choice.target == "ranks":
        wanted = ranks_of(values).to(soft.dtype) + 1
        return (soft - wanted).square().mean() / scores.shape[-1]
    who = values.argsort(dim=-1, stable=True).unsqueeze(-1)
    return -(soft.gather(-1, who) + _TINY).log().mean()
