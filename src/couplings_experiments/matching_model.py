"""A small attentional matcher: keypoints of two images -> a score for every pair, and one for staying unmatched.

After SuperGlue (Sarlin et al., CVPR 2020) and LightGlue (Lindenberger et al., ICCV 2023), made to learn from a dozen
photographs. Its scores, and its attention between the images, begin as the similarity of the descriptors. Its states
never see the descriptors themselves, which would be learned by heart. They see how clearly a keypoint is like one of
the other image, and where things are: each keypoint looks at the others of its image from its own place, scale and
direction, sees whether they moved to the other image as it did itself, and asks them where it belongs there.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from couplings_experiments.data.photographs import Batch

BLOCKED = -1e4  # to a softmax that is 0; finite, for rows where everything is padding
SHARPNESS = 50.0  # what a similarity of 1 scores at the start
LIKENESS = 0.8  # a similarity that says nothing either way
UNIT = 10.0  # a keypoint's own unit of length, in its scales
_SEEN = 9  # numbers that a keypoint sees of another one of its image
_TINY = 1e-6  # squared length below which a root has no gradient to speak of


class Frames(NamedTuple):
    """Where keypoints are: places (b, n, 2) in pixels, logarithms of scales (b, n), unit directions (b, n, 2)."""

    places: Tensor
    scales: Tensor
    directions: Tensor

    def averaged(self, weights: Tensor) -> Frames:
        """Mean frames under ``weights`` (b, m, n)."""
        mean = weights @ torch.cat([self.places, self.scales[..., None], self.directions], -1)
        return Frames(mean[..., :2], mean[..., 2], nn.functional.normalize(mean[..., 3:], dim=-1))

    def offsets(self) -> tuple[Tensor, Tensor]:
        """From each keypoint to each other one, along and across its own direction, in its own unit: (b, n, n) each."""
        (here_x, here_y), (x, y) = self.places.unbind(-1), self.directions.unbind(-1)
        right, down = here_x[:, None] - here_x[..., None], here_y[:, None] - here_y[..., None]
        unit = UNIT * self.scales.exp()
        x, y = (x / unit)[..., None], (y / unit)[..., None]
        return right * x + down * y, down * x - right * y


class Matcher(nn.Module):
    """Layers of attention between and within two sets of keypoints.

    Args:
        width: of a keypoint's state.
        layers: each is attention between the images, then within them.
        heads: of every attention.
        likeness: the dustbin begins with the score of this similarity.
    """

    def __init__(self, width: int, layers: int, heads: int, likeness: float = LIKENESS) -> None:
        super().__init__()
        self.start = nn.Sequential(nn.Linear(7, width), nn.GELU(), nn.Linear(width, width))
        self.between = nn.ModuleList(Attention(width, heads) for _ in range(layers))
        self.within = nn.ModuleList(Surroundings(width, heads) for _ in range(layers))
        self.final = nn.Linear(width, width)
        self.unmatched = nn.Linear(width, 1)
        with torch.no_grad():  # at the start the states add little to the scores, and nothing to the dustbins
            self.final.weight.mul_(0.1)
            self.unmatched.weight.zero_()
            self.unmatched.bias.zero_()
        self.sharpness = nn.Parameter(torch.tensor(SHARPNESS).log())
        self.likeness = nn.Parameter(torch.tensor(likeness))
        self.pull = nn.Parameter(torch.full((layers, heads), 0.2).log())
        self.reach = nn.Parameter(torch.full((layers, heads), 10.0).log())

    def scalars(self) -> list[nn.Parameter]:
        """The parameters that are single scales: they want a learning rate of their own."""
        return [self.sharpness, self.likeness, self.pull, self.reach]

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Scores (b, n, n) of the pairs, and the dustbin scores (b, n) of either image's keypoints."""
        count = len(batch.rows)

        def joined(sides: tuple[Tensor, Tensor]) -> Tensor:
            return torch.cat(sides)  # first all first images, then all second ones

        def swapped(both: Tensor) -> Tensor:
            return both.roll(count, 0)

        descriptors, mask = joined(batch.descriptors), joined(batch.masks)
        frames = Frames(
            joined(batch.points), joined(batch.scales).clamp_min(1).log(), joined(batch.directions)
        )
        others = Frames(swapped(frames.places), swapped(frames.scales), swapped(frames.directions))
        blocked = torch.where(mask, 0.0, BLOCKED)[:, None, None, :]
        alike = descriptors @ swapped(descriptors).mT
        states = self.start(_standing(frames, joined(batch.sizes), alike, swapped(mask)))
        scores = self.sharpness.exp() * alike
        offsets, (other_x, other_y) = frames.offsets(), others.places[:, None, None].unbind(-1)
        geometry = _geometry(frames, *offsets)
        for layer, (between, within) in enumerate(zip(self.between, self.within, strict=True)):
            states, weights = between(states, swapped(states), scores[:, None] + swapped(blocked))
            partners = others.averaged(weights.mean(1))
            seen = torch.cat([geometry, _movement(*offsets, *partners.offsets())], -1)
            states, places = within(states, blocked, seen, _votes(*offsets, partners))
            x, y = places[..., None].unbind(-2)
            reach, pull = (value[layer].exp()[:, None, None] for value in (self.reach, self.pull))
            far = ((x - other_x) / reach).square() + ((y - other_y) / reach).square()
            scores = scores - (pull * far.log1p()).sum(1)
        final = self.final(states)
        scores = (scores[:count] + scores[count:].mT) / 2 + final[:count] @ final[count:].mT
        bins = self.sharpness.exp() * self.likeness + self.unmatched(states).squeeze(-1)
        return scores, (bins[:count], bins[count:])


