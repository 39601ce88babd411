"""Compiled work shared between the threads that torch itself computes with."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PARALLEL = 2**15
"""Entries from which rows are shared; torch's own operations begin to share at as many."""

_HOME = os.getpid()


def shared(prepare: Callable[[slice], Callable[[], None]], rows: int, n: int) -> None:
    """Work on all rows of n entries, in as many parts as torch has threads; what it raises is raised.

    ``prepare`` makes the work of a part, in the calling thread: that must not hold Python's lock for long. Between two
    operations torch's threads wait in a loop, for milliseconds, and other threads would have to fight them for the
    cores. So the parts are handed to these very threads.
    """
    parts = min(rows, torch.get_num_threads()) if rows * n >= PARALLEL else 1
    if parts <= 1:
        prepare(slice(0, rows))()
        return
    bounds = [rows * part // parts for part in range(parts + 1)]
    todo = iter([prepare(slice(low, high)) for low, high in itertools.pairwise(bounds)])
    failed: list[BaseException] = []

    def help_out(_: Any = None) -> None:
        """Take parts until none is left: there may be fewer threads than were asked for."""
        try:
            for work in todo:
                work()
        except BaseException as error:  # noqa: BLE001 - raised below, where somebody can see it
            failed.append(error)

    team = _team() if os.getpid() == _HOME else None  # a forked process has none of torch's threads
    if team is None:
        threads = [threading.Thread(target=help_out) for _ in range(parts - 1)]
        for thread in threads:
            thread.start()
        help_out()
        for thread in threads:
            thread.join()
    else:
        team(_CALLBACK(help_out), None, parts, 0)
        help_out()  # Ctrl-C on the way into a callback ends it unseen: no part may be left undone
    if failed:
        raise failed[0]


_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _team() -> Callable[..., None] | None:
    """``GOMP_parallel(function, data, threads, flags)`` of the OpenMP runtime that torch's CPU library is linked to.

    It is the documented entry of GCC's runtime, and of LLVM's and Intel's on Linux. None where torch has another one.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        found = library.GOMP_parallel  # looked up in what the library needs, too
    except (OSError, AttributeError):
        return None
    found.argtypes, found.restype = [_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return found
