"""Classification under label noise: losses, settings and presets. Shared by the experiment and its search."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from couplings.losses import topk_loss
from couplings_experiments.data import Dataset, Split
from couplings_experiments.experiment import Context
from couplings_experiments.knn_methods import batched
from couplings_experiments.knn_training import ALIKE, data_for, use_threads
from couplings_experiments.models import FourLayerConv, trunk
from couplings_experiments.trainer import Optimisation, train

NOISE = (0.0, 0.2, 0.4)  # share of the training labels that are wrong


def focal_loss(scores: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Cross-entropy of each sample times (1 - p)^gamma, p the probability of its label (Lin et al. 2017); the mean."""
    log_p = scores.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return -((-log_p.expm1()).clamp_min(1e-12) ** gamma * log_p).mean()


def smooth_topk_svm(scores: Tensor, labels: Tensor, k: int, tau: float) -> Tensor:
    r"""The smoothed top-k SVM of Berrada, Zisserman and Kumar (2018), margin 1; the mean over samples.

    A set of k classes scores the mean of its members' scores. The loss is tau times the log-sum-exp, at temperature
    tau, over all sets, those without the true class plus the margin, minus that over the sets with it:

        tau log(1 + exp(1/tau) e_k(z) / (exp(z_y) e_{k-1}(z))),    z = s / (k tau)

    with e_k(z) the elementary symmetric polynomial of degree k of the exponentials of the other classes' z.
    """
    z = scores / (k * tau)
    true = z.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    others = torch.ones_like(scores, dtype=torch.bool).scatter(-1, labels.unsqueeze(-1), False)
    degrees = log_symmetric(z[others].unflatten(0, (len(scores), -1)), k)
    return tau * nn.functional.softplus(1 / tau + degrees[..., k] - degrees[..., k - 1] - true).mean()


def log_symmetric(z: Tensor, k: int) -> Tensor:
    """Logarithms of the elementary symmetric polynomials of degrees 0..k of exp(z), (..., n) -> (..., k + 1).

    One entry after the other: sets without it, and smaller sets to which it is added.
    """
    found = [torch.zeros_like(z[..., 0])]
    for entry in z.unbind(-1):
        grown = [torch.logaddexp(more, less + entry) for less, more in pairwise(found)]
        longest = [found[-1] + entry] if len(found) <= k else []
        found = [found[0], *grown, *longest]
    return torch.stack(found, -1)


@dataclass(frozen=True)
class Choice:
    """What was chosen for one method: the learning rate, and gamma, tau or epsilon for those that have one."""

    learning_rate: float
    parameter: float | None = None


@dataclass(frozen=True)
class Method:
    """A loss of scores (n, classes), labels, k and its parameter; whether it aims at the top k or the top 1."""

    label: str
    loss: Callable[[Tensor, Tensor, int, float], Tensor]
    parameter: str | None
    top: bool
    weight: float  # how long an epoch takes compared with the cheapest (for the time left)
    soft: bool = False


def _soft(method: str) -> Callable[[Tensor, Tensor, int, float], Tensor]:
    return lambda scores, labels, k, epsilon: topk_loss(scores, labels, k, epsilon=epsilon, method=method)


METHODS = {
    "cross-entropy": Method(
        "cross-entropy", lambda s, y, k, p: nn.functional.cross_entropy(s, y), None, False, 1.0
    ),
    "focal": Method("focal", lambda s, y, k, p: focal_loss(s, y, p), "gamma", False, 1.0),
    "svm": Method("smooth SVM", smooth_topk_svm, "tau", False, 1.2),
    "soft": Method("soft 0/1, transport", _soft("transport"), "epsilon", False, 2.5, soft=True),
    "sigmoid": Method("soft 0/1, sigmoid", _soft("sigmoid"), "epsilon", False, 1.3, soft=True),
    "svm-topk": Method("smooth top-k SVM", smooth_topk_svm, "tau", True, 1.5),
    "soft-topk": Method("soft top-k, transport", _soft("transport"), "epsilon", True, 2.5, soft=True),
    "sigmoid-topk": Method("soft top-k, sigmoid", _soft("sigmoid"), "epsilon", True, 1.3, soft=True),
}

