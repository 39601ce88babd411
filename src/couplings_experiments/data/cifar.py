"""The python pickles of CIFAR-10 and CIFAR-100, read without giving a pickle the power to run anything.

A pickle is a program. The unpickler here resolves exactly the names that an array of bytes needs, and resolves them
to small classes of this file that check what they are given; numpy's own reconstruction never sees the data.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from couplings_experiments.errors import UserError

_LIMIT = 4000  # bytes a file may have for each image it ought to hold; CIFAR's have 3100


class _Bytes:
    """Stands for numpy.ndarray: takes an array's pickled state if it is plain unsigned bytes."""

    array: npt.NDArray[np.uint8]

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("an array in an unknown form")
        _, shape, dtype, fortran, content = state
        plain = isinstance(dtype, _Dtype) and fortran is False and isinstance(content, bytes)
        sizes = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
        if not plain or not sizes or math.prod(shape) != len(content):
            raise pickle.UnpicklingError("an array that is not plain unsigned bytes")
        self.array = np.frombuffer(content, dtype=np.uint8).reshape(shape)


class _Dtype:
    """Stands for numpy.dtype, of unsigned bytes."""

    def __init__(self, code: object, *_: object) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of {code!r}, not of unsigned bytes")

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment say nothing about single bytes."""


def _reconstruct(*_: object) -> _Bytes:
    return _Bytes()


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """Stands for _codecs.encode, which Python 3 uses to store bytes in old pickles."""
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("bytes in an unknown encoding")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Bytes,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which a data file has no use for"
            ) from None


def read_batch(
    path: Path, labels: str = "labels", classes: int = 10, most: int = 10_000
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images (n, 3, 32, 32) and labels (n,) of one file.

    Args:
        path: the file.
        labels: the labels' name in it: "labels" in CIFAR-10, "fine_labels" in CIFAR-100.
        classes: how many labels there are.
        most: how many images the file may have.

    Raises:
        UserError: a pickle that asks for anything but an array of bytes, a truncated file, or another layout.
    """
    if path.stat().st_size > _LIMIT * most:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes, more than any file of CIFAR-{classes}. Fetch it again."
        )
    try:
        content = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    # A damaged pickle may end in any of these: the format has no checksum.
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
        MemoryError,
        OverflowError,
        UnicodeError,
        RecursionError,
    ) as error:
        raise UserError(
            f"{path} was refused, and nothing in it was run: expected a pickle of arrays of bytes, got "
            f"something else ({str(error) or type(error).__name__}). Fetch it again."
        ) from None
    images, found = (
        (content.get(key.encode(), content.get(key)) if isinstance(content, dict) else None)
        for key in ("data", labels)
    )
    if (
        not isinstance(images, _Bytes)
        or not hasattr(images, "array")
        or images.array.ndim != 2
        or images.array.shape[1] != 3072
        or not isinstance(found, list)
        or len(found) != len(images.array)
        or not all(type(label) is int and 0 <= label < classes for label in found)
    ):
        raise UserError(
            f"{path} is not a file of CIFAR-{classes}: expected data (n, 3072) and n {labels} 0..{classes - 1}. "
            "Fetch it again."
        )
    return images.array.reshape(-1, 3, 32, 32), np.asarray(found, dtype=np.int64)
