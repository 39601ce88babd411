"""The methods of the k-NN table: what is trained by which loss, and how it classifies."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import couplings as cp
from couplings.losses import knn_loss, knn_predict
from couplings_experiments.data import Split
from couplings_experiments.models import ResNet18, TwoLayerConv

NEIGHBOURS = 9  # the paper's k
ENTROPIC_SORT_EPSILON = 1e-2  # of the entropic sort where nothing was chosen: its costs lie in [0, 1]
COMPONENTS = 50  # principal components


def batched(module: nn.Module, images: Tensor, size: int = 1000) -> Tensor:
    """``module(images)`` without gradients, a batch at a time."""
    with torch.no_grad():
        return torch.cat([module(part) for part in images.split(size)])


def knn_accuracy(train: Tensor, train_labels: Tensor, held: Tensor, held_labels: Tensor) -> float:
    """Share of ``held`` that plain k-NN on these features labels correctly."""
    predicted = knn_predict(train, train_labels, held, NEIGHBOURS)
    return float((predicted == held_labels).double().mean())


class NeighbourMethod:
    """The network alone, trained so that a query's k nearest templates carry its label; classifies by plain k-NN."""

    def __init__(self, trunk: TwoLayerConv | ResNet18, method: str, epsilon: float | None = None) -> None:
        self.module: nn.Module = trunk
        self.method = method
        self.epsilon = epsilon

    def loss(self, queries: Split, templates: Split, noise: torch.Generator) -> Tensor:
        """Minus the soft count of same-label templates among the k nearest."""
        count = len(queries)
        features = self.module(torch.cat([queries.images, templates.images]))
        if self.method == "entropic-sort":
            return _sorting_loss(
                features, queries.labels, templates.labels, self.epsilon or ENTROPIC_SORT_EPSILON
            )
        return knn_loss(
            features[:count],
            features[count:],
            queries.labels,
            templates.labels,
            NEIGHBOURS,
            epsilon=self.epsilon,
            method=self.method,
            generator=noise if self.method == "gumbel" else None,
        )

    def features(self, images: Tensor) -> Tensor:
        """What the nearest neighbours are searched by."""
        return batched(self.module, images)

    def accuracy(self, train: Split, held: Split) -> float:
        """Of plain k-NN on the features."""
        return knn_accuracy(
            self.features(train.images), train.labels, self.features(held.images), held.labels
        )


class Autoencoder:
    """The network as encoder, two linear layers as decoder, squared error; classifies by k-NN on features."""

    def __init__(self, trunk: TwoLayerConv | ResNet18, shape: tuple[int, ...]) -> None:
        self.encoder = trunk
        self.decoder = nn.Sequential(
            nn.Linear(trunk.features, trunk.features), nn.ReLU(), nn.Linear(trunk.features, math.prod(shape))
        )
        self.module: nn.Module = nn.ModuleDict({"encoder": self.encoder, "decoder": self.decoder})

    def loss(self, queries: Split, templates: Split, noise: torch.Generator) -> Tensor:
        """Mean squared error of the reconstruction."""
        images = torch.cat([queries.images, templates.images])
        return nn.functional.mse_loss(self.decoder(self.encoder(images)), images.flatten(1))

    def features(self, images: Tensor) -> Tensor:
        """What the decoder reconstructs from."""
        return batched(self.encoder, images)

    def accuracy(self, train: Split, held: Split) -> float:
        """Of plain k-NN on the features."""
        return knn_accuracy(
            self.features(train.images), train.labels, self.features(held.images), held.labels
        )


class Classifier:
    """The network with its final linear layer, trained by cross-entropy; classifies by the largest output."""

    def __init__(self, trunk: TwoLayerConv | ResNet18, classes: int) -> None:
        self.trunk = trunk
        self.module: nn.Module = nn.Sequential(trunk, nn.Linear(trunk.features, classes))

    def loss(self, queries: Split, templates: Split, noise: torch.Generator) -> Tensor:
        """Cross-entropy of all images of the step."""
        images = torch.cat([queries.images, templates.images])
        return nn.functional.cross_entropy(self.module(images), torch.cat([queries.labels, templates.labels]))

    def features(self, images: Tensor) -> Tensor:
        """The input of the final layer: the pretrained network's features."""
        return batched(self.trunk, images)

    def accuracy(self, train: Split, held: Split) -> float:
        """Of the largest output."""
        return float((batched(self.module, held.images).argmax(-1) == held.labels).double().mean())


def _sorting_loss(features: Tensor, query_labels: Tensor, template_labels: Tensor, epsilon: float) -> Tensor:
    """NeuralSort's k-NN loss with an entropic transport plan as its permutation matrix (Cuturi et al. 2019).

    A query's distances, standardised and squashed into [0, 1], are coupled with the evenly spaced ranks
    0, 1/(n-1), ..., 1. n times the plan is doubly stochastic; its first k columns hold the k nearest templates.
    """
    count = len(query_labels)
    distance = torch.cdist(features[:count], features[count:], compute_mode="donot_use_mm_for_euclid_dist")
    total = distance.shape[-1]
    centred = distance - distance.mean(-1, keepdim=True)
    spread = distance.std(-1, correction=0, keepdim=True)
    squashed = torch.sigmoid(math.pi / math.sqrt(3) * centred / torch.where(spread > 0, spread, 1))
    ranks = torch.linspace(0, 1, total, dtype=distance.dtype, device=distance.device)
    cost = (squashed.unsqueeze(-1) - ranks) ** 2
    plan = cp.solve(cost, epsilon=epsilon, on_fail="ignore").plan()
    nearest = total * plan[..., :NEIGHBOURS].sum(-1)
    agree = query_labels.unsqueeze(-1) == template_labels
    loss: Tensor = -(nearest * agree).sum(-1).mean()
    return loss
