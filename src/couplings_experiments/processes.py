"""One run on several processes, as torchrun starts them: what rank 0 decides for all, who speaks, and how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from couplings_experiments.errors import UserError

T = TypeVar("T")
LOST = (
    "another process of this run died, or the connection to it broke; every finished epoch is kept. "
    "Start the same command with --resume to continue."
)
_LONG = timedelta(days=30)  # the others wait while rank 0 does alone what is not shared
_GRACE = 5.0
_complaints: Any = None  # the store in which the processes agree on who complains; None in one process


class Lost(Exception):
    """Another process of this run is gone."""


@dataclass(frozen=True)
class Processes:
    """The processes that do a piece of work together, seen from one of them.

    Attributes:
        rank: of this one.
        size: how many.
        local: this one's number on its machine.
        control: the group in which rank 0 tells the others what comes next.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    control: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files, prints and reports."""
        return self.rank == 0

    def share(self, find: Callable[[], T]) -> T:
        """What ``find`` gives on rank 0, where alone it is called."""
        if self.size == 1:
            return find()
        found: list[Any] = [find() if self.first else None]
        dist.broadcast_object_list(found, src=0, group=self.control)
        result: T = found[0]
        return result

    def mine(self, rows: Tensor) -> Tensor:
        """This rank's part of the rows of a batch."""
        return rows.tensor_split(self.size)[self.rank]

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the ranks, the same bits on each."""
        if self.size > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x / self.size

    def wrapped(self, module: nn.Module) -> nn.Module:
        """``module``, its gradients averaged over the ranks."""
        return module if self.size == 1 else nn.parallel.DistributedDataParallel(module)

    def device(self, name: str) -> torch.device:
        """Where this process computes when the user says ``name``: with CUDA each has a card of its own."""
        return torch.device(f"cuda:{self.local}" if name == "cuda" and self.size > 1 else name)


ALONE = Processes()


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that torchrun started together with this one; without torchrun this one alone.

    Args:
        device: as the user gave it; decides between gloo and nccl.

    Raises:
        UserError: a device that several processes cannot compute on.
        Lost: another process is gone.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()) or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    local = int(os.environ["LOCAL_RANK"])
    backend = _backend(device)
    global _complaints
    torchs: Any = dist  # which does not mark all of its public names as such
    store, rank, size = next(torchs.rendezvous("env://"))
    _complaints = torchs.PrefixStore("complaints", store)
    if backend == "nccl":
        torch.cuda.set_device(local)
    dist.init_process_group(backend, store=torchs.PrefixStore("run", store), rank=rank, world_size=size)
    found = Processes(rank, size, local, dist.new_group(backend="gloo", timeout=_LONG))
    with _ended_by_torchrun():
        try:
            yield found
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                raise Lost(str(error)) from error
            raise
    dist.destroy_process_group()
    _complaints = None


def complain(line: str) -> None:
    """Tell the user what went wrong; of several processes, which end one after the other, only the first does."""
    if _complaints is not None:
        with contextlib.suppress(RuntimeError):  # torchrun, which keeps the store, may be gone
            if _complaints.add("count", 1) > 1:
                return
    print(f"couplings: {line}", file=sys.stderr, flush=True)


def _backend(device: str) -> str:
    """What the processes talk through."""
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return "gloo"
    if kind != "cuda":
        raise UserError(
            f"--device {device} cannot be shared by processes. Use cpu or cuda, or start one process."
        )
    if index:
        raise UserError(f"--device {device} is one card, and each process needs its own. Say --device cuda.")
    cards, here = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if cards < here:
        raise UserError(
            f"{here} processes, but {cards} CUDA devices here. Start torchrun with --nproc-per-node {cards}."
        )
    return "nccl"


@contextlib.contextmanager
def _ended_by_torchrun() -> Iterator[None]:
    """Turn SIGTERM, by which torchrun ends the processes that are left, into `Lost`.

    Python runs its handler only where Python code runs. A process that waits inside a collective is ended by a thread,
    which hears of the signal through a socket.
    """
    left = threading.Event()
    heard, written = socket.socketpair()
    written.setblocking(False)

    def end(number: int, frame: object) -> None:
        raise Lost("ended by torchrun")

    def wait() -> None:
        with heard:
            while numbers := heard.recv(64):
                if signal.SIGTERM in numbers and not left.wait(_GRACE):
                    complain(LOST)
                    os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    descriptor = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    before: Any = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except BaseException:
        before = signal.SIG_IGN  # this process ends by itself, but first it says why
        raise
    finally:
        left.set()
        signal.signal(signal.SIGTERM, before)
        signal.set_wakeup_fd(descriptor)
        written.close()  # ends the thread
