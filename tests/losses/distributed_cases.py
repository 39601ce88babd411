"""What the processes of ``test_distributed.py`` run: each rank's part of a batch that one process knows whole."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from couplings import losses
from couplings.distributed import contrastive, gather
from couplings.losses.contrastive import scores
from couplings.losses.contrastive.cached import cached_backward

ROWS = {2: {"equal": [4, 4], "unequal": [5, 2]}, 4: {"equal": [3] * 4, "unequal": [2, 4, 1, 3]}}
DTYPES = {"equal": (torch.float64,), "unequal": (torch.float64, torch.float32)}
WIDTH = 6


def batch(total: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The joined batch, the same in every process."""
    made = torch.Generator().manual_seed(total)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64).to(dtype)

    x1 = normal(total, WIDTH)
    return {
        "x1": x1,
        "x2": 0.5 * x1 + normal(total, WIDTH),
        "groups": torch.randint(0, max(2, total // 2), (total,), generator=made),
        "mask": torch.arange(total) % 4 != 1,
        "guide1": normal(total, 3),
        "guide2": normal(total + total, 3),
        "negatives": normal(total, WIDTH),
        "each": normal(total, 2, WIDTH),
    }


GROUPED = {"groups": True}
MASKED = {"mask": True}
CASES: dict[str, tuple[Callable[..., Tensor], dict[str, Any], tuple[str, ...]]] = {}
"""Name: loss, options, modes. The values True are put in from the batch."""
BOTH, GATHER = ("gather", "ring"), ("gather",)
for _name, _loss, _options, _modes in [
    ("clip", losses.clip_loss, {}, BOTH),
    ("clip-sharp", losses.clip_loss, {"temperature": 0.004}, BOTH),
    ("clip-groups-masks", losses.clip_loss, GROUPED | MASKED, BOTH),
    ("clip-own", losses.clip_loss, GROUPED | {"positives": "own"}, BOTH),
    ("clip-mean", losses.clip_loss, GROUPED | {"positives": "mean"}, BOTH),
    ("clip-sum", losses.clip_loss, {"reduction": "sum"}, BOTH),
    ("clip-none", losses.clip_loss, {"reduction": "none"}, BOTH),
    ("clip-negatives", losses.clip_loss, {"negatives": True}, GATHER),
    ("clip-guide-negatives", losses.clip_loss, {"negatives": True, "guide": True}, GATHER),
    ("clip-similarity", losses.clip_loss, {"similarity": True}, GATHER),
    ("n-pairs", losses.n_pairs_loss, MASKED, BOTH),
    ("n-pairs-one-way", losses.n_pairs_loss, {"symmetric": False, "normalize": False}, BOTH),
    ("info-nce", losses.info_nce_loss, GROUPED, BOTH),
    ("info-nce-each", losses.info_nce_loss, {"negatives": "each"}, GATHER),
    ("nt-xent", losses.nt_xent_loss, {}, BOTH),
    ("nt-xent-groups-masks", losses.nt_xent_loss, GROUPED | MASKED, BOTH),
    ("nt-xent-mean", losses.nt_xent_loss, GROUPED | {"positives": "mean"}, BOTH),
    ("nt-xent-own", losses.nt_xent_loss, GROUPED | {"positives": "own"}, BOTH),
    ("nt-xent-negatives", losses.nt_xent_loss, {"negatives": True}, GATHER),
    ("sigmoid", losses.sigmoid_loss, {}, BOTH),
    ("sigmoid-groups-masks", losses.sigmoid_loss, GROUPED | MASKED, BOTH),
    ("sigmoid-own", losses.sigmoid_loss, GROUPED | {"positives": "own"}, BOTH),
    ("sigmoid-negatives", losses.sigmoid_loss, {"negatives": True}, GATHER),
    ("triplet", losses.triplet_loss, {"margin": 0.7}, GATHER),
    (
        "triplet-groups-masks",
        losses.triplet_loss,
        GROUPED | MASKED | {"mining": "hard", "symmetric": True},
        GATHER,
    ),
    ("triplet-own-negatives", losses.triplet_loss, GROUPED | {"positives": "own", "negatives": True}, GATHER),
    ("cosine", losses.cosine_target_loss, {}, BOTH),
    ("cosine-floor", losses.cosine_target_loss, {"target": -1, "balance": 0.3}, BOTH),
    ("cosine-floor-sum", losses.cosine_target_loss, {"target": -1, "reduction": "sum"}, BOTH),
    ("cosine-groups-masks", losses.cosine_target_loss, GROUPED | MASKED, BOTH),
]:
    CASES[_name] = _loss, _options, _modes


def similarity(rows: Tensor, columns: Tensor) -> Tensor:
    return (rows @ columns.mT).tanh()


def evaluate(
    name: str, whole: dict[str, Tensor], rows: slice, run: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """Value and gradients of a case for some rows of the batch."""
    loss, options, _ = CASES[name]
    mine = {key: x[rows] for key, x in whole.items() if key != "guide2"}
    total = whole["x1"].shape[0]
    x1, x2 = (mine[key].clone().requires_grad_() for key in ("x1", "x2"))
    leaves = {"x1": x1, "x2": x2}
    options = dict(options)
    if loss not in (losses.triplet_loss, losses.cosine_target_loss):
        value = x1.new_tensor(options.get("temperature", 0.3))
        leaves["temperature"] = options["temperature"] = value.requires_grad_()
    if loss is losses.sigmoid_loss:
        leaves["bias"] = options["bias"] = x1.new_tensor(-1.0).requires_grad_()
    for key in ("groups", "mask"):
        if key in options:
            options[key] = mine[key]
    if "negatives" in options:
        each = options["negatives"] == "each"
        leaves["negatives"] = mine["each" if each else "negatives"].clone().requires_grad_()
        options["negatives"] = leaves["negatives"]
    if "guide" in options:
        # of x2, then of the negatives
        columns = whole["guide2"][:total][rows], whole["guide2"][total:][rows]
        options["guide"] = mine["guide1"], torch.cat(columns)
    if "similarity" in options:
        options["similarity"] = similarity
    found = run(loss, x1, x2, **options)
    found.sum().backward()
    return {"value": found.detach(), **{key: leaf.grad for key, leaf in leaves.items()}}


class Model(nn.Module):
    """Two encoders and a temperature; DDP averages the gradients of all of them."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)
        self.log_temperature = nn.Parameter(torch.tensor(-1.0))

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.first(x1), self.second(x2), self.log_temperature.exp()


def train(
    model: nn.Module, x1: Tensor, x2: Tensor, run: Callable[..., Tensor], loss: Any
) -> dict[str, Tensor]:
    a, b, temperature = model(x1, x2)
    value = run(loss, a, b, temperature=temperature)
    value.backward()
    return {"value": value.detach()} | {
        name.removeprefix("module."): p.grad for name, p in model.named_parameters()
    }


TRAINED = {"clip": losses.clip_loss, "nt-xent": losses.nt_xent_loss, "sigmoid": losses.sigmoid_loss}


def _gathering(rank: int, size: int, group: Any) -> dict[str, Any]:
    """gather: values, gradients of both orders, integers, masks and half precision."""
    counts = ROWS[size]["unequal"]
    x = torch.arange(1.0, counts[rank] * 2 + 1, dtype=torch.float64).reshape(-1, 2) + 10 * rank
    x.requires_grad_()
    everything = gather(x, group)
    weight = torch.linspace(1, 2, everything.numel(), dtype=torch.float64).view_as(everything)
    value = (rank + 1) * (weight * everything**3).sum()
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.square().sum(), x)
    half = torch.ones(counts[rank], dtype=torch.bfloat16, requires_grad=True)
    gather(half * (rank + 1), group).sum().backward()
    empty = gather(torch.full((0 if rank == 0 else 1, 3), float(rank)), group)
    return {
        "x": x.detach(),
        "everything": everything.detach(),
        "slope": slope.detach(),
        "curvature": curvature,
        "ids": gather(torch.arange(counts[rank]), group),
        "mask": gather(torch.arange(counts[rank]) % 2 == 0, group),
        "half": half.grad,
        "empty": empty,
    }


def _second(group: Any, whole: dict[str, Tensor], rows: slice) -> dict[str, Any]:
    """Squared length of the loss's gradient, differentiated; the ring refuses."""
    x1, x2 = (whole[key][rows].clone().requires_grad_() for key in ("x1", "x2"))
    value = contrastive(losses.clip_loss, x1, x2, temperature=0.5, group=group)
    (slope,) = torch.autograd.grad(value, x1, create_graph=True)
    slope.square().sum().backward()
    found = {"x1": x1.grad.clone(), "x2": x2.grad.clone()}
    value = contrastive(losses.clip_loss, x1, x2, temperature=0.5, mode="ring", group=group)
    (slope,) = torch.autograd.grad(value, x1, create_graph=True)
    try:
        slope.sum().backward()
    except ValueError as error:
        found["refused"] = str(error)
    return found


def _errors(rank: int, group: Any) -> dict[str, str]:
    """Every rank must say something, whatever is wrong on one of them."""
    x = torch.randn(3, 4)

    def both(*args: Any, **options: Any) -> Tensor:
        return contrastive(*args, group=group, **options)

    wrong = {
        "width": lambda: both(losses.clip_loss, *[torch.randn(3, 4 + (rank == 1))] * 2),
        "dtype": lambda: both(losses.clip_loss, *[x.double() if rank else x] * 2, mode="ring"),
        "frozen": lambda: both(losses.clip_loss, x.clone().requires_grad_(rank == 0), x),
        "groups": lambda: both(losses.clip_loss, x, x, groups=torch.arange(3) if rank else None),
        "one side": lambda: both(losses.clip_loss, x, x[:2] if rank == 1 else x),
        "ids": lambda: both(losses.clip_loss, x, x, groups=torch.arange(3 + (rank == 0))),
        "gather": lambda: gather(torch.ones(2, 2 + rank), group),
        "no tensor": lambda: gather(3 if rank else x, group),
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
    """All of it, on one of four processes, two of which are a group of their own, too; results go to a file."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=4,
        timeout=timedelta(seconds=100),
    )
    members = [1, 3]
    two = dist.new_group(members)
    results: dict[int, dict[str, Any]] = {4: {}}
    try:
        _all(rank, 4, None, results[4])
        if rank in members:
            results[2] = {}
            _all(members.index(rank), 2, two, results[2])
    except Exception:  # noqa: BLE001 (told to the test, which fails with it)
        results[4]["failed"] = traceback.format_exc()
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def _all(rank: int, size: int, group: Any, results: dict[str, Any]) -> None:
    results["gather"] = _gathering(rank, size, group)
    results["errors"] = _errors(rank, group)
    for shape, counts in ROWS[size].items():
        start = sum(counts[:rank])
        rows = slice(start, start + counts[rank])
        scores.TILE_ROWS = 2 if shape == "equal" else 256  # several tiles for each block, or one
        for dtype in DTYPES[shape]:
            whole = batch(sum(counts), dtype)
            for name, (_, _, modes) in CASES.items():
                for mode in modes:
                    key = f"{name} {mode} {shape} {dtype}"
                    results[key] = evaluate(
                        name,
                        whole,
                        rows,
                        lambda *a, mode=mode, **k: contrastive(*a, mode=mode, group=group, **k),
                    )
    counts = ROWS[size]["unequal"]
    start = sum(counts[:rank])
    rows = slice(start, start + counts[rank])
    whole = batch(sum(counts), torch.float64)
    x1, x2 = whole["x1"][rows], whole["x2"][rows]
    half = batch(sum(counts), torch.bfloat16)
    for mode in ("gather", "ring"):
        with torch.autocast("cpu", torch.bfloat16):
            results[f"half {mode}"] = evaluate(
                "clip", half, rows, lambda *a, mode=mode, **k: contrastive(*a, mode=mode, group=group, **k)
            )
    results["second"] = _second(group, whole, rows)
    for name, loss in TRAINED.items():
        for mode in ("gather", "ring"):
            wrapped = nn.parallel.DistributedDataParallel(Model().double(), process_group=group)
            results[f"ddp {name} {mode}"] = train(
                wrapped, x1, x2, lambda *a, mode=mode, **k: contrastive(*a, mode=mode, group=group, **k), loss
            )
    shared = nn.parallel.DistributedDataParallel(Model().double().first, process_group=group)
    value = cached_backward(
        lambda a, b: contrastive(losses.clip_loss, a, b, group=group),
        (shared, shared),
        (x1, x2),
        chunk_size=2,
    )
    results["cached"] = {"value": value, "weight": shared.module.weight.grad}
