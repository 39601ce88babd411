"""The epochs of one training, stored one by one: interrupted anywhere, it goes on to the same last bit."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from couplings_experiments import checkpoint
from couplings_experiments.errors import UserError
from couplings_experiments.processes import ALONE, Processes


class Diverged(UserError):
    """The loss is no longer a number."""


class Epochs:
    """What a training did so far, and the way to store one epoch more.

    A checkpoint in ``directory`` of the same training is taken up: model, optimiser and generators are put where they
    were after its last epoch. One that is damaged is passed over with a word; those of another training are deleted.

    Args:
        directory: for checkpoints.
        model: freshly initialised; changed in place.
        optimiser: of the model's parameters.
        random: all generators that the training draws from, by name.
        identity: what is trained, in words.
        stated: all else that the numbers depend on, as JSON can carry it.
        processes: who trains together; rank 0 reads and writes for all.
        after_epoch: called with the number of epochs just finished (more than 1 after a resumption).
        say: takes a line for the user.

    Attributes:
        history: what was measured after each finished epoch.
    """

    def __init__(
        self,
        directory: Path,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        random: Mapping[str, torch.Generator],
        *,
        identity: str,
        stated: Sequence[Any],
        processes: Processes = ALONE,
        after_epoch: Callable[[int], None],
        say: Callable[[str], None],
    ) -> None:
        self.history: list[Any] = []
        self._directory, self._model, self._optimiser, self._random = directory, model, optimiser, random
        self._identity, self._after_epoch, self._processes = identity, after_epoch, processes
        self._fingerprint = hashlib.sha256(json.dumps([identity, *stated]).encode()).hexdigest()
        last, damaged = processes.share(lambda: checkpoint.load_last(directory))
        for path in damaged:
            say(f"{path.name} of {identity} is damaged and was passed over")
        if last is not None and last.state.get("fingerprint") == self._fingerprint:
            self._restore(last)
            after_epoch(len(self.history))
        elif processes.first:
            # what another version left, or is damaged: its epochs, being more, would pass for the newer ones
            checkpoint.clear(directory)

    def mean(self, losses: Sequence[Tensor]) -> float:
        """The mean loss of the epoch that is being finished.

        Raises:
            Diverged: it is infinite or NaN.
        """
        mean = float(torch.stack(list(losses)).double().mean())
        if not math.isfinite(mean):
            epoch = len(self.history) + 1
            raise Diverged(f"training of {self._identity} diverged in epoch {epoch}: the loss is {mean}.")
        return mean

    def close(self, measured: Any) -> None:
        """Add what was measured to the history and store the epoch."""
        self.history.append(measured)
        if self._processes.first:
            self._store()
        self._after_epoch(1)

    def _store(self) -> None:
        tensors, described = checkpoint.flatten_optimiser(self._optimiser)
        tensors |= {f"model.{name}": tensor for name, tensor in self._model.state_dict().items()}
        tensors |= {f"random.{name}": generator.get_state() for name, generator in self._random.items()}
        state = {"optimiser": described, "history": self.history, "fingerprint": self._fingerprint}
        checkpoint.save(self._directory, checkpoint.Checkpoint(len(self.history), tensors, state))

    def _restore(self, last: checkpoint.Checkpoint) -> None:
        weights = {
            name.removeprefix("model."): t for name, t in last.tensors.items() if name.startswith("model.")
        }
        self._model.load_state_dict(weights)
        checkpoint.restore_optimiser(self._optimiser, last.tensors, last.state["optimiser"])
        for name, generator in self._random.items():
            generator.set_state(last.tensors[f"random.{name}"].clone())
        self.history = last.state["history"]
