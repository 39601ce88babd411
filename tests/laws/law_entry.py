"""What an entry of the table is: an operator, its tensors by the names of their axes, and the laws it obeys."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import hypothesis.strategies as st
import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Settings = dict[str, object]
Outputs = tuple[Tensor, ...]

LAWS = (
    "permutation",  # entries in another order: results in that order
    "invariance",  # shift, scale, rotation, ..: whatever must change nothing, or the result likewise
    "rows",  # other rows' values change nothing, bitwise
    "alone",  # a row alone gives what it gives in a batch, to rounding
    "padding",  # masked entries get 0 and no gradient, whatever they hold; the others' results stay
    "order",  # larger scores get larger results
    "sums",  # sums, marginals, bounds
    "hard limit",  # epsilon -> 0
    "flat limit",  # epsilon -> infinity
    "repeat",  # inputs stay as they are; the same input gives the same bits
    "nan",  # a row with NaN is NaN, and no other
    "gradients",  # no NaN in the gradient of finite input, with ties, at magnitudes of 1e-30 to 1e30
    "half",  # half precision is computed in float32 and returned in its dtype
    "batch",  # any leading dimensions, none of an empty batch
)


@dataclass(frozen=True)
class Sizes:
    """One draw: everything follows from it, so that it shrinks and repeats."""

    seed: int
    n: int
    m: int
    ties: bool
    masked: bool
    epsilon: float

    def source(self) -> Source:
        return Source(self)


sizes = st.builds(
    Sizes,
    seed=st.integers(0, 2**31 - 1),
    n=st.integers(2, 13),
    m=st.integers(2, 9),
    ties=st.booleans(),
    masked=st.booleans(),
    epsilon=st.sampled_from([0.5, 0.1, 0.02]),
)


class Source:
    """Random tensors of a draw: three rows (the axis b), float64."""

    ROWS = 3

    def __init__(self, drawn: Sizes) -> None:
        self.drawn, self.n, self.m = drawn, drawn.n, drawn.m
        self.generator = torch.Generator().manual_seed(drawn.seed)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def scores(self, *shape: int) -> Tensor:
        """Normal, or with many ties."""
        x = self.randn(*shape)
        return x.round() if self.drawn.ties else x

    def positive(self, *shape: int) -> Tensor:
        return 0.1 + torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """From low to high, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def flags(self, *shape: int, share: float = 0.5) -> Tensor:
        return torch.rand(shape, generator=self.generator) < share

    def mask(self, *shape: int) -> Tensor:
        """Any pattern with one valid entry at least along the last dimension."""
        if not self.drawn.masked:
            return torch.ones(shape, dtype=torch.bool)
        mask = self.flags(*shape, share=0.7)
        return mask.scatter(-1, self.integers(0, shape[-1] - 1, *shape[:-1], 1), True)

    def masses(self, mask: Tensor) -> Tensor:
        """Positive where valid, with sum 1."""
        weight = self.positive(*mask.shape) * mask
        return weight / weight.sum(-1, keepdim=True)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)


Changed = tuple[Tensors, Tensors, Callable[[Outputs], Outputs]]
"""Inputs before, inputs after, and what the change makes of the outputs."""


