"""How the matchers are set up and trained: variants, presets, one loop, resumable after every epoch to the last bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from couplings.losses import matching_loss
from couplings_experiments.data.photographs import (
    Batch,
    Pair,
    View,
    collate,
    draw_views,
    held_pairs,
    pair_views,
)
from couplings_experiments.epochs import Epochs
from couplings_experiments.matching_methods import Found, choose_threshold, couple, read, row_error
from couplings_experiments.matching_model import LIKENESS, Matcher

HELD_SEED = 1000  # of the views that validate and test: the same ones for all methods and seeds
FEWEST = 8  # keypoints of a view that is trained on


@dataclass(frozen=True)
class Variant:
    """One way from scores to a plan: the matcher, the pairs and the loss are the same for all."""

    label: str
    method: str
    sweeps: int | None
    likeness: float  # the dustbin's start: a similarity's score, or even odds of being matchable
    weight: float  # how long an epoch takes compared with the cheapest (for the time left)


VARIANTS = {
    "transport": Variant("transport to the certificate", "transport", None, LIKENESS, 1.3),
    "sweeps-20": Variant("20 unrolled Sinkhorn sweeps", "transport", 20, LIKENESS, 1.1),
    "sweeps-100": Variant("100 unrolled Sinkhorn sweeps", "transport", 100, LIKENESS, 1.3),
    "dual-softmax": Variant("dual softmax", "dual_softmax", None, 0.0, 1.0),
}


@dataclass(frozen=True)
class Training:
    """AdamW with a short rise and a cosine decay to 0 over all steps.

    Attributes:
        epochs, steps: how many epochs, and steps of an epoch.
        rate: of learning. The same for all variants: they differ in nothing but the plan. Chosen on validation
            photographs by `couplings reproduce matching-search` as the best one on average over the variants.
        scalars: how much faster the parameters learn that are single scales.
        pairs: of a step.
        clip: largest norm of a gradient.
    """

    epochs: int
    steps: int
    rate: float = 5e-3
    scalars: float = 10.0
    pairs: int = 4
    clip: float = 1.0


@dataclass(frozen=True)
class Plan:
    """How much a preset does.

    Attributes:
        seeds: how many.
        training: see `Training`.
        views: of every training photograph; all their pairs may be drawn.
        validation, test: pairs of every photograph.
        limit: keypoints of a training view, and of one that validates or tests.
        variants: which ones are trained.
        shape: width, layers and heads of the matcher.
    """

    seeds: int
    training: Training
    views: int
    validation: int
    test: int
    limit: tuple[int, int] = (128, 256)
    variants: tuple[str, ...] = tuple(VARIANTS)
    shape: tuple[int, int, int] = (32, 2, 4)


_FEWER = ("transport", "sweeps-20", "dual-softmax")
PLANS = {
    "smoke": Plan(1, Training(epochs=2, steps=2, pairs=2), 2, 1, 1, (32, 48), ("transport", "sweeps-20")),
    "quick": Plan(1, Training(epochs=4, steps=20), 5, 5, 6, variants=_FEWER),
    "full": Plan(3, Training(epochs=8, steps=30), 10, 8, 20),
}


@lru_cache(maxsize=2)  # the variants of a seed share its views
def training_views(count: int, limit: int, seed: int) -> dict[str, list[View]]:
    """The views of the training photographs that ``seed`` draws, without those that show next to nothing."""
    views = draw_views("train", count, limit, seed)
    kept = {name: [view for view in found if len(view.features) >= FEWEST] for name, found in views.items()}
    return {name: found for name, found in kept.items() if len(found) > 1}


@lru_cache(maxsize=4)
def held(part: str, count: int, limit: int) -> list[Pair]:
    """The pairs that validate or test."""
    return held_pairs(part, count, limit, HELD_SEED)


class Trained(NamedTuple):
    """A matcher and how it came to be."""

    model: Matcher
    history: list[dict[str, float]]


def build(variant: Variant, plan: Plan, seed: int) -> Matcher:
    """A freshly initialised matcher; the same seed gives every variant the same one, up to the dustbin's score."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Matcher(*plan.shape, variant.likeness)


