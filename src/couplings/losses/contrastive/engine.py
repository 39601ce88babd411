"""The tiled loss as one ``autograd.Function``: O(n tile) memory, gradients to both sides, to scale, shift and extra.

``TiledLoss`` is the loss, ``TiledGradient`` its gradient, a function of its own so that it can be differentiated; that
second derivative goes through the whole matrix of scores (``dense.py``), up to ``DENSE_LIMIT`` of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from couplings._checks import reject
from couplings._rowwise import apply
from couplings.losses.contrastive import dense
from couplings.losses.contrastive.pair_tiles import PairTiles
from couplings.losses.contrastive.pairs import Pairs
from couplings.losses.contrastive.scores import Similarity, all_logits, provider
from couplings.losses.contrastive.softmax_tiles import SoftmaxTiles, Stats

DENSE_LIMIT = 2**24
"""Scores that a second derivative may hold in memory at once (several times over)."""


@dataclass(frozen=True)
class Plan:
    """What is computed: everything that is no tensor.

    Attributes:
        kind: "softmax", "sigmoid" or "square".
        positives: "own", "each" or "mean"; see ``pairs.Sorter``.
        margin: of the guide.
        columns: whether columns have losses of their own (softmax only).
        similarity: the user's function, or None for the dot product.
        total: whether the weighted sum is wanted, rather than each loss.
        fused: form the gradient of the weighted sum together with the loss; needs ``total``, and no ``columns`` unless
            one block holds all rows.
    """

    kind: str
    positives: str = "each"
    margin: float = 0.0
    columns: bool = False
    similarity: Similarity | None = None
    total: bool = True
    fused: bool = False


@dataclass
class Inputs:
    """The differentiable inputs, and the tensors that are not.

    Attributes:
        x1: (n, ...), or the (n, m) scores.
        x2: (m, ...), or None.
        scale: () factor of the scores.
        shift: () added to them; None for softmax, which does not feel it.
        extra: (n,) log-sum-exp of further negatives of each row, or None.
        shares: for sums over pairs, weights of a row's positive and of its negative pairs, (n,) each, and the target of
            negative pairs, (); three times None for softmax.
        pairs: the structure.
    """

    x1: Tensor
    x2: Tensor | None
    scale: Tensor
    shift: Tensor | None
    extra: Tensor | None
    shares: tuple[Tensor | None, ...]
    pairs: Pairs


INPUTS = 8 + len(Pairs._fields)
"""How many arguments the fields of ``Inputs`` are when flattened."""


def tiled_loss(
    inputs: Inputs, by_row: Tensor, by_column: Tensor, plan: Plan
) -> Tensor | tuple[Tensor, Tensor]:
    """The sum of row and column losses with the weights ``by_row`` and ``by_column``, or the losses themselves.

    Args:
        inputs: the tensors; ``by_row`` and everything that is not an input of ``Inputs`` is not differentiated.
        by_row: (n,) weights of the row losses.
        by_column: (m,) weights of the column losses.
        plan: the rest.
    """
    total, rows, columns, *_ = apply(TiledLoss, *distinct(*_flatten(inputs), by_row, by_column), plan)
    return total if plan.total else (rows, columns)


def _flatten(inputs: Inputs) -> tuple[Any, ...]:
    tensors = (inputs.x1, inputs.x2, inputs.scale, inputs.shift, inputs.extra)
    return (*tensors, *inputs.shares, *inputs.pairs)


def distinct(*args: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under compile no tensor twice (x1 as x2, one tensor of ids for both sides): dynamo does not trace that."""
    if not torch.compiler.is_compiling():
        return args
    out: list[Tensor | None] = []
    for arg in args:
        twice = arg is not None and any(arg is other for other in out)
        out.append(arg.view_as(arg) if arg is not None and twice else arg)
    return tuple(out)


def _inputs(args: tuple[Any, ...]) -> Inputs:
    x1, x2, scale, shift, extra, *rest = args[:INPUTS]
    return Inputs(x1, x2, scale, shift, extra, tuple(rest[:3]), Pairs(*rest[3:]))


def _tiles(inputs: Inputs, plan: Plan) -> SoftmaxTiles | PairTiles:
    scores = provider(inputs.x1, inputs.x2, inputs.scale, plan.similarity)
    if plan.kind == "softmax":
        return SoftmaxTiles(scores, inputs.pairs, inputs.extra, plan.positives, plan.margin, plan.columns)
    return PairTiles(
        scores, inputs.shift, inputs.pairs, plan.kind, plan.positives, plan.margin, inputs.shares
    )


