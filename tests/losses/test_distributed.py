"""Several processes equal one on the joined batch: gathered and in a ring, with and without DDP."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from couplings import losses
from couplings.distributed import contrastive, gather

sys.path.insert(0, str(Path(__file__).parent))
from distributed_cases import CASES, DTYPES, ROWS, TRAINED, Model, batch, evaluate, run, train

SIZES = (2, 4)
BUDGET = {torch.float64: 1e-12, torch.float32: 1e-6}


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What every rank found, for each number of ranks; all processes run all cases, once."""
    base = tmp_path_factory.getbasetemp()
    # pytest's own workers, each of which comes here, have one folder above theirs in common
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"
    done = folder / "done"
    try:
        folder.mkdir()
    except FileExistsError:  # another worker was first
        deadline = time.monotonic() + 200
        while not done.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    else:
        try:
            torch.multiprocessing.spawn(run, (str(folder),), nprocs=4)
        finally:
            done.touch()
    saved = [torch.load(folder / f"{rank}.pt") for rank in range(4)]
    for results in saved:
        if "failed" in results[4]:
            pytest.fail(results[4]["failed"])
    return {size: [results[size] for results in saved if size in results] for size in SIZES}


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float64, terms: int = 1) -> None:
    """To the budget, relative to the largest entry, or to 1 for each of the ``terms`` of a sum."""
    scale = max(1.0, float(wanted.abs().max())) * terms
    torch.testing.assert_close(found, wanted, rtol=0, atol=BUDGET[dtype] * scale)


@pytest.mark.parametrize("shape", ["equal", "unequal"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name in CASES for mode in CASES[name][2]])
def test_ranks_equal_one_process(ranks: Any, name: str, mode: str, size: int, shape: str) -> None:
    total = sum(ROWS[size][shape])
    everything = slice(0, total)
    for dtype in DTYPES[shape]:
        wanted = evaluate(name, batch(total, dtype), everything, lambda loss, *a, **k: loss(*a, **k))
        parts = [result[f"{name} {mode} {shape} {dtype}"] for result in ranks[size]]
        reduction = CASES[name][1].get("reduction")
        each, terms = reduction == "none", total if reduction else 1
        for key, want in wanted.items():
            found = [part[key] for part in parts]
            if key == "value" and each:
                close(torch.cat(found), want, dtype)
            elif key in ("value", "temperature", "bias"):
                # "none" is not scaled: its sum over ranks is the joined one
                close(torch.stack(found).sum(0) / (1 if each else size), want, dtype, terms)
            else:
                close(torch.cat(found) / (1 if each else size), want, dtype, terms)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["gather", "ring"])
@pytest.mark.parametrize("name", TRAINED)
def test_with_ddp(ranks: Any, name: str, mode: str, size: int) -> None:
    """DDP's mean of the gradients is the gradient of one process, a learned temperature's included."""
    whole = batch(sum(ROWS[size]["unequal"]), torch.float64)
    wanted = train(
        Model().double(), whole["x1"], whole["x2"], lambda loss, *a, **k: loss(*a, **k), TRAINED[name]
    )
    results = [result[f"ddp {name} {mode}"] for result in ranks[size]]
    close(torch.stack([result["value"] for result in results]).mean(), wanted["value"])
    for result in results:
        for key, want in wanted.items():
            if key != "value":
                close(result[key], want)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["gather", "ring"])
def test_half_precision(ranks: Any, mode: str, size: int) -> None:
    """Computed and summed over ranks in float32, whatever autocast says, and returned in the dtype of x1."""
    total = sum(ROWS[size]["unequal"])
    wanted = evaluate(
        "clip", batch(total, torch.bfloat16), slice(0, total), lambda loss, *a, **k: loss(*a, **k)
    )
    parts = [result[f"half {mode}"] for result in ranks[size]]
    for key in ("x1", "x2"):
        found = torch.cat([part[key] for part in parts])
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float() / size, wanted[key].float(), rtol=0.02, atol=1e-3)
    value = torch.stack([part["value"] for part in parts]).double().mean()
    torch.testing.assert_close(value, wanted["value"].double(), rtol=0.01, atol=0)


