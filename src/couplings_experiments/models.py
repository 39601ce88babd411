"""The networks of the experiments, without their final linear layer: they map images to features."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TwoLayerConv(nn.Module):
    """Two convolutions, each followed by ReLU and 2 x 2 max pooling.

    5 x 5 filters without padding, 20 and 50 of them, on images of 28 x 28 (800 features); padded 3 x 3 filters, 32
    and 64, on smaller ones (256 features on 8 x 8).
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        large = size >= 28
        kernel, padding, widths = (5, 0, (20, 50)) if large else (3, 1, (32, 64))
        self.layers = nn.Sequential(
            nn.Conv2d(channels, widths[0], kernel, padding=padding),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(widths[0], widths[1], kernel, padding=padding),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        side = size
        for _ in widths:
            side = (side + 2 * padding - kernel + 1) // 2
        self.features = widths[1] * side**2

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, size, size) -> (n, features)."""
        features: Tensor = self.layers(images)
        return features


class NumberScore(nn.Module):
    """One score for an image of several digits side by side.

    The same small convolutional network looks at every digit (convolutions with max pooling and batch normalisation,
    the last one as large as what is left of a digit); two linear layers make a score of what it saw at all places.
    """

    def __init__(self, shape: tuple[int, ...], places: int) -> None:
        super().__init__()
        channels, height, width = shape
        large = min(height, width) >= 28
        kernel, widths = (5, (32, 64)) if large else (3, (16, 32))
        seen = 32
        self.places = places
        last = (height // 4, width // 4)
        digit = nn.Sequential(
            *_pooled(channels, widths[0], kernel),
            *_pooled(*widths, kernel),
            nn.Conv2d(widths[1], seen, last),
            nn.BatchNorm2d(seen),
            nn.ReLU(),
            nn.Flatten(),
        )
        # channels last and pooling before the rest: a step on 8 x 8 digits takes less than half as long on a CPU
        self.digit = digit.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.score = nn.Sequential(nn.Linear(places * seen, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(m, channels, height, places * width) -> (m,)."""
        count, channels, height, width = images.shape
        split = images.reshape(count, channels, height, self.places, width // self.places)
        digits = split.permute(0, 3, 1, 2, 4).reshape(-1, channels, height, width // self.places)
        seen = self.digit(digits.contiguous(memory_format=torch.channels_last))
        scores: Tensor = self.score(seen.reshape(count, -1)).squeeze(-1)
        return scores


def _pooled(inner: int, outer: int, kernel: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inner, outer, kernel, padding=kernel // 2),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(outer),
        nn.ReLU(),
    ]


class FourLayerConv(nn.Module):
    """A plain network for 32 x 32 images: four 3 x 3 convolutions, max pooling after each pair, a hidden layer.

    Batch normalisation and ReLU follow every layer.
    """

    features = 256

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inner = channels
        for outer, pooled in ((64, False), (64, True), (128, False), (128, True)):
            layers += [nn.Conv2d(inner, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] * pooled
            inner = outer
        hidden = nn.Linear(inner * (size // 4) ** 2, self.features, bias=False)
        self.layers = nn.Sequential(*layers, nn.Flatten(), hidden, nn.BatchNorm1d(self.features), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, size, size) -> (n, 256)."""
        features: Tensor = self.layers(images)
        return features


class _Residual(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inner, outer, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outer),
            nn.ReLU(),
            nn.Conv2d(outer, outer, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outer),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 in its form for 32 x 32 images: a 3 x 3 stem without pooling, four stages of two blocks."""

    features = 512

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(channels, 64, 3, 1, 1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        ]
        inner = 64
        for outer, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            layers += [_Residual(inner, outer, stride), _Residual(outer, outer, 1)]
            inner = outer
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, size, size) -> (n, 512)."""
        features: Tensor = self.layers(images)
        return features


def trunk(shape: tuple[int, ...]) -> TwoLayerConv | ResNet18:
    """The paper's network for images of ``shape`` (channels, height, width)."""
    return ResNet18(shape[0]) if shape[0] == 3 else TwoLayerConv(shape[0], shape[1])