class Looped(torch.autograd.Function):
    """vmap runs one batch item after the other: each is a matrix of its own, worked through in blocks."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()

        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
            outs = []
            for item in range(info.batch_size):
                chosen = [
                    arg if dim is None or not isinstance(arg, Tensor) else arg.select(dim, item)
                    for arg, dim in zip(args, in_dims, strict=True)
                ]
                outs.append(apply(cls, *chosen))
            return tuple(torch.stack(parts) for parts in zip(*outs, strict=True)), (0,) * len(outs[0])

        cls.vmap = staticmethod(vmap)  # type: ignore[method-assign]


class TiledLoss(Looped):
    """Total, row losses, column losses, and (not differentiable) statistics and perhaps the gradient of the total."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        inputs, (by_row, by_column, plan) = _inputs(args), args[INPUTS:]
        tiles = _tiles(inputs, plan)
        if plan.fused:
            tiles.scores.start()
        if isinstance(tiles, SoftmaxTiles):
            rows, columns, stats = tiles.forward((by_row, by_column) if plan.fused else None)
        else:
            rows, columns = tiles.forward(by_row if plan.fused else None), torch.zeros_like(by_column)
            stats = tuple(rows.new_zeros(()) for _ in range(4))  # type: ignore[assignment]
        total = (by_row * rows).sum(dtype=torch.float64) + (by_column * columns).sum(dtype=torch.float64)
        slopes = _slopes(tiles, by_row, stats) if plan.fused else ()
        return (total.to(rows.dtype), rows, columns, *stats, *slopes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.plan = inputs
        total, rows, columns, *rest = output
        ctx.save_for_backward(*tensors, *rest)
        ctx.mark_non_differentiable(*((rows, columns) if ctx.plan.total else (total,)), *rest)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        tensors, rest = saved[: INPUTS + 2], saved[INPUTS + 2 :]
        by_row, by_column = tensors[INPUTS:]
        nothing = (None,) * (INPUTS - 5 + 3)
        total, rows, columns = cotangents[:3]
        if ctx.plan.total:
            if total is None:
                return (None,) * 5 + nothing
            if ctx.plan.fused and not torch.is_grad_enabled():
                return _as_given((total * part for part in rest[4:]), tensors) + nothing
            by_row, by_column = total * by_row, total * by_column
        else:
            by_row = torch.zeros_like(by_row) if rows is None else rows
            by_column = torch.zeros_like(by_column) if columns is None else columns
        args = (*tensors[:INPUTS], by_row, by_column, *rest[:4], ctx.plan)
        # a compiled graph has no second derivative, and dynamo does not trace this function within a function
        slopes = (
            TiledGradient.forward(*args) if torch.compiler.is_compiling() else apply(TiledGradient, *args)
        )
        return _as_given(slopes, tensors) + nothing


class TiledGradient(Looped):
    """The derivatives of <by_row, row losses> + <by_column, column losses> in x1, x2, scale, shift, extra."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        inputs, (by_row, by_column, *stats, plan) = _inputs(args), args[INPUTS:]
        tiles = _tiles(inputs, plan)
        if isinstance(tiles, SoftmaxTiles):
            tiles.gradient(by_row, by_column, tuple(stats))
        else:
            tiles.gradient(by_row)
        return _slopes(tiles, by_row, tuple(stats))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.plan = inputs
        ctx.save_for_backward(*tensors[: INPUTS + 2])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """The statistics are functions of the inputs: all is worked out again, from the inputs and densely."""
        tensors, plan = ctx.saved_tensors, ctx.plan
        x1, x2 = tensors[0], tensors[1]
        size = x1.numel() if x2 is None else x1.shape[0] * x2.shape[0]
        if size > DENSE_LIMIT:
            reject(
                "x1 and x2",
                f"at most {DENSE_LIMIT} pairs where a second derivative is taken",
                size,
                "It holds the whole matrix of scores: use fewer rows, or first derivatives only (in any number).",
            )
        places = [i for i, given in enumerate(tensors[:5]) if given is not None]
        fixed = _inputs(tensors)

        def total(*moving: Tensor) -> Tensor:
            *parts, by_row, by_column = moving
            chosen: list[Tensor | None] = [None] * 5
            for place, part in zip(places, parts, strict=True):
                chosen[place] = part
            rows, columns = _dense(chosen, fixed, plan)
            return (by_row * rows).sum() + (by_column * columns).sum()

        moving = (*(tensors[i] for i in places), *tensors[INPUTS:])
        slopes = torch.func.grad(total, argnums=tuple(range(len(places))))
        pull = torch.func.vjp(slopes, *moving)[1]
        found = pull(tuple(cotangents[i] for i in places))
        out: list[Tensor | None] = [None] * (INPUTS + 7)
        for place, part in zip((*places, INPUTS, INPUTS + 1), found, strict=True):
            out[place] = part
        return tuple(out)


def _slopes(tiles: SoftmaxTiles | PairTiles, by_row: Tensor, stats: Stats) -> tuple[Tensor, ...]:
    """What was pulled, with empty scalars for inputs that are absent."""
    x1, x2, scale = tiles.scores.finish()
    if isinstance(tiles, SoftmaxTiles):
        return x1, x2, scale, torch.zeros_like(scale), tiles.by_extra(by_row, stats)
    return x1, x2, scale, tiles.by_shift(), torch.zeros_like(scale)


def _as_given(slopes: Any, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """None for the inputs that are absent."""
    return tuple(None if given is None else slope for slope, given in zip(slopes, tensors[:5], strict=True))


def _dense(moving: list[Tensor | None], fixed: Inputs, plan: Plan) -> tuple[Tensor, Tensor]:
    """Row and column losses by ``dense.py``; ``moving`` are the five differentiable inputs."""
    x1, x2, scale, shift, extra = moving
    if x1 is None or scale is None:
        raise RuntimeError("x1 and scale are always there")
    logits = all_logits(x1, x2, scale, plan.similarity)
    if plan.kind == "softmax":
        return dense.softmax_losses(logits, extra, fixed.pairs, plan.positives, plan.margin, plan.columns)
    if shift is not None:
        logits = logits + shift
    rows = dense.pair_losses(logits, fixed.pairs, plan.kind, plan.positives, plan.margin, fixed.shares)
    return rows, logits.new_zeros(logits.shape[1])
