"""From a user's arguments to the engine's: checks, normalisation, ids, masks, weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from couplings._checks import (
    HALF,
    bool_tensor,
    choice,
    describe,
    real_tensor,
    reject,
    same_device,
    same_dtype,
)
from couplings._rowwise import seen
from couplings.losses.contrastive.engine import Inputs, Plan, tiled_loss
from couplings.losses.contrastive.pairs import Pairs
from couplings.losses.contrastive.scores import Similarity, blocks, check_tile

Both = Tensor | tuple[Tensor, Tensor] | None
"""One tensor for rows and columns, or one for each."""

REDUCTIONS = ("mean", "sum", "none")


def unit(x: Tensor) -> Tensor:
    """Rows (last dimension) divided by their length; a row of zeros stays zero and gets gradient zero.

    A row is first divided by its largest entry, so that no square overflows or vanishes. The length does not depend
    on that divisor, whose own derivative therefore plays no part.
    """
    largest = x.detach().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_ones((*x.shape[:-1], 1))
    zero = largest == 0
    x = x / torch.where(zero, 1, largest)
    # the square root of zero has no derivative: the row of zeros is set aside before it
    length = torch.where(zero, 1, x.square().sum(-1, keepdim=True)).sqrt()
    return torch.where(zero, x.detach(), x / length)


@dataclass
class Batch:
    """Checked arguments.

    Attributes:
        x1, x2: (n, ...) and (m, ...) in a dtype that is computed in, normalised if asked for, zero where masked. x2 is
            None where x1 is the matrix of scores.
        pairs: the structure.
        dtype: what results are returned in.
    """

    x1: Tensor
    x2: Tensor | None
    pairs: Pairs
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m)."""
        return self.x1.shape[0], self.x1.shape[1] if self.x2 is None else self.x2.shape[0]

    def scalar(self, value: float | Tensor) -> Tensor:
        """A number of the user's, as a scalar in the dtype that is computed in."""
        if isinstance(value, Tensor):
            return value.to(self.x1.dtype).reshape(())
        return self.x1.new_tensor(value)

    def positives(self, mode: str) -> tuple[Tensor, Tensor]:
        """How many positives each row (n,) and each column (m,) has."""
        own_only = mode == "own"
        pairs = self.pairs._replace(row_ids=None, column_ids=None) if own_only else self.pairs
        return pairs.counts(self.shape[1])

    def valid(self) -> tuple[Tensor, Tensor]:
        """Which rows (n,) and columns (m,) take part."""
        rows, columns = self.pairs.row_valid, self.pairs.column_valid
        n, m = self.shape
        if rows is None or columns is None:
            return self.x1.new_ones(n, dtype=torch.bool), self.x1.new_ones(m, dtype=torch.bool)
        return rows, columns

    def needs_gradient(self, *others: Tensor | None) -> bool:
        """Whether a gradient may be asked for."""
        tensors = (self.x1, self.x2, *others)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def prepare(
    x1: Tensor,
    x2: Tensor | None,
    *,
    normalize: bool,
    groups: Both = None,
    mask: Both = None,
    guide: Both = None,
    negatives: Tensor | None = None,
    similarity: Similarity | None = None,
    offset: int = 0,
) -> Batch:
    """Check what all losses have in common, and put it into the engine's form."""
    _check_features(x1, x2, similarity)
    _check_offset(offset)
    if x2 is None:
        if normalize or similarity is not None or negatives is not None:
            name = "normalize" if normalize else "similarity" if similarity is not None else "negatives"
            reject(
                name,
                "False, where x1 is a matrix of scores (x2=None)" if normalize else "None where x2 is None",
                "True" if normalize else describe(negatives) if similarity is None else "a function",
                "Scores are used as they are; put further negatives into further columns.",
            )
        n, paired = x1.shape
    else:
        n, paired = x1.shape[0], x2.shape[0]
    if offset + n > paired:
        reject(
            "x2" if x2 is not None else "x1",
            f"at least offset + {n} = {offset + n} columns, the counterpart of row i being column i + offset",
            f"{paired} columns",
            "Pass as many rows of x2 as of x1, or more.",
        )
    dtype = torch.float32 if x1.dtype in HALF else x1.dtype
    if x2 is not None and negatives is not None:
        _check_negatives(negatives, x1, x2)
        x2 = torch.cat((x2, negatives))
    m = paired if x2 is None else x2.shape[0]
    added = m - paired
    row_ids, column_ids = _both("groups", groups, n, paired, x1, _check_ids)
    if column_ids is not None and row_ids is not None and added:
        # the negatives belong to no group: an id below all others
        nobody = torch.minimum(row_ids.amin(), column_ids.amin()) - 1
        column_ids = torch.cat((column_ids, nobody.expand(added)))
    row_valid, column_valid = _both("mask", mask, n, paired, x1, bool_tensor)
    if column_valid is not None and added:
        column_valid = torch.cat((column_valid, column_valid.new_ones(added)))
    guide_rows, guide_columns = _guide(guide, n, m, x1, dtype)
    own = torch.arange(offset, offset + n, device=x1.device)
    pairs = Pairs(own, None, row_ids, column_ids, row_valid, column_valid, guide_rows, guide_columns)

    first, second = x1.to(dtype), None if x2 is None else x2.to(dtype)
    if row_valid is not None and column_valid is not None:
        if second is None:
            first = torch.where(row_valid[:, None] & column_valid, first, 0)
        else:
            first, second = _zeroed(first, row_valid), _zeroed(second, column_valid)
    if normalize and second is not None:
        first, second = unit(first), unit(second)
    if similarity is not None and second is not None and torch.compiler.is_compiling():
        # dynamo does not trace a derivative taken inside a function: the whole matrix, then, and O(n m) memory
        first, second = similarity(first, second), None
        check_tile(first, (n, m), dtype)
    return Batch(first, second, pairs, x1.dtype)