@dataclass(frozen=True)
class Operator:
    """A row of the table.

    Attributes:
        name: as a user writes it behind ``couplings.``; with the variant it names the row.
        variant: which of its methods or forms.
        draw: random tensors and settings.
        call: (tensors, epsilon, settings) -> outputs.
        inputs, outputs: the axes of each tensor, one letter each: b rows that never meet, s places in an order, any
            other letter entries.
        free: axes whose entries may come in any order.
        rows: axes whose entries never meet.
        masks: mask of each axis that may be padded.
        poison: the input that gets a NaN.
        learned: inputs with a gradient.
        scaled: inputs to which the magnitudes of the gradient law are applied.
        invariances: changes that do nothing, or the like to the outputs.
        ordered: (input, output): the latter rises with the former along n.
        sums: (tensors, settings, outputs) -> pairs of what must be equal.
        hard: tensors, settings -> outputs at epsilon -> 0, and the epsilon that is small enough.
        flat: likewise for epsilon -> infinity.
        tolerance: of float64 results.
        without: why a law does not apply.
    """

    name: str
    draw: Callable[[Source], tuple[Tensors, Settings]]
    call: Callable[[Tensors, float, Settings], Outputs]
    inputs: dict[str, str]
    outputs: tuple[str, ...]
    variant: str = ""
    free: str = ""
    rows: str = "b"
    masks: dict[str, str] = field(default_factory=dict)
    poison: str = "x"
    learned: tuple[str, ...] = ()
    scaled: tuple[str, ...] = ()
    invariances: tuple[Callable[[Tensors, Source], Changed], ...] = ()
    ordered: tuple[str, int] | None = None
    sums: Callable[[Tensors, Settings, Outputs], Iterable[tuple[Tensor, Tensor]]] | None = None
    hard: tuple[Callable[[Tensors, Settings], Outputs], float] | None = None
    flat: tuple[Callable[[Tensors, Settings], Outputs], float] | None = None
    tolerance: float = 1e-8
    without: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}[{self.variant}]" if self.variant else self.name

    def given(self, law: str) -> bool:
        """Whether the entry says what the law needs."""
        return {
            "permutation": bool(self.free),
            "invariance": bool(self.invariances),
            "rows": bool(self.rows),
            "alone": bool(self.rows),
            "nan": bool(self.rows),
            "padding": bool(self.masks),
            "order": self.ordered is not None,
            "sums": self.sums is not None,
            "hard limit": self.hard is not None,
            "flat limit": self.flat is not None,
            "gradients": bool(self.learned),
        }.get(law, True)


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Floating tensors in ``dtype``."""
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


# ---------------------------------------------------------------------------------------------- invariances


def affine(
    *names: str, like: Callable[[Outputs, Tensor, Tensor], Outputs] | None = None, mask: str = "mask"
) -> Callable[[Tensors, Source], Changed]:
    """op(c x + d) == op(x), row by row, with c from 1e-27 to 1e27; or ``like(op(x), c, d)``, without a mask then."""

    def change(tensors: Tensors, source: Source) -> Changed:
        rows = tensors[names[0]].shape[0]
        near = source.flags(rows)
        scale = torch.where(
            near, 0.3 + source.positive(rows), torch.exp2(source.integers(-90, 90, rows).double())
        )
        move = torch.where(near, source.randn(rows), 0.0)
        before = dict(tensors)
        if like and mask in before:
            before[mask] = torch.ones_like(before[mask])
        after = dict(before)
        for name in names:
            x = before[name]
            fit = (rows, *(1,) * (x.dim() - 1))
            after[name] = scale.reshape(fit) * x + move.reshape(fit)
        return before, after, lambda out: like(out, scale[:, None], move[:, None]) if like else out

    return change


def as_values(out: Outputs, scale: Tensor, move: Tensor) -> Outputs:
    """Results (b, ..) in the units of the scores."""
    return tuple(scale * t + move for t in out)


def shifted(name: str) -> Callable[[Tensors, Source], Changed]:
    """A constant added to each row changes nothing."""

    def change(tensors: Tensors, source: Source) -> Changed:
        x = tensors[name]
        move = 3 * source.randn(x.shape[0], *(1,) * (x.dim() - 1))
        return tensors, {**tensors, name: x + move}, lambda out: out

    return change


def turned(*names: str) -> Callable[[Tensors, Source], Changed]:
    """The same rotation of all vectors (last dimension) changes nothing."""

    def change(tensors: Tensors, source: Source) -> Changed:
        d = tensors[names[0]].shape[-1]
        rotation = torch.linalg.qr(source.randn(d, d)).Q
        return tensors, {**tensors, **{k: tensors[k] @ rotation for k in names}}, lambda out: out

    return change


def stretched(*names: str) -> Callable[[Tensors, Source], Changed]:
    """The lengths of vectors do not matter, from 1e-27 to 1e27."""

    def change(tensors: Tensors, source: Source) -> Changed:
        after = dict(tensors)
        for name in names:
            x = tensors[name]
            after[name] = x * torch.exp2(source.integers(-90, 90, *x.shape[:-1], 1).double())
        return tensors, after, lambda out: out

    return change
