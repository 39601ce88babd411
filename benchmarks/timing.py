"""Interleaved medians, and the peak of extra memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.registry import Contender, Measured, Setting


class Refused(Exception):
    """A result that is wrong; its time is not a result."""


def clock(run: Callable[[], Any], calls: int) -> tuple[list[float], Any]:
    """Seconds of each of ``calls`` calls in a row, and the last result."""
    seconds, result = [], None
    for _ in range(calls):
        result = None
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return seconds, result


def extra_memory(run: Callable[[], Any]) -> int:
    """Peak bytes that torch's CPU allocator held during ``run()`` above what it held before."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def check(setting: Setting, contender: Contender) -> tuple[float, float | None]:
    """One warming call: its seconds and the error of its result; raises Refused where ours is wrong."""
    (first,), result = clock(contender.run, 1)
    error = contender.error(result) if contender.error else None
    if contender.bar is not None and error is not None and not error <= contender.bar:
        raise Refused(f"{setting.label}: {contender.name} is off by {error:.1e}, allowed {contender.bar:.0e}")
    return first, error


def measure(setting: Setting, budget: float, *, rounds: int = 5) -> list[Measured]:
    """Time the contenders of one setting in turns, so that drift of the machine meets all of them.

    Each is warmed by a call whose result is checked; one of ours above its bar, or raising, refuses the
    setting before anything is timed, and a peer that raises is noted as missing. A fast contender gets
    several calls a round, the first of which is thrown away (it finds the caches full of another's data); one
    that needs more than ``budget`` seconds for all rounds gets fewer rounds, one that needs twice as much for
    a single call only that call.
    """
    present: list[tuple[Contender, float, float | None]] = []
    for contender in setting.contenders:
        try:
            first, error = check(setting, contender)
            if (
                first < 5 * budget
            ):  # the first call may have started threads, imported modules, paged memory in
                first = min(clock(contender.run, max(1, min(10, int(budget / first))))[0])
            present.append((contender, first, error))
        except Refused:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if contender.role == "ours":
                raise Refused(f"{setting.label}: {contender.name} raised {reason}") from error
            setting.missing[contender.name] = f"{setting.label} raised {reason}"
    # a call so long that nothing is cold in it is measured already
    seconds: list[list[float]] = [[first] if first > 2 * budget else [] for _, first, _ in present]
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for spent, (contender, first, _) in zip(seconds, present):
                if first > 2 * budget or (turn and turn * first > budget):
                    continue
                calls = max(1, min(20, int(budget / rounds / first)))
                spent += clock(contender.run, calls + (calls > 2))[0][calls > 2 :]
    finally:
        gc.enable()
    medians = [statistics.median(spent) * c.scale for spent, (c, _, _) in zip(seconds, present)]
    ours = next((median for median, (c, _, _) in zip(medians, present) if c.role == "ours"), None)
    return [
        Measured(
            setting=setting.label,
            name=contender.name,
            role=contender.role,
            seconds=median,
            fastest=min(spent) * contender.scale,
            calls=len(spent),
            ratio=median / ours if ours else None,
            error=error,
            bar=contender.bar,
            memory=extra_memory(contender.run) if contender.memory else None,
            note=contender.note,
            values=setting.values,
        )
        for median, spent, (contender, _, error) in zip(medians, seconds, present)
    ]
