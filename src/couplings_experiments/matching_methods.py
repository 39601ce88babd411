"""Matching two sets of keypoints: methods that learn nothing, how a plan is read, and what is measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.measure import ransac
from skimage.transform import ProjectiveTransform
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

import couplings as cp
from couplings_experiments.data.photographs import NEAR, SIZE, Array, Batch, Pair, collate, project

THRESHOLDS = tuple(round(0.02 * i, 2) for i in range(50))  # least confidence of a match
AUC = (3, 5, 10)  # pixels


@dataclass(frozen=True)
class Found:
    """What a method found in a pair: for each first keypoint a second one or -1, and how sure it is."""

    matches: NDArray[np.int64]
    confidence: Array

    def above(self, threshold: float) -> NDArray[np.int64]:
        """The matches that are surer than ``threshold``."""
        return np.where(self.confidence > threshold, self.matches, -1)


@dataclass(frozen=True)
class Measure:
    """All pairs of a set together.

    Attributes:
        precision: share of the found matches that lead to within `NEAR` pixels of the truth.
        recall: share of the keypoints with a true match whose found match is right.
        f1: harmonic mean of the two.
        score: right matches as a share of the first image's keypoints (matching score).
        auc: for 3, 5 and 10 pixels, the area under the curve of how many pairs' homography is right to within so many
            pixels at the corners; empty where there is no homography.
    """

    precision: float
    recall: float
    f1: float
    score: float
    auc: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "auc": list(self.auc)}


Method = Callable[[Pair], Found]


def nearest(pair: Pair) -> Found:
    """Mutual nearest neighbours of the descriptors; as sure as the second nearest is farther than the nearest.

    The confidence is 1 minus the ratio of both distances: Lowe's ratio test at 0.8 keeps what is above 0.2.
    """
    if len(pair.first) < 2 or len(pair.second) < 2:
        return Found(np.full(len(pair.first), -1), np.zeros(len(pair.first)))
    here, there = pair.first.descriptors, pair.second.descriptors
    distance, index = NearestNeighbors(n_neighbors=2, algorithm="brute").fit(there).kneighbors(here)
    back = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(here).kneighbors(there)[1][:, 0]
    matches = np.where(back[index[:, 0]] == np.arange(len(here)), index[:, 0], -1)
    first, second = distance.T
    ratio = np.where(
        second > 0, first / np.where(second > 0, second, 1), 1
    )  # two that are equal to it: no telling
    return Found(matches, 1 - ratio)


def descriptor_method(method: str, sharpness: float, likeness: float) -> Method:
    """A coupling of the descriptors' similarities times ``sharpness``, nothing learned; dustbins at ``likeness``."""

    def found(pair: Pair) -> Found:
        batch = collate([pair])
        scores = sharpness * (batch.descriptors[0] @ batch.descriptors[1].mT)
        return read(couple(scores, torch.tensor(sharpness * likeness), batch, method, None), [pair])[0]

    return found


