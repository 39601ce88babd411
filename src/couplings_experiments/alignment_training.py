"""How two encoders learn to find each other: losses, presets, one loop, resumable after every epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import couplings as cp
from couplings_experiments.alignment_model import Shape, TwoEncoders, collapse, halves
from couplings_experiments.data.sets import Dataset, load
from couplings_experiments.epochs import Epochs
from couplings_experiments.errors import UserError
from couplings_experiments.processes import ALONE, Processes


@dataclass(frozen=True)
class Variant:
    """One loss and how it is used.

    Attributes:
        label: what the report calls it.
        loss: its name in `couplings.losses`.
        rate: of learning.
        guard: weight of the guard, where there is one.
        alone: the guard is followed alone until it is 0: for losses of scores themselves, which at collapse move all
            rows together. Losses of differences of scores have no gradient there, and are added.
        options: of the loss.
        learned: those of the options that are first values of parameters.
    """

    label: str
    loss: str
    rate: float
    guard: float
    options: dict[str, Any]
    learned: tuple[str, ...] = ()
    alone: bool = False


# Rates, temperatures and weights were chosen on validation images: `couplings reproduce alignment-search`.
VARIANTS = {
    "n-pairs": Variant("N-pairs", "n_pairs_loss", 3e-3, 3.0, {"temperature": 0.2}),
    "info-nce": Variant("InfoNCE", "info_nce_loss", 3e-3, 1.0, {"temperature": 0.2}),
    "clip": Variant("CLIP", "clip_loss", 3e-3, 1.0, {"temperature": 0.1}, ("temperature",)),
    "nt-xent": Variant("NT-Xent", "nt_xent_loss", 1e-3, 1.0, {"temperature": 0.1}),
    "sigmoid": Variant(
        "SigLIP",
        "sigmoid_loss",
        1e-3,
        3.0,
        {"temperature": 0.1, "bias": -10.0},
        ("temperature", "bias"),
        alone=True,
    ),
    # -1/T - log(pairs): with this bias equal vectors pull at nothing but the differences between them
    "sigmoid-low": Variant(
        "SigLIP, bias -15",
        "sigmoid_loss",
        3e-3,
        10.0,
        {"temperature": 0.1, "bias": -15.0},
        ("temperature", "bias"),
        alone=True,
    ),
    "triplet": Variant("triplet", "triplet_loss", 1e-3, 0.3, {"margin": 0.4, "symmetric": True}),
    "cosine-target": Variant("cosine target", "cosine_target_loss", 1e-3, 0.1, {"balance": 0.3}, alone=True),
}


class Start(NamedTuple):
    """What a run starts from, whether it is guarded, and whether gradients keep what is only rounding."""

    label: str
    collapsed: bool
    guarded: bool
    noisy: bool = False


STARTS = {
    "healthy": Start("healthy", False, False),
    "healthy-guard": Start("healthy, guard", False, True),
    "collapsed": Start("collapsed", True, False),
    "collapsed-guard": Start("collapsed, guard", True, True),
}
NOISY = Start("collapsed, rounding kept", True, False, True)
ROUNDING = 1e5
"""Entries of a gradient below so many roundings of 1 are what is left of terms that cancel."""


@dataclass(frozen=True)
class Training:
    """Adam, with a cosine decay of the learning rate to 0 over all steps.

    Attributes:
        epochs: how many.
        pairs: of a step, over all processes.
        steps: of an epoch at most.
    """

    epochs: int
    pairs: int = 128
    steps: int = 20


@dataclass(frozen=True)
class Plan:
    """How much a preset does: seeds, training, images (None: all), losses, encoders, draws of random vectors."""

    seeds: int
    training: Training
    limit: int | None = None
    variants: tuple[str, ...] = tuple(VARIANTS)
    shape: Shape = field(default_factory=Shape)
    draws: int = 100


PLANS = {
    "smoke": Plan(1, Training(epochs=2, pairs=40), 80, ("clip", "sigmoid", "triplet"), Shape(16, 8), 3),
    "quick": Plan(1, Training(epochs=40)),
    "full": Plan(6, Training(epochs=60)),
}


HELD = 500


class Views(NamedTuple):
    """Both halves of some images, (n, pixels) each, and what is on them."""

    left: Tensor
    right: Tensor
    labels: Tensor


class Trained(NamedTuple):
    """Two encoders and how they came to be."""

    model: TwoEncoders
    history: list[dict[str, Any]]


@lru_cache(maxsize=2)  # all losses and starts see the same images
def dataset(name: str, folder: Path | None, seed: int, limit: int | None) -> Dataset:
    """One seed's division of the images."""
    return load(name, folder, seed, limit)


def views(data: Dataset, part: str, device: torch.device) -> Views:
    """The halves of one part, in the precision of the training."""
    split = getattr(data, part)
    left, right = halves(split.images.to(device, precision(device)))
    return Views(left, right, split.labels)


def validation(data: Dataset, device: torch.device) -> Views:
    """What is measured after every epoch: at most `HELD` images."""
    return Views(*(x[:HELD] for x in views(data, "validation", device)))


