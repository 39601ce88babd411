"""From files to tensors: one honest split into train, validation and test, the same code for every set.

The test images are fixed once and for all: the official test set, or for digits a stratified 30 % drawn with seed 0.
Only the remaining images are divided anew by each seed, stratified, into train and validation. Settings are chosen on
validation images, which therefore never are test images of any seed; the test set is looked at once per trained model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from couplings_experiments.data.cifar import read_batch
from couplings_experiments.data.idx import read_idx
from couplings_experiments.errors import UserError


@dataclass(frozen=True)
class Split:
    """Images (n, channels, height, width), float32, and labels (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        """The same on ``device``."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """One seed's division of a data set, scaled by the mean and deviation of its training images."""

    name: str
    train: Split
    validation: Split
    test: Split

    @property
    def classes(self) -> int:
        """How many labels there are."""
        return int(self.train.labels.max()) + 1

    @property
    def sizes(self) -> dict[str, int]:
        """Images in each part."""
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}

    def to(self, device: torch.device) -> Dataset:
        """The same on ``device``."""
        return replace(
            self,
            train=self.train.to(device),
            validation=self.validation.to(device),
            test=self.test.to(device),
        )


_Raw = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]
_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def load(name: str, data_dir: Path | None, seed: int, limit: int | None = None) -> Dataset:
    """Read ``name`` and divide it by ``seed``.

    Args:
        name: one of `DATASETS`.
        data_dir: where the files are; not needed for digits. Nothing is ever downloaded.
        seed: decides train against validation, never the test images.
        limit: keep at most so many training images, and a fifth and a half of it for validation and test.

    Raises:
        UserError: an unknown name, missing files, or files that are not what they should be.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: expected one of {', '.join(DATASETS)}.")
    reader, scale, validation_share = DATASETS[name]
    try:
        rest, test = reader(name, data_dir)
    except OSError as error:
        raise UserError(
            f"{name}: {error.filename} cannot be read ({error.strerror}). Make it readable, or change --data-dir."
        ) from None
    kept, held = _divide(rest[1], validation_share, seed)
    cut = (
        [len(kept), len(held), len(test[1])]
        if limit is None
        else [limit, max(limit // 5, 1), max(limit // 2, 1)]
    )
    parts = [
        (rest[0][kept][: cut[0]], rest[1][kept][: cut[0]]),
        (rest[0][held][: cut[1]], rest[1][held][: cut[1]]),
        (test[0][: cut[2]], test[1][: cut[2]]),
    ]
    pixels = torch.from_numpy(parts[0][0].astype(np.float32) / scale)
    mean = pixels.mean((0, 2, 3), keepdim=True)
    deviation = pixels.std((0, 2, 3), keepdim=True)
    splits = [
        Split(
            (torch.from_numpy(images.astype(np.float32) / scale) - mean) / deviation, torch.from_numpy(labels)
        )
        for images, labels in parts
    ]
    return Dataset(name, *splits)


def _divide(
    labels: npt.NDArray[np.int64], share: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices of a stratified division, ``share`` of each class to the second part, both in random order."""
    random = np.random.default_rng(seed)
    first, second = [], []
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        count = round(share * len(members))
        second.append(members[:count])
        first.append(members[count:])
    return random.permutation(np.concatenate(first)), random.permutation(np.concatenate(second))


def _digits(name: str, data_dir: Path | None) -> tuple[_Raw, _Raw]:
    from sklearn.datasets import load_digits

    found = load_digits()
    images, labels = found.images[:, None].astype(np.uint8), found.target.astype(np.int64)
    rest, test = _divide(labels, 0.3, seed=0)
    return (images[rest], labels[rest]), (images[test], labels[test])


