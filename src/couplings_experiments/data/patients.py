"""scikit-learn's diabetes data: 442 patients, ten measurements, and how far the disease had got a year later.

The test patients are a 30 % drawn once and for all with seed 0. Only the others are divided anew by each seed into
training and validation, 5 to 2. No patient is ever in two parts. Measurements are scaled by the training patients' mean
and deviation; targets stay in the data's own units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Some patients: measurements (n, 10), progression (n,), and which ones of the data they are (n,)."""

    features: Tensor
    targets: Tensor
    patients: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> Group:
        """The same on ``device``."""
        return Group(self.features.to(device), self.targets.to(device), self.patients.to(device))


@dataclass(frozen=True)
class Patients:
    """One seed's division."""

    train: Group
    validation: Group
    test: Group

    @property
    def sizes(self) -> dict[str, int]:
        """Patients in each part."""
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}

    def to(self, device: torch.device) -> Patients:
        """The same on ``device``."""
        return Patients(self.train.to(device), self.validation.to(device), self.test.to(device))


def load_patients(seed: int) -> Patients:
    """Read the data and divide it by ``seed``."""
    from sklearn.datasets import load_diabetes

    found = load_diabetes(scaled=False)
    order = np.random.default_rng(0).permutation(len(found.target))
    tested = round(0.3 * len(order))
    test, rest = order[:tested], order[tested:]
    rest = np.random.default_rng([seed, 1]).permutation(rest)
    held = round(2 / 7 * len(rest))
    parts = rest[held:], rest[:held], test
    known = found.data[parts[0]]
    mean, deviation = known.mean(0), known.std(0)
    groups = [
        Group(
            torch.from_numpy((found.data[part] - mean) / deviation).float(),
            torch.from_numpy(found.target[part]).float(),
            torch.from_numpy(part),
        )
        for part in parts
    ]
    return Patients(*groups)
