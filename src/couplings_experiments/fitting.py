"""Small models trained many at a time: rows of independent networks, one loop, resumable after every epoch.

Where a model takes milliseconds, a search over settings is one more batch dimension. Every row is a model of its own:
its loss depends on its parameters only, the losses of all rows are added up, and Adam works entry by entry, so that
no row knows of another. What is measured after an epoch is kept for each row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from couplings_experiments.epochs import Epochs


@dataclass(frozen=True)
class Fitting:
    """Adam with a cosine decay of the learning rate to 0 over all steps."""

    epochs: int
    steps: int


class RowNetworks(nn.Module):
    """Independent networks with one output, all alike at the start: linear, or with one hidden layer of ReLU.

    Args:
        rates: the learning rate of each row.
        features: how many inputs there are.
        hidden: how many hidden units; 0 for a linear model, which starts at zero.
        seed: of the first weights.
    """

    def __init__(self, rates: Sequence[float], features: int, hidden: int, seed: int) -> None:
        super().__init__()
        self.rates = sorted(set(rates))
        # parameters are kept by learning rate, so that each rate is one group of the optimiser
        members = [[row for row, rate in enumerate(rates) if rate == group] for group in self.rates]
        self.order = torch.tensor([row for group in members for row in group]).argsort()
        generator = torch.Generator().manual_seed(seed)
        self.groups = nn.ModuleList()
        if hidden:
            first = _uniform((features, hidden), features, generator)
            shift = _uniform((1, hidden), features, generator)
            last = _uniform((hidden, 1), hidden, generator)
            starts = {"first": first, "shift": shift, "last": last, "offset": torch.zeros(1, 1)}
        else:
            starts = {"last": torch.zeros(features, 1), "offset": torch.zeros(1, 1)}
        for group in members:
            repeated = {name: nn.Parameter(start.repeat(len(group), 1, 1)) for name, start in starts.items()}
            self.groups.append(nn.ParameterDict(repeated))

    def optimiser(self) -> torch.optim.Optimizer:
        """Adam, with each row's learning rate."""
        groups: list[dict[str, Any]] = [
            {"params": list(group.parameters()), "lr": rate, "peak": rate}
            for group, rate in zip(self.groups, self.rates, strict=True)
        ]
        return torch.optim.Adam(groups)

    def forward(self, x: Tensor) -> Tensor:
        """(..., features), the same for all rows -> (rows, ...)."""
        flat = x.reshape(-1, x.shape[-1])
        out = torch.cat([_evaluate(group, flat) for group in self.groups])  # type: ignore[arg-type]
        return out[self.order.to(out.device)].reshape(-1, *x.shape[:-1])

    def penalty(self) -> Tensor:
        """Half the sum of squares of each row's weights, offsets left out, (rows,)."""
        sums = torch.cat([_size(group) for group in self.groups])  # type: ignore[arg-type]
        return 0.5 * sums[self.order.to(sums.device)]


class Step(Protocol):
    """One step's loss of every row, (rows,), on what it draws."""

    def __call__(self, draw: torch.Generator) -> Tensor: ...


def fit(
    networks: RowNetworks,
    step: Step,
    measure: Callable[[], Sequence[float]],
    settings: Fitting,
    seed: int,
    directory: Path,
    *,
    identity: str,
    after_epoch: Callable[[int], None] = lambda epoch: None,
    say: Callable[[str], None] = lambda line: None,
) -> list[list[float | None]]:
    """Train all rows in place and return what each epoch measured, continuing from a checkpoint if there is one.

    Args:
        networks: see `RowNetworks`; freshly initialised.
        step: see `Step`.
        measure: one number per row, called after each epoch without gradients.
        settings: the optimiser's.
        seed: of what the steps draw.
        directory: for checkpoints.
        identity: what is trained; a checkpoint of anything else is not continued.
        after_epoch: called with the number of epochs just finished (more than 1 after a resumption).
        say: takes a line for the user.

    Returns:
        For each epoch, one number per row; None where a row diverged, which stops no other row.
    """
    optimiser = networks.optimiser()
    draw = torch.Generator().manual_seed(seed)
    epochs = Epochs(
        directory,
        networks,
        optimiser,
        {"draw": draw},
        identity=identity,
        stated=[seed, asdict(settings)],
        after_epoch=after_epoch,
        say=say,
    )
    total = settings.epochs * settings.steps
    for epoch in range(len(epochs.history), settings.epochs):
        for number in range(epoch * settings.steps, (epoch + 1) * settings.steps):
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * (1 + math.cos(math.pi * number / total)) / 2
            optimiser.zero_grad(set_to_none=True)
            step(draw).sum().backward()
            optimiser.step()
        with torch.no_grad():
            measured = [float(value) if math.isfinite(value) else None for value in measure()]
        epochs.close(measured)
    return epochs.history


def best(values: Sequence[float | None], *, highest: bool) -> int:
    """The index of the best number, the first of equal ones; a diverged row is never the best.

    Raises:
        ValueError: all rows diverged.
    """
    known = [i for i, value in enumerate(values) if value is not None]
    if not known:
        raise ValueError("every setting diverged")
    sign = 1 if highest else -1
    return max(known, key=lambda i: sign * (values[i] or 0.0))


def _uniform(shape: tuple[int, int], inputs: int, generator: torch.Generator) -> Tensor:
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(inputs)


def _evaluate(group: nn.ParameterDict, x: Tensor) -> Tensor:
    """(samples, features) -> (rows, samples)."""
    hidden = x.expand(len(group["last"]), *x.shape)
    if "first" in group:
        hidden = torch.relu(torch.baddbmm(group["shift"], hidden, group["first"]))
    return torch.baddbmm(group["offset"], hidden, group["last"]).squeeze(-1)


def _size(group: nn.ParameterDict) -> Tensor:
    """Sum of squares of each row's weights, (rows,)."""
    return torch.stack([group[name].square().sum((1, 2)) for name in ("first", "last") if name in group]).sum(
        0
    )
