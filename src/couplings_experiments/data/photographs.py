"""Keypoints from real photographs, and pairs of views whose true matches are known.

The photographs lie inside the installed packages: scikit-image's (its own directory, never its download cache) and
scikit-learn's. Training, validation and test photographs are different photographs. Two views of one photograph are
related by a known homography; scikit-image's stereo pair (Middlebury 2014, "Motorcycle") comes with measured disparity
and is for testing only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage import data as shipped
from skimage.color import rgb2gray
from skimage.feature import SIFT
from skimage.filters import gaussian
from skimage.transform import ProjectiveTransform, rescale, warp
from sklearn.datasets import load_sample_image
from torch import Tensor

Array = NDArray[np.float64]

PHOTOGRAPHS = {
    "train": (
        "brick",
        "coins",
        "flower",
        "grass",
        "gravel",
        "hubble_deep_field",
        "immunohistochemistry",
        "moon",
        "page",
        "retina",
        "rocket",
    ),
    "validation": ("camera", "coffee"),
    "test": ("astronaut", "chelsea", "china"),
}
SIZE = (240, 320)  # of a view: height, width
NEAR = 3.0  # pixels: so near lies a true match
FAR = 5.0  # pixels: farther than this from all others, a keypoint is without a match; between, nobody knows


@dataclass(frozen=True)
class Features:
    """Keypoints of one image.

    Attributes:
        points: x and y in pixels, (n, 2).
        scales: standard deviation, in pixels, of the blur at which the keypoint was found, (n,).
        directions: unit vector, x and y, of the dominant gradient, (n, 2).
        descriptors: square roots of SIFT's histograms, of unit length, (n, 128).
    """

    points: Array
    scales: Array
    directions: Array
    descriptors: Array

    def __len__(self) -> int:
        return len(self.points)


@dataclass(frozen=True)
class View:
    """A photograph seen from somewhere: what is seen, where the photograph's pixels went, and the keypoints."""

    image: Array
    homography: Array
    features: Features


@dataclass(frozen=True)
class Pair:
    """Two images of one thing.

    Attributes:
        name: of the photograph.
        first, second: the keypoints.
        distance: pixels between where a first keypoint belongs in the second image and the second image's keypoints,
            (n, m); NaN in the rows of keypoints of which nobody knows.
        rows: index of each first keypoint's match, -1 where it has none, -2 where nobody knows, (n,).
        columns: the same for the second keypoints, (m,).
        homography: from the first image to the second, where there is one.
        images: both.
    """

    name: str
    first: Features
    second: Features
    distance: Array
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    homography: Array | None
    images: tuple[Array, Array]


def load_photograph(name: str) -> Array:
    """The photograph in grey, (height, width) in 0..1, at most 640 pixels long."""
    colours = load_sample_image(f"{name}.jpg") if name in ("china", "flower") else getattr(shipped, name)()
    grey = rgb2gray(colours) if colours.ndim == 3 else colours / 255.0
    smaller = 640 / max(grey.shape)
    found: Array = rescale(grey, smaller, anti_aliasing=True) if smaller < 1 else grey
    # a page must be larger than a view for there to be different views
    larger = max(SIZE[0] * 1.25 / found.shape[0], SIZE[1] * 1.25 / found.shape[1])
    return rescale(found, larger, order=1) if larger > 1 else found


def detect(image: Array, limit: int) -> Features:
    """SIFT keypoints of ``image``, the ``limit`` of largest scale if there are more."""
    finder = SIFT(upsampling=1, c_dog=0.006)  # not enlarged, and weaker keypoints than by default
    try:
        finder.detect_and_extract(image)
    except RuntimeError:  # scikit-image's way to say that there are none
        nothing = np.zeros((0, 2))
        return Features(nothing, np.zeros(0), nothing, np.zeros((0, 128)))
    kept = np.sort(np.argsort(-finder.sigmas, kind="stable")[:limit])
    counts = finder.descriptors[kept].astype(float)
    angles = finder.orientations[kept]
    return Features(
        points=finder.positions[kept][:, ::-1].astype(float),
        scales=finder.sigmas[kept].astype(float),
        directions=np.stack([np.sin(angles), np.cos(angles)], -1),  # scikit-image counts rows first
        descriptors=np.sqrt(counts / np.maximum(counts.sum(-1, keepdims=True), 1.0)),
    )


