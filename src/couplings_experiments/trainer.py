"""One trainer for every method: same batches, same optimiser, resumable after every epoch to the same last bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from couplings_experiments.data import Dataset, Split
from couplings_experiments.epochs import Epochs
from couplings_experiments.errors import UserError


@dataclass(frozen=True)
class Optimisation:
    """SGD, as in the paper.

    ``schedule`` is "constant", or "cosine" for a decay to 0 over all steps. ``steps`` caps the steps of an epoch.
    """

    epochs: int
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "constant"
    queries: int = 100
    templates: int = 100
    steps: int | None = None


class Method(Protocol):
    """What can be trained: a module, a loss on one step's images, and an accuracy."""

    module: nn.Module

    def loss(self, queries: Split, templates: Split, noise: torch.Generator) -> Tensor:
        """The loss of one step."""

    def accuracy(self, train: Split, held: Split) -> float:
        """Share of ``held`` labelled correctly by what was learned from ``train``."""


def train(
    method: Method,
    data: Dataset,
    settings: Optimisation,
    seed: int,
    directory: Path,
    *,
    identity: str,
    after_epoch: Callable[[int], None] = lambda epoch: None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, float]]:
    """Train ``method`` in place and return its history, continuing from a checkpoint in ``directory`` if there is one.

    An epoch visits every training image once as a query (but for the last, incomplete batch); the templates of a step
    are drawn from the images that are not its queries, so no query meets itself.

    Args:
        method: see `Method`; freshly initialised.
        data: the training and validation images.
        settings: the optimiser's.
        seed: of the batches and the noise.
        directory: for checkpoints.
        identity: what is trained; a checkpoint of anything else is not continued.
        after_epoch: called with the number of epochs just finished (more than 1 after a resumption).
        say: takes a line for the user.

    Raises:
        Diverged: the loss became infinite or NaN.
    """
    device = data.train.images.device
    module = method.module.to(device)
    optimiser = torch.optim.SGD(
        module.parameters(), settings.learning_rate, settings.momentum, weight_decay=settings.weight_decay
    )
    batches = torch.Generator().manual_seed(seed)
    noise = torch.Generator(device).manual_seed(seed)
    epochs = Epochs(
        directory,
        module,
        optimiser,
        {"batches": batches, "noise": noise},
        identity=identity,
        stated=[seed, asdict(settings), data.name, data.sizes],
        after_epoch=after_epoch,
        say=say,
    )
    queries, templates = settings.queries, settings.templates
    total = len(data.train)
    if total < queries + templates:
        raise UserError(
            f"{total} training images are too few: one step takes {queries} queries and {templates} templates. "
            "Choose another --dataset."
        )
    steps = total // queries if settings.steps is None else min(settings.steps, total // queries)
    for epoch in range(len(epochs.history), settings.epochs):
        module.train()
        order = torch.randperm(total, generator=batches)
        losses = []
        for step in range(steps):
            if settings.schedule == "cosine":
                done = (epoch * steps + step) / (settings.epochs * steps)
                for group in optimiser.param_groups:
                    group["lr"] = settings.learning_rate * (1 + math.cos(math.pi * done)) / 2
            chosen = order[step * queries : (step + 1) * queries]
            others = torch.cat([order[: step * queries], order[(step + 1) * queries :]])
            met = others[torch.randperm(len(others), generator=batches)[:templates]]
            loss = method.loss(_take(data.train, chosen), _take(data.train, met), noise)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        mean = epochs.mean(losses)
        module.eval()
        accuracy = method.accuracy(_first(data.train, 5000), _first(data.validation, 2000))
        epochs.close({"epoch": epoch + 1, "loss": mean, "validation": accuracy})
    module.eval()
    return epochs.history


def _take(split: Split, index: Tensor) -> Split:
    index = index.to(split.labels.device)
    return Split(split.images[index], split.labels[index])


def _first(split: Split, count: int) -> Split:
    return Split(split.images[:count], split.labels[:count])
