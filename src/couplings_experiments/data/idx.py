"""IDX files, the format of MNIST and Fashion-MNIST, plain or gzipped, checked before they are believed."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from couplings_experiments.errors import UserError

_LIMIT = 1 << 28  # bytes of pixels; MNIST's training images are 47 million


def read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """The bytes in ``path`` as an array with the shape its header states.

    Raises:
        UserError: not IDX, not unsigned bytes, another number of dimensions, or a length that does not fit the header.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions or header[:4] != bytes([0, 0, 8, dimensions]):
                raise UserError(
                    f"{path} is not an IDX file of unsigned bytes with {dimensions} dimensions: expected it to "
                    f"begin with 000008{dimensions:02x}, got {header[:4].hex() or 'nothing'}. Fetch it again."
                )
            shape = struct.unpack(f">{dimensions}I", header[4:])
            size = math.prod(shape)
            if size > _LIMIT:
                raise UserError(
                    f"{path} is damaged: its header states {size} bytes of data, more than any set known here "
                    "has. Fetch it again."
                )
            content = file.read(size + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path} is cut short, or not gzip as its name says ({error}). Fetch it again."
        ) from None
    if len(content) != size:
        came = f"only {len(content)} bytes" if len(content) < size else "more bytes"
        raise UserError(
            f"{path} is damaged: its header states {size} bytes of data, {came} came. Fetch it again."
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)
