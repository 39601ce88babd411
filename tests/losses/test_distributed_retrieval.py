"""Documents on three ranks are searched as if they were on one; one of the ranks has none."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import couplings as cp
from couplings.distributed import maxsim_topk

sys.path.insert(0, str(Path(__file__).parent))
from distributed_retrieval_cases import RANKS, SHARDS, documents, queries, run


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank found; run once, whichever of pytest's workers comes first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "retrieval-ranks"
    done = folder / "done"
    try:
        folder.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + 200
        while not done.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    else:
        try:
            torch.multiprocessing.spawn(run, (str(folder),), nprocs=RANKS)
        finally:
            done.touch()
    saved = [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]
    for result in saved:
        if "failed" in result:
            pytest.fail(result["failed"])
    return saved


def brute(tokens: Tensor, mask: Tensor, k: int) -> tuple[list[list[float]], list[list[int]]]:
    """By the whole token grid and Python's stable sort: an oracle that shares nothing with the library."""
    values, indices = [], []
    for query in queries():
        scores = []
        for document, live in zip(tokens, mask, strict=True):
            kept = document[live]
            grid = (query[:, None] * kept).sum(-1)
            scores.append(float(grid.amax(1).sum()) if len(kept) else -math.inf)
        order = sorted(range(len(scores)), key=lambda i: -scores[i])[:k]
        values.append([scores[i] for i in order])
        indices.append(order)
    return values, indices


@pytest.mark.parametrize(
    ("name", "k"),
    [
        ("padded 1", 1),
        ("padded 6", 6),
        ("padded 13", 13),
        ("offsets", 6),
        ("blocks", 6),
        ("more than there are", 13),
        ("each its own", 6),
        ("memory map", 6),
        ("ragged", 6),
    ],
)
def test_every_rank_finds_what_brute_force_finds(ranks: Any, name: str, k: int) -> None:
    """Scores are exact here, so values, order and ties agree to the bit."""
    values, indices = brute(*documents(), k)
    assert len({value for row in values for value in row}) < 5 * k or k == 1  # there are ties
    for result in ranks:
        assert result[name][0].tolist() == values
        assert result[name][1].tolist() == indices


def test_equals_one_process_on_all_documents(ranks: Any) -> None:
    tokens, mask = documents()
    real = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(3))
    wanted = cp.maxsim_topk(real, tokens.float() / 7, 6, document_mask=mask, normalize=True)
    for result in ranks:
        torch.testing.assert_close(result["real"][0], wanted.values, rtol=0, atol=1e-6)
        assert torch.equal(result["real"][1], wanted.indices)
        assert torch.equal(result["real"][0], ranks[0]["real"][0])


def test_a_document_that_is_no_number_comes_first(ranks: Any) -> None:
    for result in ranks:
        assert result["nan"][0][:, 0].isnan().all()
        assert (result["nan"][1][:, 0] == sum(SHARDS[:2]) + 3).all()
        assert not result["nan"][0][:, 1:].isnan().any()


def test_a_group_of_some_ranks(ranks: Any) -> None:
    tokens, mask = (part[sum(SHARDS[:1]) :] for part in documents())
    values, indices = brute(tokens, mask, 6)
    for result in ranks[1:]:
        assert result["two"][0].tolist() == values
        assert result["two"][1].tolist() == indices


def test_progress_is_of_the_shard(ranks: Any) -> None:
    for result, count in zip(ranks, SHARDS, strict=True):
        assert result["seen"][-1][0] == count


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("k differs", "k: expected the same on every rank, got [2, 3, 4]"),
        ("k too large", "k: expected at most 13, the number of documents of all ranks, got 14"),
        ("k", "k: expected an int"),
        ("k zero", "k: expected at least 1"),
        ("shape", "documents: expected shape (Nd, Ld, d)"),
        ("dtype", "scores: expected on every rank the same dtype"),
        ("queries", "scores: expected on every rank"),
        ("option", "colour"),
    ],
)
def test_every_rank_raises(ranks: Any, name: str, text: str) -> None:
    for result in ranks:
        assert text in result["errors"][name]


def test_one_process_needs_no_group() -> None:
    tokens, mask = documents()
    found = maxsim_topk(queries(), tokens, 4, document_mask=mask)
    wanted = cp.maxsim_topk(queries(), tokens, 4, document_mask=mask)
    assert torch.equal(found.values, wanted.values)
    assert torch.equal(found.indices, wanted.indices)
    with pytest.raises(ValueError, match="k: expected at most 13"):
        maxsim_topk(queries(), tokens, 14)
