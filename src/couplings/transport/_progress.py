"""When may a loop over frozen items stop? Read at once on a CPU, without waiting on an accelerator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def any_true(flag: Tensor) -> bool:
    """Whether some entry is true; on an accelerator always True, since looking would wait for the device.

    What depends on it must be gated per item, so that doing it for nobody changes nothing.
    """
    return flag.device.type != "cpu" or bool(flag.any())


def all_true() -> Callable[[Tensor], bool]:
    """A loop's exit test: ``stop(done)``.

    On a CPU it is ``done.all()``. On an accelerator the flag travels to the host in the background and the answer
    is the latest one that has arrived: some steps late, never waiting. Items are frozen when they are done, so the
    extra steps change no result.
    """
    pending: list[tuple[Tensor, Any]] = []

    def stop(done: Tensor) -> bool:
        if done.device.type == "cpu":
            return bool(done.all())
        if done.device.type != "cuda":
            return False
        if pending and pending[0][1].query():
            if bool(pending[0][0]):
                return True
            pending.clear()
        if not pending:
            host = torch.empty((), dtype=torch.bool, pin_memory=True)
            host.copy_(done.all(), non_blocking=True)
            event: Any = torch.cuda.Event()
            event.record()
            pending.append((host, event))
        return False

    return stop
