"""Two encoders that map the two halves of an image into one space, and a start from which nothing can be learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Of an encoder: units of its two hidden layers, and the dimension of what it gives."""

    hidden: int = 128
    width: int = 32


class TwoEncoders(nn.Module):
    """An encoder for each half, and what the loss learns of its own: temperature and bias.

    Args:
        inputs: pixels of a half.
        shape: see `Shape`.
        learned: first values of what is learned; a temperature is kept by its logarithm.
    """

    def __init__(self, inputs: int, shape: Shape, learned: Mapping[str, float]) -> None:
        super().__init__()
        self.left = _encoder(inputs, shape)
        self.right = _encoder(inputs, shape)
        starts = {name: torch.tensor(float(value)) for name, value in learned.items()}
        self.learned = nn.ParameterDict(
            {name: start.log() if name == "temperature" else start for name, start in starts.items()}
        )

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Halves (n, inputs) -> their vectors (n, width), and the loss's own parameters."""
        learned = {
            name: value.exp() if name == "temperature" else value for name, value in self.learned.items()
        }
        return self.left(left), self.right(right), learned


def collapse(model: TwoEncoders) -> None:
    """Make every image's vector the same, bit for bit: last layers with weight 0 and one constant as bias.

    The constant is as large as a bias is at torch's own start.
    """
    for encoder in (model.left, model.right):
        last = encoder[-1]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.constant_(last.bias, last.in_features**-0.5)  # type: ignore[arg-type, operator]


def halves(images: Tensor) -> tuple[Tensor, Tensor]:
    """Left and right half of images (n, channels, height, width), as rows of pixels."""
    middle = images.shape[-1] // 2
    return images[..., :middle].flatten(1), images[..., -middle:].flatten(1)


def _encoder(inputs: int, shape: Shape) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, shape.hidden),
        nn.ReLU(),
        nn.Linear(shape.hidden, shape.hidden),
        nn.ReLU(),
        nn.Linear(shape.hidden, shape.width),
    )