def couple(
    scores: Tensor, dustbin: Tensor | tuple[Tensor, Tensor], batch: Batch, method: str, sweeps: int | None
) -> Tensor:
    """The logarithm of the plan with dustbins, (b, n + 1, n + 1).

    A pair of dustbins adds up: row i and column j are worth matching above r_i + c_j. The network's are scores of one
    keypoint, so half of their mean is taken off either side: equal ones then count once.
    """
    if isinstance(dustbin, tuple) and method == "transport":
        means = [
            torch.where(mask, bins, 0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
            for bins, mask in zip(dustbin, batch.masks, strict=True)
        ]
        half = (means[0] + means[1]) / 4
        dustbin = (dustbin[0] - half, dustbin[1] - half)
    coupling = cp.match_with_dustbin(
        scores,
        dustbin,
        row_mask=batch.masks[0],
        column_mask=batch.masks[1],
        method=method,
        iterations=sweeps,
    )
    return coupling.log_plan()


def row_error(log_plan: Tensor, mask: Tensor) -> float:
    """How far the sum of a keypoint's row is from 1, at most; ``mask`` (b, n) says which rows are keypoints."""
    sums = log_plan[..., :-1, :].detach().double().exp().sum(-1)
    return float((sums - 1).abs().masked_fill(~mask, 0).max())


def read(log_plan: Tensor, pairs: Sequence[Pair]) -> list[Found]:
    """The mutually best matches of each pair, whatever their confidence."""
    matches, confidence = (part.cpu().numpy() for part in cp.mutual_matches(log_plan.detach(), 0.0))
    return [
        Found(matches[i, : len(pair.first)], confidence[i, : len(pair.first)].astype(float))
        for i, pair in enumerate(pairs)
    ]


def right(matches: NDArray[np.int64], pair: Pair) -> NDArray[np.bool_]:
    """Which matches of the first keypoints lead to within `NEAR` pixels of the truth."""
    found = np.flatnonzero(matches >= 0)
    out = np.zeros(len(matches), dtype=bool)
    out[found] = pair.distance[found, matches[found]] <= NEAR  # False where the truth is unknown
    return out


def measure(
    found: Sequence[Found], pairs: Sequence[Pair], threshold: float, *, homographies: bool = True
) -> Measure:
    """What the matches surer than ``threshold`` are worth."""
    chosen = keypoints = correct = matchable = recalled = 0
    errors = []
    for result, pair in zip(found, pairs, strict=True):
        matches = result.above(threshold)
        good = right(matches, pair)
        known: NDArray[np.bool_] = np.asarray(~np.isnan(pair.distance).any(axis=1))
        chosen += int((known & (matches >= 0)).sum())
        keypoints += int(known.sum())
        correct += int(good.sum())
        matchable += int((pair.rows >= 0).sum())
        recalled += int((good & (pair.rows >= 0)).sum())
        if homographies and pair.homography is not None:
            errors.append(corner_error(matches, pair))
    precision, recall = correct / max(chosen, 1), recalled / max(matchable, 1)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return Measure(precision, recall, f1, correct / max(keypoints, 1), area_under(errors) if errors else ())


def choose_threshold(found: Sequence[Found], pairs: Sequence[Pair]) -> tuple[float, float]:
    """The threshold with the best F1, the first of equal ones, and that F1."""
    scores = [measure(found, pairs, t, homographies=False).f1 for t in THRESHOLDS]
    best = int(np.argmax(scores))
    return THRESHOLDS[best], scores[best]


def corner_error(matches: NDArray[np.int64], pair: Pair) -> float:
    """Mean distance, in pixels, between where the estimated and the true homography take the image's corners.

    The estimate is RANSAC's from the matches; infinite where there is none.
    """
    here = np.flatnonzero(matches >= 0)
    if len(here) < 4 or pair.homography is None:
        return float("inf")
    places = pair.first.points[here], pair.second.points[matches[here]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "no inliers": there is no estimate then, which is looked at
        estimate, _ = ransac(
            places, ProjectiveTransform, 4, NEAR, max_trials=300, stop_probability=0.999, rng=0
        )
    if (
        not estimate or not np.isfinite(estimate.params).all()
    ):  # None or, from scikit-image 0.26, a false object
        return float("inf")
    height, width = SIZE
    corners = np.array([[0.0, 0.0], [width, 0.0], [width, height], [0.0, height]])
    gap = project(np.asarray(estimate.params), corners) - project(pair.homography, corners)
    error = float(np.linalg.norm(gap, axis=-1).mean())
    return error if np.isfinite(error) else float("inf")


def area_under(errors: Sequence[float]) -> tuple[float, ...]:
    """For each threshold of `AUC`, the area under the share of errors below t, t from 0 to the threshold, over it."""
    return tuple(float(np.mean([max(0.0, 1 - error / most) for error in errors])) for most in AUC)
