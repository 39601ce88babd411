"""Checkpoints: safetensors only, written atomically, checksummed, the last two kept.

A checkpoint holds everything that the next epoch depends on: parameters and buffers, the optimiser's state, the
schedule, every random number generator, the epoch and the history. Loading never unpickles anything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from couplings_experiments.files import Damaged, sweep, write_atomic

KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """What one epoch leaves behind: named tensors, and plain data that JSON can carry."""

    epoch: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write ``checkpoint`` and drop all but ``KEEP`` up to it; later ones, damaged, are there to be replaced."""
    path = directory / f"epoch-{checkpoint.epoch:05d}.safetensors"
    write_tensors(path, checkpoint.tensors, {"epoch": checkpoint.epoch, **checkpoint.state})
    files = _files(directory)
    for old in files[files.index(path) + KEEP :]:
        old.unlink(missing_ok=True)
    return path


def load_last(directory: Path) -> tuple[Checkpoint | None, list[Path]]:
    """The newest intact checkpoint, and the newer ones that had to be passed over because they are damaged."""
    sweep(directory)
    damaged: list[Path] = []
    for path in _files(directory):
        try:
            tensors, state = read_tensors(path)
        except Damaged:
            damaged.append(path)
        else:
            return Checkpoint(state.pop("epoch"), tensors, state), damaged
    return None, damaged


def clear(directory: Path) -> None:
    """Delete all checkpoints of ``directory``: they are of no use any more."""
    for path in _files(directory):
        path.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """``tensors`` and plain data with a checksum, as safetensors, atomically."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    plain = json.dumps(state, allow_nan=False)
    metadata = {"state": plain, "sha256": fingerprint(stored, plain)}
    write_atomic(path, safetensors.torch.save(stored, metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote to ``path``.

    Raises:
        Damaged: the file holds something else, or there is none.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if metadata["sha256"] == fingerprint(tensors, metadata["state"]):
            return tensors, json.loads(metadata["state"])
    except (safetensors.SafetensorError, OSError, KeyError, ValueError):
        pass  # one of these, by the place of the damage
    raise Damaged(f"{path} does not fit its checksum")


def fingerprint(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Changes when any tensor, or ``text``, does."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def flatten_optimiser(optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as named tensors and JSON data."""
    described = optimiser.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, entries in described["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimiser.{index}.{key}"] = value
            else:
                plain.setdefault(str(index), {})[key] = value
    return tensors, {"groups": described["param_groups"], "plain": plain}


def restore_optimiser(
    optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], described: Mapping[str, Any]
) -> None:
    """The inverse of `flatten_optimiser`."""
    state: dict[int, dict[str, Any]] = {int(i): dict(entries) for i, entries in described["plain"].items()}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimiser":
            index, _, key = rest.partition(".")
            state.setdefault(int(index), {})[key] = (
                tensor.clone()
            )  # clone: freshly aligned memory, as torch makes it
    optimiser.load_state_dict({"state": state, "param_groups": described["groups"]})


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("epoch-*.safetensors"), reverse=True)