def solved(model: Matcher, batch: Batch, variant: Variant) -> Tensor:
    """The logarithm of the plan with dustbins."""
    scores, dustbins = model(batch)
    return couple(scores, dustbins, batch, variant.method, variant.sweeps)


def apply(model: Matcher, pairs: Sequence[Pair], variant: Variant) -> tuple[list[Found], float]:
    """What ``model`` finds in ``pairs``, and how far any keypoint's row sum is from 1."""
    model.eval()
    device = model.sharpness.device
    found, worst = [], 0.0
    with torch.no_grad():
        for pair in pairs:
            batch = collate([pair]).to(device)
            plan = solved(model, batch, variant)
            found += read(plan, [pair])
            worst = max(worst, row_error(plan, batch.masks[0]))
    return found, worst


def train(
    variant: Variant,
    plan: Plan,
    seed: int,
    directory: Path,
    *,
    device: torch.device,
    identity: str,
    after_epoch: Callable[[int], None] = lambda done: None,
    say: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Train one matcher, continuing from a checkpoint in ``directory`` if there is one.

    Every step draws a photograph for each of its pairs, and two views of it.

    Args:
        variant: what makes a plan of the scores.
        plan: how much, and on what.
        seed: of the first weights, the views and the pairs.
        directory: for checkpoints.
        device: to train on.
        identity: what is trained; a checkpoint of anything else is not continued.
        after_epoch: called with the number of epochs just finished (more than 1 after a resumption).
        say: takes a line for the user.

    Raises:
        Diverged: the loss became infinite or NaN.
    """
    settings = plan.training
    model = build(variant, plan, seed).to(device)
    optimiser = _optimiser(model, settings.rate, settings.scalars)
    draw = torch.Generator().manual_seed(seed)
    epochs = Epochs(
        directory,
        model,
        optimiser,
        {"draw": draw},
        identity=identity,
        stated=[seed, asdict(variant), asdict(plan)],
        after_epoch=after_epoch,
        say=say,
    )
    total = settings.epochs * settings.steps
    for epoch in range(len(epochs.history), settings.epochs):
        model.train()
        losses = []
        for number in range(epoch * settings.steps, (epoch + 1) * settings.steps):
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * schedule(number, total)
            batch = collate(draw_pairs(plan, seed, draw)).to(device)
            log_plan = solved(model, batch, variant)
            loss = matching_loss(
                log_plan,
                batch.rows,
                column_matches=batch.columns,
                row_mask=batch.masks[0],
                column_mask=batch.masks[1],
            )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimiser.step()
            losses.append(loss.detach())
        mean = epochs.mean(losses)
        pairs = held("validation", plan.validation, plan.limit[1])
        score = choose_threshold(apply(model, pairs, variant)[0], pairs)[1]
        epochs.close({"epoch": epoch + 1, "loss": mean, "validation": score})
    return Trained(model, epochs.history)


def draw_pairs(plan: Plan, seed: int, draw: torch.Generator) -> list[Pair]:
    """The pairs of one step."""
    views = training_views(plan.views, plan.limit[0], seed)
    names = list(views)
    found = []
    for _ in range(plan.training.pairs):
        name = names[int(torch.randint(len(names), (), generator=draw))]
        first, second = torch.randperm(len(views[name]), generator=draw)[:2].tolist()
        found.append(pair_views(name, views[name][first], views[name][second]))
    return found


def schedule(number: int, total: int) -> float:
    """The share of the learning rate that step ``number`` has."""
    rise = max(1, total // 10)
    return min(1.0, (number + 1) / rise) * (1 + math.cos(math.pi * number / total)) / 2


def _optimiser(model: Matcher, rate: float, scalars: float) -> torch.optim.Optimizer:
    single = model.scalars()
    rest = [p for p in model.parameters() if all(p is not scalar for scalar in single)]
    groups: list[dict[str, Any]] = [
        {"params": rest, "peak": rate},
        {"params": single, "peak": rate * scalars, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, rate)