class Attention(nn.Module):
    """States that look at others and take in what they saw: multi-head attention, then a perceptron.

    Args:
        width: of the states.
        heads: divide the width.
        seen: how many more numbers the perceptron is given.
    """

    def __init__(self, width: int, heads: int, seen: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.asks = nn.Linear(width, width)
        self.offers = nn.Linear(width, 2 * width)
        self.takes = nn.Sequential(
            nn.Linear(2 * width + seen, 2 * width),
            nn.LayerNorm(2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
        )

    def forward(self, states: Tensor, others: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """States (b, n, width) look at others (b, m, width); bias (b, heads or 1, n or 1, m) adds to the logits."""
        weights, values = self.look(states, others, bias)
        return states + self.takes(torch.cat([states, values], -1)), weights

    def look(self, states: Tensor, others: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The attention (b, heads, n, m), and the values under it (b, n, width)."""
        asked = self._split(self.asks(states))
        keys, values = (self._split(part) for part in self.offers(others).chunk(2, -1))
        weights = (asked @ keys.mT / math.sqrt(keys.shape[-1]) + bias).softmax(-1)
        return weights, (weights @ values).transpose(1, 2).flatten(2)

    def _split(self, states: Tensor) -> Tensor:
        count, keypoints, width = states.shape
        return states.reshape(count, keypoints, self.heads, width // self.heads).transpose(1, 2)


class Surroundings(Attention):
    """Attention within an image: what is seen of a keypoint draws attention to it, is taken in, and it has a vote."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, heads * _SEEN)
        self.draws = nn.Linear(_SEEN, heads)

    def forward(  # type: ignore[override]
        self, states: Tensor, blocked: Tensor, seen: Tensor, votes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The new states (b, n, width), and for each head where a keypoint belongs (b, heads, n, 2).

        Args:
            states: (b, n, width).
            blocked: bias of padding, (b, 1, 1, n).
            seen: what each keypoint sees of each other one, (b, n, n, 9).
            votes: the place in the other image that each keypoint is given by each other one, (b, n, n, 2).
        """
        weights, values = self.look(states, states, self.draws(seen).permute(0, 3, 1, 2) + blocked)
        met = weights.transpose(1, 2) @ torch.cat([seen, votes], -1)
        taken = self.takes(torch.cat([states, values, met[..., :_SEEN].flatten(2)], -1))
        return states + taken, met[..., _SEEN:].transpose(1, 2)


def _standing(frames: Frames, sizes: Tensor, alike: Tensor, mask: Tensor) -> Tensor:
    """What a keypoint knows of itself, (b, n, 7): its frame in its image, its best similarity, and the lead of it."""
    centred = frames.places - sizes[:, None] / 2
    best = nn.functional.pad(alike.masked_fill(~mask[:, None], 0), (0, 2)).topk(2).values
    clear = torch.stack([best[..., 0] - LIKENESS, best[..., 0] - best[..., 1]], -1)
    longest = sizes.max(-1).values[:, None, None]
    return torch.cat([centred / longest, frames.scales[..., None], frames.directions, 10 * clear], -1)


def _geometry(frames: Frames, along: Tensor, across: Tensor) -> Tensor:
    """How each keypoint sees each other one, (b, n, n, 6): the same if the image is moved, turned or enlarged."""
    away = (along.square() + across.square() + _TINY).sqrt()
    drawn = away.log1p() / away  # far ones drawn nearer
    larger = frames.scales[:, None] - frames.scales[..., None]
    turned = frames.directions @ frames.directions.mT
    parts = [along * drawn, across * drawn, away.log1p(), torch.exp(-away.square()), larger, turned]
    return torch.stack(parts, -1)


def _movement(along: Tensor, across: Tensor, along_there: Tensor, across_there: Tensor) -> Tensor:
    """How far from where it would be had it moved as one did oneself is each other's partner, (b, n, n, 3)."""
    gap = (along - along_there).square() + (across - across_there).square() + _TINY
    share = gap / ((along.square() + across.square() + _TINY).sqrt() + 1).square()
    return torch.stack([gap.sqrt().log1p(), torch.exp(-4 * share), torch.exp(-64 * share)], -1)


def _votes(along: Tensor, across: Tensor, partners: Frames) -> Tensor:
    """Where each other keypoint, from its partner's frame, puts one, (b, n, n, 2): in row i the votes on i."""
    unit = UNIT * partners.scales.exp()
    x, y = ((part * unit)[:, None] for part in partners.directions.unbind(-1))
    along, across = along.mT, across.mT  # of i, as k sees it
    place_x, place_y = partners.places[:, None].unbind(-1)
    return torch.stack([place_x + along * x - across * y, place_y + along * y + across * x], -1)