def precision(device: torch.device) -> torch.dtype:
    """In float64 one process and several agree in every figure of the report; float32 where there is nothing else."""
    return torch.float32 if device.type == "mps" else torch.float64


def build(variant: Variant, start: Start, plan: Plan, inputs: int, seed: int) -> TwoEncoders:
    """Encoders at their start; the same seed gives every loss the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TwoEncoders(inputs, plan.shape, {name: variant.options[name] for name in variant.learned})
    if start.collapsed:
        collapse(model)
    return model


def train(
    variant: Variant,
    start: Start,
    plan: Plan,
    data: Dataset,
    seed: int,
    directory: Path,
    *,
    device: torch.device,
    identity: str,
    processes: Processes = ALONE,
    after_epoch: Callable[[int], None] = lambda epochs: None,
    say: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Train two encoders, continuing from a checkpoint in ``directory`` if there is one.

    Args:
        variant: see `Variant`.
        start: see `Start`.
        plan: see `Plan`.
        data: the images.
        seed: of the first weights and of the order of the images.
        directory: for checkpoints.
        device: where to compute.
        identity: what is trained; a checkpoint of anything else is not continued.
        processes: who computes each step together, each a part of its pairs.
        after_epoch: called with the number of epochs just finished (more than 1 after a resumption); the first epoch
            is the start itself, which is measured only.
        say: takes a line for the user.

    Raises:
        Diverged: the loss is not finite.
        UserError: a step has fewer pairs than there are processes, or there are fewer images than pairs.
    """
    settings = plan.training
    if not processes.size <= settings.pairs <= len(data.train):
        raise UserError(
            f"{settings.pairs} pairs a step do not fit {len(data.train)} training images and "
            f"{processes.size} processes. Use a larger data set, or fewer processes."
        )
    seen, held = views(data, "train", device), validation(data, device)
    model = build(variant, start, plan, seen.left.shape[1], seed).to(device, precision(device))
    optimiser = torch.optim.Adam(model.parameters(), variant.rate)
    draw = torch.Generator().manual_seed(seed)
    epochs = Epochs(
        directory,
        model,
        optimiser,
        {"draw": draw},
        identity=identity,
        stated=[seed, asdict(variant), start, asdict(plan), data.name, data.sizes],
        processes=processes,
        after_epoch=after_epoch,
        say=say,
    )
    wrapped = processes.wrapped(model)
    steps = min(settings.steps, len(seen.left) // settings.pairs)
    if not epochs.history:
        epochs.close({"step": 0, "loss": None, **measure(model, held)})
    for epoch in range(len(epochs.history) - 1, settings.epochs):
        losses = []
        order = torch.randperm(len(seen.left), generator=draw).split(settings.pairs)[:steps]
        for number, rows in enumerate(order, epoch * steps):
            share = (1 + math.cos(math.pi * number / (settings.epochs * steps))) / 2
            for group in optimiser.param_groups:
                group["lr"] = variant.rate * share
            mine = processes.mine(rows).to(device)
            loss = objective(variant, start, *wrapped(seen.left[mine], seen.right[mine]))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            if not start.noisy:
                quieten(model)
            optimiser.step()
            losses.append(loss.detach())
        mean = epochs.mean([processes.mean(torch.stack(losses))])
        epochs.close({"step": (epoch + 1) * steps, "loss": mean, **measure(model, held)})
    return Trained(model, epochs.history)


def quieten(model: TwoEncoders) -> None:
    """Set to 0 what is only rounding in the gradient: Adam, which divides by its size, would take it for a direction.

    Nothing else distinguishes a run at exact collapse from noise, which is another one on every machine and on every
    number of processes.
    """
    for parameter in model.parameters():
        if parameter.grad is not None:
            noise = ROUNDING * torch.finfo(parameter.dtype).eps
            parameter.grad = torch.nn.functional.hardshrink(parameter.grad, noise)


def objective(
    variant: Variant, start: Start, left: Tensor, right: Tensor, learned: dict[str, Tensor]
) -> Tensor:
    """The loss of the batch of all processes, and the guard's; the mean over processes is the whole batch's."""
    loss = cp.distributed.contrastive(
        getattr(cp.losses, variant.loss), left, right, **{**variant.options, **learned}
    )
    if start.guarded:
        # the spread is that of all rows, wherever they are
        everything = (cp.distributed.gather(side) for side in (left, right))
        guard = variant.guard * cp.losses.collapse_guard(*everything)
        loss = torch.where(guard > 0, guard, loss) if variant.alone else loss + guard
    return loss


def measure(model: TwoEncoders, held: Views) -> dict[str, Any]:
    """Who finds whom among held-out images, and what the vectors look like; ``accuracy`` left to right, and back."""
    with torch.no_grad():
        left, right, _ = model(held.left, held.right)
    there, back = (cp.diagnostics(*sides, rows=len(left)) for sides in ((left, right), (right, left)))
    return {
        "accuracy": [there.accuracy, back.accuracy],
        "rank": [there.effective_rank1, there.effective_rank2],
        "alignment": there.alignment,
        "uniformity": [there.uniformity1, there.uniformity2],
        "spread": [there.spread1, there.spread2],
        "margin": there.margin,
        "collapsed": there.collapsed,
        "reason": there.reason,
    }