def scale_of(temperature: float | Tensor, batch: Batch) -> Tensor:
    """1 / temperature, checked."""
    if isinstance(temperature, Tensor):
        check_scalar("temperature", temperature, batch.x1)
        if seen(~(temperature > 0)):
            reject("temperature", "a positive number", float(temperature.detach()), "Learn its logarithm.")
        return 1 / torch.where(temperature > 0, temperature, torch.nan).to(batch.x1.dtype).reshape(())
    check_number("temperature", temperature)
    if not temperature > 0:
        reject("temperature", "a positive number", temperature, "0.07 is a usual choice.")
    return batch.scalar(1 / temperature)


def check_number(name: str, value: object) -> float:
    """A finite Python number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        reject(name, "a number", describe(value), f"Pass {name} as a float.", TypeError)
    if not math.isfinite(value):
        reject(name, "a finite number", value, f"Pass another {name}.")
    return float(value)


def check_scalar(name: str, value: Tensor, x1: Tensor) -> None:
    """A learned scalar."""
    real_tensor(name, value)
    same_device(name, value, x1, "x1")
    if value.numel() != 1:
        reject(name, "a tensor with one element", describe(value), f"One {name} serves all pairs.")


def check_options(reduction: str, positives: str, allowed: tuple[str, ...] = ("each", "mean", "own")) -> None:
    """Names of a reduction and of a treatment of positives."""
    choice("reduction", reduction, REDUCTIONS)
    choice("positives", positives, allowed)


def evaluate(
    batch: Batch,
    plan: Plan,
    scale: Tensor,
    reduction: str,
    *,
    shift: Tensor | None = None,
    extra: Tensor | None = None,
    shares: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> Tensor:
    """The loss: mean over the rows (and with ``plan.columns`` over the columns), sum, or each.

    A softmax is over the rows that have a positive, a sum over pairs over all that take part.
    """
    pairs = batch.pairs
    if plan.kind == "softmax":
        taking_part = tuple(count > 0 for count in batch.positives(plan.positives))
    else:
        taking_part = batch.valid()
    row_weight, column_weight = (there.to(batch.x1.dtype) for there in taking_part)
    if reduction == "mean":
        row_weight, column_weight = (w / w.sum().clamp(min=1) for w in (row_weight, column_weight))
    if plan.columns:
        row_weight, column_weight = row_weight / 2, column_weight / 2
    at_once = not plan.columns or next(blocks(*batch.shape, batch.x1.device)).stop == batch.shape[0]
    plan = replace(
        plan,
        total=reduction != "none",
        fused=reduction != "none" and at_once and batch.needs_gradient(scale, shift, extra),
    )
    inputs = Inputs(batch.x1, batch.x2, scale, shift, extra, shares, pairs)
    found = tiled_loss(inputs, row_weight, column_weight, plan)
    if isinstance(found, Tensor):
        return found.to(batch.dtype)
    rows, by_column = found
    if plan.columns and pairs.own is not None:
        rows = (rows + by_column[pairs.own]) / 2
    return rows.to(batch.dtype)


def _check_features(x1: object, x2: object, similarity: object) -> None:
    real_tensor("x1", x1)
    if similarity is not None and not callable(similarity):
        reject("similarity", "a function of two tensors", describe(similarity), "Pass None.", TypeError)
    if x2 is not None:
        real_tensor("x2", x2)
    if not isinstance(x1, Tensor) or not isinstance(x2, (Tensor, type(None))):
        return  # real_tensor has raised
    least = 2 if similarity is None else 1
    for name, x in (("x1", x1), ("x2", x2)):
        if x is not None and (x.ndim < least or (similarity is None and x.ndim != 2)):
            reject(
                name,
                "two dimensions, (rows, features)" if similarity is None else "rows along dimension 0",
                describe(x),
                f"Call {name}.flatten(1), or pass similarity=.",
            )
        if x is not None and x.shape[0] == 0:
            reject(name, "at least one row", describe(x), "Drop empty batches.")
    if x2 is None:
        return
    same_dtype("x2", x2, x1, "x1")
    same_device("x2", x2, x1, "x1")
    if similarity is None and x1.shape[-1] != x2.shape[-1]:
        reject(
            "x2", f"{x1.shape[-1]} features per row, as x1 has", describe(x2), "Project them to one space."
        )


def _check_offset(offset: object) -> None:
    if isinstance(offset, bool) or not isinstance(offset, int):
        reject("offset", "an int", describe(offset), "Row i of x1 meets row i + offset of x2.", TypeError)
    if offset < 0:
        reject("offset", "at least 0", offset, "Row i of x1 meets row i + offset of x2.")


def _check_negatives(negatives: object, x1: Tensor, x2: Tensor) -> None:
    real_tensor("negatives", negatives)
    if not isinstance(negatives, Tensor):
        return
    same_dtype("negatives", negatives, x1, "x1")
    same_device("negatives", negatives, x1, "x1")
    if negatives.shape[1:] != x2.shape[1:]:
        reject(
            "negatives",
            f"shape (k, {', '.join(map(str, x2.shape[1:]))}), shared by all rows",
            describe(negatives),
            "Negatives of one row only have shape (n, k, d) and need the plain dot product.",
        )


def _check_ids(name: str, ids: object) -> None:
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex():
        remedy = f"Call {name}.long()." if isinstance(ids, Tensor) else "Pass a tensor of ids."
        reject(name, "an integer tensor", describe(ids), remedy, TypeError)


def _both(
    name: str, value: Both, n: int, m: int, x1: Tensor, check: Callable[[str, object], None]
) -> tuple[Tensor | None, Tensor | None]:
    """One value per row and one per column."""
    if value is None:
        return None, None
    pair = value if isinstance(value, tuple) else (value, value)
    if len(pair) != 2:
        reject(name, "one tensor, or a tensor for rows and one for columns", f"a tuple of {len(pair)}", "")
    for part, count, side in zip(pair, (n, m), ("x1", "x2")):
        check(name, part)
        same_device(name, part, x1, "x1")
        if part.shape != (count,):
            reject(
                name,
                f"shape ({count},), one for each row of {side}",
                describe(part),
                f"Where x1 and x2 differ, pass {name}=(for_x1, for_x2).",
            )
    rows, columns = pair
    return (rows.long(), columns.long()) if name == "groups" else (rows, columns)


def _guide(
    guide: Both, n: int, m: int, x1: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Scores (n, m), or unit embeddings (n, k) and (m, k)."""
    if guide is None:
        return None, None
    parts = guide if isinstance(guide, tuple) else (guide,)
    for part in parts:
        real_tensor("guide", part)
        same_device("guide", part, x1, "x1")
    if len(parts) == 1:
        if parts[0].shape != (n, m):
            reject("guide", f"scores of shape {(n, m)}", describe(parts[0]), "Or pass (guide1, guide2).")
        return parts[0].detach().to(dtype), None
    first, second = (part.detach().to(dtype) for part in parts)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        reject("guide", "two matrices with as many features each", describe(parts[1]), "")
    for part, count in ((first, n), (second, m)):
        if part.shape[0] != count:
            reject(
                "guide", f"{count} rows", describe(part), "One for each row of x1, and of x2 and negatives."
            )
    return unit(first), unit(second)


def _zeroed(x: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid.view(-1, *(1,) * (x.ndim - 1)), x, 0)