def draw_homography(shape: tuple[int, ...], draw: np.random.Generator) -> Array:
    """A random homography from a photograph of ``shape`` to a view that shows nothing but photograph."""
    height, width = SIZE
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=float)
    centred = corners - corners.mean(0)
    largest = min(shape[1] / width, shape[0] / height)
    for shrink in 0.97 ** np.arange(200):
        scale = largest * shrink * draw.uniform(0.55, 1.0)
        angle = draw.uniform(-np.pi / 5, np.pi / 5)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        jitter = draw.uniform(-0.14, 0.14, (4, 2)) * SIZE[::-1]
        middle = np.array(shape[1::-1]) * draw.uniform(0.35, 0.65, 2)
        seen = middle + scale * (centred + jitter) @ turn.T
        if (seen >= 0).all() and (seen <= np.array(shape[1::-1]) - 1).all():
            break
    return solve_homography(seen, corners)


def solve_homography(source: Array, target: Array) -> Array:
    """The homography that takes four points to four others."""
    rows = []
    for (x, y), (u, v) in zip(source, target, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    return np.append(np.linalg.solve(np.array(rows), target.reshape(-1)), 1.0).reshape(3, 3)


def draw_view(photograph: Array, draw: np.random.Generator, limit: int) -> View:
    """A random view: a homography, then uneven light, contrast, gamma, blur and noise."""
    homography = draw_homography(photograph.shape, draw)
    seen = warp(photograph, ProjectiveTransform(np.linalg.inv(homography)), output_shape=SIZE, order=1)
    y, x = np.mgrid[-1 : 1 : SIZE[0] * 1j, -1 : 1 : SIZE[1] * 1j]
    light = 1 + draw.uniform(-0.3, 0.3) * x + draw.uniform(-0.3, 0.3) * y
    seen = np.clip(seen * light, 0, 1) ** np.exp(draw.uniform(-0.6, 0.6))
    seen = gaussian(draw.uniform(0.5, 1.0) * seen + draw.uniform(0, 0.2), sigma=draw.uniform(0, 1.2))
    seen = np.clip(seen + draw.uniform(0, 0.04) * draw.standard_normal(SIZE), 0, 1)
    return View(seen, homography, detect(seen, limit))


def project(homography: Array, points: Array) -> Array:
    """Where ``homography`` takes ``points`` (n, 2)."""
    lifted = np.concatenate([points, np.ones((len(points), 1))], 1) @ homography.T
    moved: Array = lifted[:, :2] / lifted[:, 2:]
    return moved


def pair_views(name: str, first: View, second: View) -> Pair:
    """The pair of two views of one photograph."""
    homography = second.homography @ np.linalg.inv(first.homography)
    homography /= homography[2, 2]
    here, there = first.features, second.features
    belongs = project(homography, here.points)
    turned = project(homography, here.points + 0.5 * here.directions) - belongs
    distance = np.linalg.norm(belongs[:, None] - there.points, axis=-1)
    rows, columns = true_matches(distance, turned, there.directions)
    return Pair(name, here, there, distance, rows, columns, homography, (first.image, second.image))


def true_matches(
    distance: Array, turned: Array, directions: Array
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Mutually nearest keypoints within `NEAR` pixels, -1 for those with nothing within `FAR`, -2 for the rest.

    SIFT gives a corner several keypoints if it has several directions: among those at one place the best turned one
    is the nearest.

    Args:
        distance: see `Pair`.
        turned: directions of the first keypoints as they appear in the second image, of any length, (n, 2).
        directions: of the second keypoints, (m, 2).
    """
    known: NDArray[np.bool_] = np.asarray(~np.isnan(distance).any(axis=1))
    size = np.linalg.norm(turned, axis=-1, keepdims=True)
    apart = 1 - (turned / np.where(size > 0, size, 1)) @ directions.T
    cost = np.where(known[:, None] & (distance <= NEAR), distance + apart, np.inf)
    rows = np.where(known, -1, -2)
    columns = np.full(distance.shape[1], -1)
    if distance.size:
        near = np.where(known[:, None], distance, np.inf)
        rows[known & (near.min(1) <= FAR)] = -2
        columns[near.min(0) <= FAR] = -2
        best, back = cost.argmin(1), cost.argmin(0)
        mutual = np.isfinite(cost.min(1)) & (back[best] == np.arange(len(rows)))
        rows[mutual] = best[mutual]
        columns[best[mutual]] = np.flatnonzero(mutual)
    return rows, columns


def draw_views(part: str, count: int, limit: int, seed: int) -> dict[str, list[View]]:
    """``count`` random views of every photograph of ``part``, the same for the same seed."""
    found = {}
    for index, name in enumerate(PHOTOGRAPHS[part]):
        draw = np.random.default_rng([seed, list(PHOTOGRAPHS).index(part), index])
        photograph = load_photograph(name)
        found[name] = [draw_view(photograph, draw, limit) for _ in range(count)]
    return found


def held_pairs(part: str, count: int, limit: int, seed: int) -> list[Pair]:
    """``count`` pairs of every photograph of ``part``; no view is in two pairs."""
    views = draw_views(part, 2 * count, limit, seed)
    return [
        pair_views(name, first, second)
        for name, found in views.items()
        for first, second in zip(found[::2], found[1::2], strict=True)
    ]


@lru_cache(maxsize=1)
def stereo_pairs() -> list[Pair]:
    """The stereo pair with its true disparity: each quarter of the left image with the same quarter of the right one.

    Quarters are about as large as the views that are trained on. What leaves a quarter has no match there. A keypoint
    is of unknown truth where no disparity was measured, and where something nearer hides its place from the right
    camera.
    """
    left, right, disparity = shipped.stereo_motorcycle()
    images = [rgb2gray(image) for image in (left, right)]
    first, second = (detect(image, image.size) for image in images)
    x, y = np.rint(first.points).astype(int).T
    known = visible(disparity.astype(float))[y, x]
    moved = np.stack([np.where(known, disparity[y, x], np.nan), np.zeros(len(first))], -1)
    distance = np.linalg.norm((first.points - moved)[:, None] - second.points, axis=-1)
    height, width = (length // 2 for length in left.shape[:2])
    pairs = []
    for top in (0, height):
        for side in (0, width):
            corner, size = np.array([side, top]), np.array([width, height])
            (mine, here), (yours, there) = (_cut(features, corner, size) for features in (first, second))
            part = distance[np.ix_(mine, yours)]
            rows, columns = true_matches(part, here.directions, there.directions)
            cut = tuple(image[top : top + height, side : side + width] for image in images)
            pairs.append(Pair("motorcycle", here, there, part, rows, columns, None, (cut[0], cut[1])))
    return pairs


def _cut(features: Features, corner: Array, size: Array) -> tuple[NDArray[np.int64], Features]:
    """The keypoints inside a rectangle: which ones, and themselves, seen from its corner."""
    places = features.points - corner
    kept = np.flatnonzero(((places >= 0) & (places < size)).all(1))
    rest = (features.scales[kept], features.directions[kept], features.descriptors[kept])
    return kept, Features(places[kept], *rest)


def visible(disparity: Array) -> NDArray[np.bool_]:
    """Which pixels of the left image the right camera sees: measured, inside, and nothing nearer in the way."""
    height, width = disparity.shape
    known = np.isfinite(disparity)
    y, x = np.nonzero(known)
    amount = disparity[y, x]
    landed = np.rint(x - amount).astype(int)
    inside = landed >= 0
    nearest = np.full((height, width), -np.inf)
    np.maximum.at(nearest, (y[inside], landed[inside]), amount[inside])
    found = np.zeros((height, width), dtype=bool)
    found[y[inside], x[inside]] = amount[inside] >= nearest[y[inside], landed[inside]] - 1
    return found


@dataclass(frozen=True)
class Batch:
    """Pairs padded to the most keypoints: (b, n, ...) for either image; masks are True where there is a keypoint."""

    points: tuple[Tensor, Tensor]
    scales: tuple[Tensor, Tensor]
    directions: tuple[Tensor, Tensor]
    descriptors: tuple[Tensor, Tensor]
    masks: tuple[Tensor, Tensor]
    rows: Tensor
    columns: Tensor
    sizes: tuple[Tensor, Tensor]

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``."""

        def moved(value: Any) -> Any:
            return tuple(map(moved, value)) if isinstance(value, tuple) else value.to(device)

        return Batch(**{name: moved(value) for name, value in vars(self).items()})


def collate(pairs: Sequence[Pair]) -> Batch:
    """Several pairs as one batch; padding is 0, of unknown truth, and masked."""
    both = [[pair.first for pair in pairs], [pair.second for pair in pairs]]

    most = max(len(features) for side in both for features in side)

    def padded(values: list[NDArray[Any]], fill: float = 0.0) -> Tensor:
        found = np.full((len(values), most, *values[0].shape[1:]), fill, dtype=values[0].dtype)
        for row, value in zip(found, values, strict=True):
            row[: len(value)] = value
        tensor = torch.from_numpy(found)
        return tensor.float() if tensor.is_floating_point() else tensor

    def each(name: str) -> tuple[Tensor, Tensor]:
        first, second = (padded([getattr(features, name) for features in side]) for side in both)
        return first, second

    first, second = (padded([np.ones(len(features), dtype=bool) for features in side]) for side in both)
    here, there = (torch.tensor([pair.images[i].shape[::-1] for pair in pairs]).float() for i in (0, 1))
    return Batch(
        points=each("points"),
        scales=each("scales"),
        directions=each("directions"),
        descriptors=each("descriptors"),
        masks=(first, second),
        rows=padded([pair.rows for pair in pairs], -2),
        columns=padded([pair.columns for pair in pairs], -2),
        sizes=(here, there),
    )
