"""Each loss of this rank's rows with the gathered rows of all: the ordinary losses, on a rectangle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from couplings import losses
from couplings.distributed.sides import (
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
from couplings.losses.contrastive.engine import Plan
from couplings.losses.contrastive.prepare import evaluate, prepare, scale_of


def _gather_features(sides: Sides, symmetric: bool) -> None:
    sides.second.features = sides.gather("x2")
    if symmetric:
        sides.first.features = sides.gather("x1")


def softmax(sides: Sides, given: dict[str, Any]) -> Tensor:
    """InfoNCE of the rows, and of the columns with the sides exchanged."""
    _gather_features(sides, given["symmetric"])
    counts = positives_of(sides.pairs(), given["positives"])
    similarity, reduction, parts = given["similarity"], given["reduction"], []
    for back, (rows, columns) in enumerate(sides.directions(given["symmetric"])):
        guide = both(rows.guide, columns.all_guide)
        if guide is not None and not back and sides.negatives is not None and sides.negatives.ndim == 2:
            guide = guide[0], torch.cat((guide[1], sides.extra_guide))
        found = losses.info_nce_loss(
            rows.x,
            columns.features,
            temperature=given["temperature"],
            normalize=given["normalize"],
            groups=both(rows.ids, columns.all_ids),
            positives=given["positives"],
            mask=both(rows.valid, columns.all_valid),
            negatives=None if back else sides.negatives,  # columns do not see them
            guide=guide,
            guide_margin=given["guide_margin"],
            similarity=_turned(similarity) if back and similarity is not None else similarity,
            offset=sides.start,
            reduction="none" if reduction == "none" else "sum",
        )
        parts.append(share(found, (counts[back] > 0).sum(), reduction))
    return average(parts)


def _turned(similarity: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda columns, rows: similarity(rows, columns).mT


def views(sides: Sides, given: dict[str, Any]) -> Tensor:
    """Local views among all views: first views of all ranks, then second ones."""
    _gather_features(sides, True)
    first, second = sides.first, sides.second
    if first.features is None or second.features is None:
        raise RuntimeError("both sides have been gathered")
    batch = prepare(
        torch.cat((first.x, second.x)),
        torch.cat((first.features, second.features)),
        normalize=given["normalize"],
        groups=both(twice(first.ids), twice(first.all_ids)),
        mask=both(twice(first.valid), twice(first.all_valid)),
        negatives=sides.negatives,
        similarity=given["similarity"],
    )
    here = torch.arange(sides.mine.start, sides.mine.stop, device=first.x.device)
    total = sum(sides.rows)
    own, itself = torch.cat((here + total, here)), torch.cat((here, here + total))
    batch.pairs = batch.pairs._replace(own=own, itself=itself)
    positives, reduction = given["positives"], given["reduction"]
    plan = Plan("softmax", positives=positives, similarity=given["similarity"])
    found = evaluate(
        batch, plan, scale_of(given["temperature"], batch), "none" if reduction == "none" else "sum"
    )
    return share(found, (view_counts(sides, positives) > 0).sum(), reduction)


def sigmoid(sides: Sides, given: dict[str, Any]) -> Tensor:
    """Every local row with every row of all."""
    _gather_features(sides, False)
    first, second, reduction = sides.first, sides.second, given["reduction"]
    found = losses.sigmoid_loss(
        first.x,
        second.features,
        temperature=given["temperature"],
        bias=given["bias"],
        normalize=given["normalize"],
        groups=both(first.ids, second.all_ids),
        positives=given["positives"],
        mask=both(first.valid, second.all_valid),
        negatives=sides.negatives,
        similarity=given["similarity"],
        offset=sides.start,
        reduction="none" if reduction == "none" else "sum",
    )
    return share(found, valid_rows(sides).sum(), reduction)


def triplet(sides: Sides, given: dict[str, Any]) -> Tensor:
    """Each local row's hardest or semi-hard negative among the rows of all."""
    _gather_features(sides, given["symmetric"])
    pairs, reduction, parts = sides.pairs(), given["reduction"], []
    members, own = positives_of(pairs, "each"), positives_of(pairs, "own")
    wanted = own if given["positives"] == "own" else members
    for back, (rows, columns) in enumerate(sides.directions(given["symmetric"])):
        found = losses.triplet_loss(
            rows.x,
            columns.features,
            margin=given["margin"],
            mining=given["mining"],
            normalize=given["normalize"],
            groups=both(rows.ids, columns.all_ids),
            positives=given["positives"],
            mask=both(rows.valid, columns.all_valid),
            negatives=sides.negatives,
            offset=sides.start,
            reduction="none" if reduction == "none" else "sum",
        )
        candidates = sum(sides.rows) if columns.all_valid is None else columns.all_valid.sum()
        candidates = candidates + (0 if sides.negatives is None else sides.negatives.shape[0])
        there = (wanted[back] > 0) & (candidates - members[back] > 0)  # a positive, and someone else
        parts.append(share(found, there.sum(), reduction))
    return average(parts)


def square(sides: Sides, given: dict[str, Any]) -> Tensor:
    """Every local row with every row of all, weighed as in the joined batch."""
    _gather_features(sides, False)
    first, second = sides.first, sides.second
    weights, reduction = square_of(sides, given), given["reduction"]
    batch = prepare(
        first.x,
        second.features,
        normalize=given["normalize"],
        groups=both(first.ids, second.all_ids),
        mask=both(first.valid, second.all_valid),
        similarity=given["similarity"],
        offset=sides.start,
    )
    plan = Plan("square", given["positives"], similarity=given["similarity"])
    found = evaluate(
        batch, plan, batch.scalar(1.0), "none" if reduction == "none" else "sum", shares=weights.shares
    )
    return floored(found, weights, sides, reduction)