# Six trials for everyone: three learning rates with two parameters, or six learning rates where there is none.
_RATES = (0.03, 0.1, 0.3)
_SLOW = (0.003, 0.01, 0.03)  # losses of standardised scores: their gradient grows as the scores shrink
GRID = {
    "cross-entropy": [Choice(rate) for rate in (0.01, 0.03, 0.1, 0.2, 0.3, 0.5)],
    "focal": [Choice(rate, gamma) for rate in _RATES for gamma in (1.0, 2.0)],
    "svm": [Choice(rate, tau) for rate in _RATES for tau in (0.3, 1.0)],
    "soft": [Choice(rate, epsilon) for rate in _SLOW for epsilon in (0.1, 1.0)],
    "sigmoid": [Choice(rate, epsilon) for rate in _SLOW for epsilon in (1.0, 3.0)],
    "svm-topk": [Choice(rate, tau) for rate in _RATES for tau in (0.3, 1.0)],
    "soft-topk": [Choice(rate, epsilon) for rate in _SLOW for epsilon in (0.1, 1.0)],
    "sigmoid-topk": [Choice(rate, epsilon) for rate in _SLOW for epsilon in (1.0, 3.0)],
}

# Chosen on digits' validation images, whose labels are right, by `couplings reproduce topk-classification-search
# --preset full`: one choice for each share of noise, six trials each, the first of equal ones. Behind each line the
# validation accuracies they were chosen by, in percent: top-1, for the last three top-3.
DIGITS: dict[str, tuple[Choice, Choice, Choice]] = {
    "cross-entropy": (Choice(0.3), Choice(0.1), Choice(0.2)),  # 99.4, 95.4, 94.4
    "focal": (Choice(0.1, 1.0), Choice(0.1, 1.0), Choice(0.1, 1.0)),  # 98.9, 95.0, 95.2
    "svm": (Choice(0.1, 0.3), Choice(0.1, 0.3), Choice(0.1, 1.0)),  # 99.2, 97.5, 95.5
    "soft": (Choice(0.03, 1.0), Choice(0.03, 1.0), Choice(0.01, 1.0)),  # 97.0, 94.7, 90.7
    "sigmoid": (Choice(0.03, 3.0), Choice(0.03, 3.0), Choice(0.01, 3.0)),  # 98.7, 97.3, 95.2
    "svm-topk": (Choice(0.3, 0.3), Choice(0.3, 1.0), Choice(0.3, 0.3)),  # 100.0, 99.7, 98.9
    "soft-topk": (Choice(0.003, 1.0), Choice(0.01, 1.0), Choice(0.003, 1.0)),  # 100.0, 99.5, 99.1
    "sigmoid-topk": (Choice(0.003, 1.0), Choice(0.01, 3.0), Choice(0.01, 3.0)),  # 100.0, 99.7, 99.4
}

# On the larger sets nothing was searched: one rate for the losses in score units, a smaller one for bounded ranks.
UNSEARCHED = {
    "cross-entropy": Choice(0.05),
    "focal": Choice(0.05, 2.0),
    "svm": Choice(0.05, 1.0),
    "soft": Choice(0.01, 1.0),
    "sigmoid": Choice(0.01, 3.0),
    "svm-topk": Choice(0.05, 1.0),
    "soft-topk": Choice(0.01, 1.0),
    "sigmoid-topk": Choice(0.01, 3.0),
}


@dataclass(frozen=True)
class Plan:
    """How much a preset trains on a data set."""

    seeds: int
    optimisation: Optimisation
    limit: int | None = None
    networks: tuple[str, ...] = ("small",)
    noise: tuple[float, ...] = NOISE


_DIGITS = Optimisation(epochs=15, schedule="cosine", templates=0)
_LARGE = Optimisation(epochs=100, schedule="cosine", templates=0)
_BOTH = ("plain", "resnet18")
PLANS = {
    ("digits", "smoke"): Plan(1, replace(_DIGITS, epochs=1, steps=1), noise=(0.4,)),
    ("digits", "quick"): Plan(1, _DIGITS),
    ("digits", "full"): Plan(5, _DIGITS),
    ("mnist", "smoke"): Plan(1, replace(_LARGE, epochs=1, steps=1), limit=400, noise=(0.4,)),
    ("mnist", "quick"): Plan(1, replace(_LARGE, epochs=3), limit=2000),
    ("mnist", "full"): Plan(5, replace(_LARGE, epochs=30)),
    ("cifar10", "smoke"): Plan(1, replace(_LARGE, epochs=1, steps=1, queries=20), 40, _BOTH, (0.4,)),
    ("cifar10", "quick"): Plan(1, replace(_LARGE, epochs=2, steps=2), 400, _BOTH, (0.0, 0.4)),
    ("cifar10", "full"): Plan(5, _LARGE, None, _BOTH),
}
NETWORKS = {
    "small": "two-layer convolutional network",
    "plain": "four-layer convolutional network",
    "resnet18": "ResNet-18",
}


