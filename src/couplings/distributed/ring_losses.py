"""Each loss of this rank's rows with the rows that come by in a ring."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from couplings.distributed.collectives import Ring
from couplings.distributed.ring import Structure, Term, around, softmax_losses
from couplings.distributed.sides import (
    Side,
    Sides,
    average,
    both,
    floored,
    positives_of,
    share,
    square_of,
    twice,
    valid_rows,
    view_counts,
)
from couplings.losses.contrastive.prepare import Batch, prepare, scale_of


def _ring_batch(sides: Sides, given: dict[str, Any]) -> Batch:
    """This rank's rows, normalised and zero where masked."""
    valid = both(sides.first.valid, sides.second.valid)
    return prepare(sides.first.x, sides.second.x, normalize=given["normalize"], mask=valid)


def _structure(rows: Side, columns: Side, positives: str) -> Structure:
    own = torch.arange(rows.x.shape[0], device=rows.x.device)
    if rows.ids is None:
        positives = "own"
    return Structure(positives, own, None, rows.ids, rows.valid, columns.all_ids, columns.all_valid)


def softmax(sides: Sides, given: dict[str, Any]) -> Tensor:
    """InfoNCE of the rows, and of the columns with the sides exchanged."""
    batch, ring, parts = _ring_batch(sides, given), Ring(sides.rows, sides.group), []
    if batch.x2 is None:
        raise RuntimeError("x2 has been checked")
    counts = positives_of(sides.pairs(), given["positives"])
    scale = scale_of(given["temperature"], batch)
    features = ((batch.x1, batch.x2), (batch.x2, batch.x1))
    for back, (rows, columns) in enumerate(sides.directions(given["symmetric"])):
        structure = _structure(rows, columns, given["positives"])
        found = softmax_losses(*features[back], scale, structure, ring, counts[back][sides.mine])
        parts.append(share(found, (counts[back] > 0).sum(), given["reduction"]))
    return average(parts)


def views(sides: Sides, given: dict[str, Any]) -> Tensor:
    """The same with views on both sides: a rank's block is its first views, then its second ones."""
    batch, ring = _ring_batch(sides, given), Ring([2 * n for n in sides.rows], sides.group)
    if batch.x2 is None:
        raise RuntimeError("x2 has been checked")
    views = torch.cat((batch.x1, batch.x2))
    ids = torch.arange(views.shape[0], device=views.device)
    first, n = sides.first, batch.x1.shape[0]

    def in_blocks(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.cat([part for part in x.split(sides.rows) for _ in range(2)])

    structure = Structure(
        given["positives"] if first.ids is not None else "own",
        ids.roll(n),
        ids,
        twice(first.ids),
        twice(first.valid),
        in_blocks(first.all_ids),
        in_blocks(first.all_valid),
    )
    counts = view_counts(sides, given["positives"])
    scale = scale_of(given["temperature"], batch)
    mine = twice(counts[sides.mine])  # both views of an item have as many
    if mine is None:
        raise RuntimeError("counts are there")
    found = softmax_losses(views, views, scale, structure, ring, mine)
    return share(found, (counts > 0).sum(), given["reduction"])


def _ring_pairs(
    sides: Sides, given: dict[str, Any], batch: Batch, term: Term, scale: Tensor, shift: Tensor
) -> Tensor:
    if batch.x2 is None:
        raise RuntimeError("x2 has been checked")
    nothing = batch.x1.new_zeros(batch.x1.shape[0])
    ring = Ring(sides.rows, sides.group)
    return around(batch.x1, batch.x2, scale, shift, nothing, term, ring).sum((0, 1))


def sigmoid(sides: Sides, given: dict[str, Any]) -> Tensor:
    """A plain sum over blocks."""
    batch = _ring_batch(sides, given)
    every = valid_rows(sides)
    ones = every[sides.mine].to(batch.x1.dtype)
    structure = _structure(sides.first, sides.second, given["positives"])
    term = Term("sigmoid", structure, (ones, ones, ones.new_zeros(())))
    shift = batch.scalar(given["bias"])
    found = _ring_pairs(sides, given, batch, term, scale_of(given["temperature"], batch), shift)
    return share(found, every.sum(), given["reduction"])


def square(sides: Sides, given: dict[str, Any]) -> Tensor:
    """A plain sum over blocks, weighed as in the joined batch."""
    batch, weights = _ring_batch(sides, given), square_of(sides, given)
    term = Term("square", _structure(sides.first, sides.second, given["positives"]), weights.shares)
    found = _ring_pairs(sides, given, batch, term, batch.scalar(1.0), batch.scalar(0.0))
    return floored(found, weights, sides, given["reduction"])