def _mnist(name: str, data_dir: Path | None) -> tuple[_Raw, _Raw]:
    inner = {"mnist": ("mnist", "MNIST/raw"), "fashion-mnist": ("fashion-mnist", "FashionMNIST/raw")}[name]
    folder = _needed(name, data_dir)
    places = [folder, *(folder / place for place in inner)]
    read = []
    for file, dimensions in zip(_IDX_FILES, (3, 1, 3, 1), strict=True):
        # unpacked from other archives than the original ones, the names have a dot before idx
        names = [
            written + ending for written in (file, file.replace("-idx", ".idx")) for ending in ("", ".gz")
        ]
        path = next((place / n for place in places for n in names if (place / n).is_file()), None)
        if path is None:
            raise _absent(name, f"{file} (or {file}.gz)", places)
        read.append(read_idx(path, dimensions))
    for images, labels in ((read[0], read[1]), (read[2], read[3])):
        if len(images) != len(labels) or images.shape[1:] != (28, 28) or labels.max(initial=0) > 9:
            raise UserError(
                f"{name}: expected 28 x 28 images with as many labels 0..9, got images {images.shape} and "
                f"{len(labels)} labels up to {labels.max(initial=0)}. Fetch the files again."
            )
    train, test = ((read[i][:, None], read[i + 1].astype(np.int64)) for i in (0, 2))
    return train, test


def _cifar(name: str, data_dir: Path | None) -> tuple[_Raw, _Raw]:
    folder = _needed(name, data_dir)
    places = [folder, folder / "cifar-10-batches-py"]
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    place = _place(name, files, places)
    read = [read_batch(place / file) for file in files]
    train = (
        np.concatenate([images for images, _ in read[:5]]),
        np.concatenate([labels for _, labels in read[:5]]),
    )
    return train, read[5]


def _cifar100(name: str, data_dir: Path | None) -> tuple[_Raw, _Raw]:
    folder = _needed(name, data_dir)
    places = [folder, folder / "cifar-100-python"]
    place = _place(name, ["train", "test"], places)
    train, test = (
        read_batch(place / file, "fine_labels", 100, most)
        for file, most in (("train", 50_000), ("test", 10_000))
    )
    return train, test


def _needed(name: str, data_dir: Path | None) -> Path:
    if data_dir is None:
        raise UserError(
            f"--dataset {name} needs --data-dir: the data set comes with no package and is never downloaded. "
            f"{_REMEDIES[name]}, then say where with --data-dir."
        )
    if not data_dir.is_dir():
        what = "is a file, not a directory" if data_dir.exists() else "does not exist"
        raise UserError(f"--data-dir {data_dir} {what}. {_REMEDIES[name]}, or change --data-dir.")
    return data_dir


def _place(name: str, files: list[str], places: list[Path]) -> Path:
    """The one of ``places`` that has all ``files``."""
    place = next((place for place in places if (place / files[0]).is_file()), None)
    if place is None:
        raise _absent(name, files[0], places)
    missing = [file for file in files if not (place / file).is_file()]
    if missing:
        raise UserError(
            f"{name}: {', '.join(missing)} not found in {place}, where {files[0]} is. {_REMEDIES[name]}."
        )
    return place


def _absent(name: str, wanted: str, places: list[Path]) -> UserError:
    """Says what was looked for, where, and what is there instead: often an archive that is not unpacked."""
    seen = sorted(path.name for place in places if place.is_dir() for path in place.iterdir())
    more = f" and {len(seen) - _SHOWN} more" if len(seen) > _SHOWN else ""
    there = f"There is only: {', '.join(seen[:_SHOWN])}{more}" if seen else "There is nothing"
    return UserError(
        f"{name}: {wanted} not found. Looked in {', '.join(map(str, places))}. {there}. "
        f"{_REMEDIES[name]}, or change --data-dir."
    )


_SHOWN = 5  # names of what is found instead
_REMEDIES = {
    "mnist": "Put MNIST's four IDX files there, plain or .gz (format and files: https://yann.lecun.com/exdb/mnist/)",
    "fashion-mnist": "Put Fashion-MNIST's four IDX files there, plain or .gz (format and files: "
    "https://github.com/zalandoresearch/fashion-mnist)",
    "cifar10": "Unpack CIFAR-10's python version there (format and files: "
    "https://www.cs.toronto.edu/~kriz/cifar.html)",
    "cifar100": "Unpack CIFAR-100's python version there (format and files: "
    "https://www.cs.toronto.edu/~kriz/cifar.html)",
}


DATASETS: dict[str, tuple[Callable[[str, Path | None], tuple[_Raw, _Raw]], float, float]] = {
    # reader, largest pixel value, share of the images outside the test set that validate
    "digits": (_digits, 16.0, 2 / 7),
    "mnist": (_mnist, 255.0, 1 / 6),
    "fashion-mnist": (_mnist, 255.0, 1 / 6),
    "cifar10": (_cifar, 255.0, 1 / 10),
    "cifar100": (_cifar100, 255.0, 1 / 10),
}
