"""What the processes of ``test_distributed_retrieval.py`` run: each rank's shard of the documents."""

from __future__ import annotations

import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from couplings.distributed import maxsim_topk

RANKS = 3
SHARDS = (4, 0, 9)
"""Documents of each rank; of two ranks the last two."""


def queries(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randint(-3, 4, (5, 3, 4), generator=torch.Generator().manual_seed(1)).to(dtype)


def documents(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Small integers, so that sums are exact and many scores are equal; holes, and a document with no token."""
    made = torch.Generator().manual_seed(2)
    tokens = torch.randint(-3, 4, (sum(SHARDS), 6, 4), generator=made).to(dtype)
    mask = torch.rand(tokens.shape[:2], generator=made) < 0.6
    mask[:, 0] = True
    mask[5] = False
    return tokens, mask


def shard(rank: int) -> slice:
    start = sum(SHARDS[:rank])
    return slice(start, start + SHARDS[rank])


def behind(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same documents as tokens behind one another, with offsets."""
    return tokens[mask], torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])


def _forms(rank: int) -> dict[str, Any]:
    tokens, mask = (part[shard(rank)] for part in documents())
    x, seen = queries(), []
    half = len(tokens) // 2
    blocks = [(tokens[:half], mask[:half]), (tokens[half:], mask[half:])]
    found = {
        f"padded {k}": maxsim_topk(x, tokens, k, document_mask=mask, block_bytes=200) for k in (1, 6, 13)
    }
    found["offsets"] = maxsim_topk(x, behind(tokens, mask), 6)
    found["blocks"] = maxsim_topk(x, iter(blocks), 6)
    found["more than there are"] = maxsim_topk(x, iter(blocks), 20)
    found["each its own"] = (
        maxsim_topk(x, behind(tokens, mask), 6) if rank else maxsim_topk(x, tokens, 6, document_mask=mask)
    )
    found["memory map"] = maxsim_topk(x, tokens.numpy(), 6, document_mask=mask.numpy())
    ragged = list(queries())
    found["ragged"] = maxsim_topk(
        ragged, tokens, 6, document_mask=mask, progress=lambda done, total: seen.append((done, total))
    )
    broken = tokens.clone()
    if rank == 2:
        broken[3, 0] = torch.nan
    found["nan"] = maxsim_topk(x, broken, 6, document_mask=torch.ones_like(mask))
    real = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(3))
    found["real"] = maxsim_topk(real, tokens.float() / 7, 6, document_mask=mask, normalize=True)
    return {name: tuple(result) for name, result in found.items()} | {"seen": seen}


def _errors(rank: int) -> dict[str, str]:
    tokens, _ = documents()
    x, mine = queries(), tokens[shard(rank)]
    wrong = {
        "k differs": lambda: maxsim_topk(x, mine, 2 + rank),
        "k too large": lambda: maxsim_topk(x, mine, 14),
        "k": lambda: maxsim_topk(x, mine, 2.5 if rank else 2),
        "k zero": lambda: maxsim_topk(x, mine, 0),
        "shape": lambda: maxsim_topk(x, mine[0] if rank == 2 else mine, 2),
        "dtype": lambda: maxsim_topk(x.float(), mine.float() if rank == 2 else mine, 2),
        "queries": lambda: maxsim_topk(x[: 4 + (rank == 0)], mine, 2),
        "option": lambda: maxsim_topk(x, mine, 2, **({"colour": 1} if rank else {})),
    }
    found = {}
    for name, call in wrong.items():
        try:
            call()
            found[name] = "nothing"
        except (TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def run(rank: int, folder: str) -> None:
    """All of it on three processes; two of them once more as a group of their own; results go to a file."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=100),
    )
    two = dist.new_group([1, 2])
    results: dict[str, Any] = {}
    try:
        results |= _forms(rank)
        results["errors"] = _errors(rank)
        if rank:
            tokens, mask = (part[shard(rank)] for part in documents())
            results["two"] = tuple(maxsim_topk(queries(), tokens, 6, document_mask=mask, group=two))
    except Exception:  # noqa: BLE001 (told to the test, which fails with it)
        results["failed"] = traceback.format_exc()
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
