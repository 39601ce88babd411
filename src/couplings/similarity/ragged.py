"""Token sets of different lengths: lists of tensors, or one tensor of all tokens with offsets.

They become padded groups of similar lengths, so that little is computed on padding, by differentiable gathers.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from couplings import _checks

SLACK = 1.125
"""A group's longest set over its shortest at most: an eighth of the work is padding in the worst case."""

Tokens = Tensor | list[Tensor] | tuple[Tensor, ...]


class Ragged(NamedTuple):
    """Sets of tokens behind one another."""

    values: Tensor  # (tokens, d)
    mask: Tensor | None  # (tokens,) bool: holes
    begins: list[int]
    lengths: list[int]


class Padded(NamedTuple):
    """Some of the sets, (sets, longest, d), and which they are."""

    values: Tensor
    mask: Tensor | None
    members: list[int]


def is_ragged(tokens: object) -> bool:
    """Whether this is one of the two ragged forms."""
    return isinstance(tokens, (list, tuple))


def cast(tokens: Tokens, dtype: torch.dtype) -> Tokens:
    """Any form of tokens in another dtype; offsets stay."""
    if isinstance(tokens, Tensor):
        return tokens.to(dtype)
    return type(tokens)(one.to(dtype) if one.is_floating_point() else one for one in tokens)


def dtype_of(tokens: Tokens) -> torch.dtype | None:
    """The one dtype of any form of tokens; None where there is not one: what is wrong is said elsewhere."""
    parts = tokens if isinstance(tokens, (list, tuple)) else (tokens,)
    if not all(isinstance(one, Tensor) for one in parts):
        return None
    found = {one.dtype for one in parts if one.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def read(name: str, tokens: object, mask: object) -> Ragged:
    """Check either ragged form and its mask."""
    tokens = tuple(tokens) if isinstance(tokens, (list, tuple)) else ()
    if len(tokens) == 2 and isinstance(tokens[1], Tensor) and tokens[1].dim() == 1:
        return _read_offsets(name, tokens[0], tokens[1], mask)
    if not tokens:
        _checks.reject(name, "at least one tensor (length, d) in a list", "none", "Pass a tensor (0, L, d).")
    for place, one in enumerate(tokens):
        _checks.real_tensor(f"{name}[{place}]", one)
        if one.dim() != 2 or one.shape[1] != tokens[0].shape[-1]:
            _checks.reject(
                f"{name}[{place}]",
                f"shape (length, {tokens[0].shape[-1]})",
                _checks.describe(one),
                "Pass each set's tokens as rows, all with the same number of features.",
            )
        _checks.same_dtype(f"{name}[{place}]", one, tokens[0], f"{name}[0]")
        _checks.same_device(f"{name}[{place}]", one, tokens[0], f"{name}[0]")
    lengths = [len(one) for one in tokens]
    flat = None
    if mask is not None:
        if not isinstance(mask, (list, tuple)) or len(mask) != len(tokens):
            _checks.reject(
                mask_name(name),
                f"a list of {len(tokens)} bool tensors, as {name} is a list",
                _checks.describe(mask),
                "Pass one tensor (length,) for each set, or None.",
                ValueError if isinstance(mask, (list, tuple)) else TypeError,
            )
        for place, (one, length) in enumerate(zip(mask, lengths, strict=True)):
            _check_mask(f"{mask_name(name)}[{place}]", one, length, tokens[0], name)
        flat = torch.cat(list(mask))
    return Ragged(torch.cat(tokens), flat, _begins(lengths), lengths)


def _read_offsets(name: str, values: object, offsets: Tensor, mask: object) -> Ragged:
    _checks.real_tensor(name, values)
    if not isinstance(values, Tensor) or values.dim() != 2:
        _checks.reject(
            name, "(tokens (T, d), offsets (N + 1,))", _checks.describe(values), "Call .flatten(0, -2)."
        )
    if offsets.is_floating_point() or offsets.is_complex() or offsets.dtype == torch.bool:
        _checks.reject(
            name, "integer offsets (N + 1,)", _checks.describe(offsets), "Pass cumulative lengths.", TypeError
        )
    if offsets.numel() == 0:
        _checks.reject(name, "offsets (N + 1,), the first 0", _checks.describe(offsets), "Prepend 0.")
    ends = offsets.tolist()  # on an accelerator this waits for the device
    lengths = [after - before for before, after in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != len(values) or min(lengths or [0]) < 0:
        _checks.reject(
            name,
            f"offsets that rise from 0 to {len(values)}, the number of tokens",
            f"{ends if len(ends) < 9 else f'{ends[:3]} .. {ends[-3:]}'}",
            "Pass cumulative lengths with a leading 0.",
        )
    if mask is not None:
        _check_mask(mask_name(name), mask, len(values), values, name)
    return Ragged(values, mask if isinstance(mask, Tensor) else None, ends[:-1], lengths)


def mask_name(name: str) -> str:
    """The mask of an argument."""
    return {"queries": "query_mask", "documents": "document_mask"}.get(name, f"{name}_mask")


def _check_mask(name: str, mask: object, length: int, like: Tensor, of: str) -> None:
    _checks.bool_tensor(name, mask)
    if isinstance(mask, Tensor):
        _checks.same_device(name, mask, like, of)
        if mask.shape != (length,):
            _checks.reject(name, f"shape ({length},)", _checks.describe(mask), "One flag for each token.")


def _begins(lengths: list[int]) -> list[int]:
    begins, total = [], 0
    for length in lengths:
        begins.append(total)
        total += length
    return begins


def groups(ragged: Ragged) -> list[list[int]]:
    """Sets of similar lengths together, shortest first."""
    order = sorted(range(len(ragged.lengths)), key=ragged.lengths.__getitem__)
    found: list[list[int]] = []
    for one in order:
        if found and ragged.lengths[one] <= SLACK * ragged.lengths[found[-1][0]]:
            found[-1].append(one)
        else:
            found.append([one])
    return found


def pad(ragged: Ragged, members: list[int]) -> Padded:
    """These sets, padded to the longest of them."""
    device = ragged.values.device
    lengths = torch.tensor([ragged.lengths[one] for one in members], dtype=torch.int64, device=device)
    begins = torch.tensor([ragged.begins[one] for one in members], dtype=torch.int64, device=device)
    longest = max([ragged.lengths[one] for one in members] or [0])
    step = torch.arange(longest, device=device)
    mask = step < lengths.unsqueeze(-1)
    # what lies beyond a set's end is masked, so any row will do there
    place = (begins.unsqueeze(-1) + step).where(mask, 0).view(-1)
    values = ragged.values.index_select(0, place).unflatten(0, (len(members), longest))
    if ragged.mask is not None:
        mask = mask & ragged.mask.index_select(0, place).view(mask.shape)
        return Padded(values, mask, members)
    even = min([ragged.lengths[one] for one in members] or [0]) == longest
    return Padded(values, None if even else mask, members)