def plan_for(dataset: str, preset: str) -> Plan:
    """The plan of ``preset`` on ``dataset``; Fashion-MNIST is treated as MNIST, CIFAR-100 as CIFAR-10."""
    return PLANS[ALIKE.get(dataset, dataset), preset]


def choice_for(dataset: str, name: str, noise: float) -> Choice:
    """The setting of method ``name`` where ``noise`` of the labels are wrong."""
    return DIGITS[name][NOISE.index(noise)] if dataset == "digits" else UNSEARCHED[name]


def top_for(classes: int) -> int:
    """The k of the top-k losses and of the top-k accuracy: 3 of 10 classes, 5 of 100."""
    return 3 if classes <= 10 else 5


def flip_labels(data: Dataset, share: float, seed: int) -> tuple[Dataset, Tensor]:
    """``data`` with ``share`` of its training labels changed to another one, drawn uniformly; and which ones."""
    labels = data.train.labels.cpu()
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[torch.randperm(len(labels), generator=draw)[: round(share * len(labels))]] = True
    moved = (labels + torch.randint(1, data.classes, labels.shape, generator=draw)) % data.classes
    noisy = torch.where(chosen, moved, labels).to(data.train.labels.device)
    return replace(data, train=Split(data.train.images, noisy)), chosen


class LossClassifier:
    """A network with a final linear layer, trained by one of `METHODS`; classifies by the largest output."""

    def __init__(self, network: str, name: str, choice: Choice, data: Dataset) -> None:
        shape = tuple(data.train.images.shape[1:])
        body = FourLayerConv(shape[0], shape[1]) if network == "plain" else trunk(shape)
        self.module: nn.Module = nn.Sequential(body, nn.Linear(body.features, data.classes))
        self.method = METHODS[name]
        self.parameter = math.nan if choice.parameter is None else choice.parameter
        self.k = top_for(data.classes) if self.method.top else 1

    def loss(self, queries: Split, templates: Split, noise: torch.Generator) -> Tensor:
        """The method's loss of all images of the step."""
        images = torch.cat([queries.images, templates.images])
        labels = torch.cat([queries.labels, templates.labels])
        return self.method.loss(self.module(images), labels, self.k, self.parameter)

    def accuracy(self, train: Split, held: Split) -> float:
        """The one that the loss aims at: of the largest output, or of the k largest."""
        return self.hits(held, self.k)

    def hits(self, held: Split, k: int) -> float:
        """Share of ``held`` whose label is among the k largest outputs."""
        best = batched(self.module, held.images).topk(k).indices
        return float((best == held.labels.unsqueeze(-1)).any(-1).double().mean())


def load_for(context: Context, seed: int, limit: int | None) -> Dataset:
    """The request's data as ``seed`` divides it, with as many threads as it is worth."""
    data = data_for(context, seed, limit)
    use_threads(data)
    return data


def train_one(
    context: Context,
    data: Dataset,
    network: str,
    name: str,
    noise: float,
    choice: Choice,
    seed: int,
    directory: Path,
    title: str,
) -> tuple[LossClassifier, list[dict[str, float]]]:
    """A model trained on noisy labels, validated on clean ones; the same seed gives every method the same start."""
    plan = plan_for(context.request.dataset, context.request.preset)
    weight = METHODS[name].weight
    noisy, _ = flip_labels(data, noise, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LossClassifier(network, name, choice, data)
    history = train(
        model,
        noisy,
        replace(plan.optimisation, learning_rate=choice.learning_rate),
        seed,
        directory,
        identity=f"{network} {name} {noise} {choice}",
        after_epoch=lambda done: context.progress.advance(done * weight, title),
        say=context.progress.say,
    )
    return model, history