@pytest.mark.parametrize("size", SIZES)
def test_cached_with_ddp(ranks: Any, size: int) -> None:
    whole = batch(sum(ROWS[size]["unequal"]), torch.float64)
    encoder = Model().double().first
    want = losses.clip_loss(encoder(whole["x1"]), encoder(whole["x2"]))
    want.backward()
    close(torch.stack([result["cached"]["value"] for result in ranks[size]]).mean(), want.detach())
    for result in ranks[size]:
        close(result["cached"]["weight"], encoder.weight.grad)


@pytest.mark.parametrize("size", SIZES)
def test_gather(ranks: Any, size: int) -> None:
    results, counts = [result["gather"] for result in ranks[size]], ROWS[size]["unequal"]
    x = torch.cat([result["x"] for result in results])
    weight = torch.linspace(1, 2, x.numel(), dtype=torch.float64).view_as(x)
    factor = sum(range(1, size + 1))  # each rank asks rank + 1 times
    slope = factor * 3 * weight * x**2
    for result in results:
        assert torch.equal(result["everything"], x)
        assert torch.equal(result["ids"], torch.cat([torch.arange(n) for n in counts]))
        assert torch.equal(result["mask"], torch.cat([torch.arange(n) % 2 == 0 for n in counts]))
        assert torch.equal(result["empty"], torch.arange(1.0, size)[:, None].expand(-1, 3))
    close(torch.cat([result["slope"] for result in results]) / slope, torch.ones_like(x))
    # each rank's slope squared depends on its own rows only
    curvature = 2 * slope * factor * 6 * weight * x
    close(torch.cat([r["curvature"] for r in results]), curvature)
    for rank, result in enumerate(results):
        assert torch.equal(
            result["half"], torch.full((counts[rank],), size * (rank + 1), dtype=torch.bfloat16)
        )


@pytest.mark.parametrize("size", SIZES)
def test_second_derivative(ranks: Any, size: int) -> None:
    whole = batch(sum(ROWS[size]["unequal"]), torch.float64)
    x1, x2 = (whole[key].clone().requires_grad_() for key in ("x1", "x2"))
    value = size * losses.clip_loss(x1, x2, temperature=0.5)  # the sum of what the ranks returned
    (slope,) = torch.autograd.grad(value, x1, create_graph=True)
    slope.square().sum().backward()
    for key, leaf in (("x1", x1), ("x2", x2)):
        close(torch.cat([result["second"][key] for result in ranks[size]]), leaf.grad)
    for result in ranks[size]:
        assert result["second"]["refused"].startswith("mode: expected 'gather'")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("width", "x1: expected on every rank"),
        ("dtype", "x1: expected on every rank"),
        ("frozen", "with gradient on rank 0"),
        ("groups", "nothing on rank 0"),
        ("one side", "x2: expected"),
        ("ids", "groups: expected"),
        ("gather", "Only the number of rows may differ"),
        ("no tensor", "x: expected a tensor"),
    ],
)
@pytest.mark.parametrize("size", SIZES)
def test_every_rank_raises(ranks: Any, name: str, text: str, size: int) -> None:
    """One rank's mistake is everybody's error, and nobody waits."""
    for result in ranks[size]:
        assert text in result["errors"][name]


def test_one_process_needs_no_group() -> None:
    x = torch.randn(5, 3, requires_grad=True)
    assert gather(x) is x
    for mode in ("gather", "ring"):
        found = contrastive(losses.clip_loss, x, x + 1, mode=mode, temperature=0.2)
        assert torch.equal(found, losses.clip_loss(x, x + 1, temperature=0.2))


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"loss": torch.nn.functional.cross_entropy}, ValueError, "loss"),
        ({"mode": "tree"}, ValueError, "mode"),
        ({"reduction": "median"}, ValueError, "reduction"),
        ({"offset": 2}, ValueError, "offset"),
        ({"colour": 2}, TypeError, None),
        ({"mode": "ring", "negatives": torch.ones(2, 3)}, ValueError, "negatives"),
        ({"mode": "ring", "similarity": torch.mm}, ValueError, "similarity"),
        ({"mode": "ring", "loss": losses.triplet_loss}, ValueError, "mode"),
        ({"guide": torch.ones(4, 4)}, ValueError, "guide"),
        ({"loss": losses.sigmoid_loss, "guide": (torch.ones(4, 2),) * 2}, ValueError, "guide"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], name: str | None) -> None:
    x = torch.ones(4, 3)
    with pytest.raises(error, match=f"^{name}: expected" if name else "colour"):
        contrastive(**{"loss": losses.clip_loss, "x1": x, "x2": x} | options)
