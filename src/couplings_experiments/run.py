"""One run of some experiments in one directory: refused, started, resumed or finished, never half.

Killed at any moment, a run leaves one of four states, told apart by what lies in ``--out``:

1. no folder ``work``: nothing was begun, or all is done. The folder comes and goes by renaming.
2. ``work`` with what was asked for: an unfinished run. Each unit is either stored, with a checksum, or goes on from its
   last checkpoint.
3. the same, and results.json is new already: all units are stored, so that resuming writes the same results again.
4. a folder `SCRAP`: of no use to anybody, deleted by the next run.
"""

from __future__ import annotations

import datetime
import shutil
import time
from pathlib import Path
from typing import Any

import torch

import couplings_experiments.environment as environment
from couplings_experiments.errors import OutOfMemory, UserError, explain_memory_error, explain_os_error
from couplings_experiments.experiment import KEPT, Context, Experiment, Progress, Request, discover
from couplings_experiments.files import Damaged, make_directory, owned, read_json, write_json
from couplings_experiments.processes import ALONE, Processes
from couplings_experiments.report.page import FORMAT, write_report

WORK = "work"  # the unfinished run inside --out; gone when the run is finished
SCRAP = ".couplings-work"  # that folder before it is complete, and when it is being deleted
# both say what was asked for: the first is written now and then, with the time spent, the second once
_STORED = ("run.json", "request.json")
_PATIENCE = 30.0


def reproduce(
    request: Request,
    out: Path,
    *,
    resume: bool,
    progress: Progress,
    given: frozenset[str],
    processes: Processes = ALONE,
) -> Path | None:
    """Run what ``request`` asks for and write ``results.json`` and ``index.html`` into ``out``.

    Args:
        request: what to run; with ``resume``, fields that are not in ``given`` come from the unfinished run.
        out: the directory; held by a lock while the run lasts.
        resume: continue an unfinished run.
        progress: whom to report to.
        given: names of the request's fields that the user stated.
        processes: who runs it together. Rank 0 decides, reads and writes; the others come in where it calls them.

    Returns:
        The page, or None if there was nothing left to resume; None on the other ranks.

    Raises:
        UserError: an unfinished run without ``resume``, one that asked for something else, a directory in use, ...
    """
    if not processes.first:
        _help(processes, progress)
        return None
    make_directory(out)
    try:
        with owned(out):
            page = _reproduce(request, out, resume, progress, given, processes)
    except OSError as error:
        raise explain_os_error(error, f"working in {out}") from None
    processes.share(lambda: None)
    return page


def _help(processes: Processes, progress: Progress) -> None:
    """Take part in each experiment that rank 0 begins with the others, until it says None."""
    nothing: tuple[Request, str, Path] | None = None
    while (called := processes.share(lambda: nothing)) is not None:
        request, name, directory = called
        discover()[name].run(Context(request, directory, progress, processes))


def _reproduce(
    request: Request,
    out: Path,
    resume: bool,
    progress: Progress,
    given: frozenset[str],
    processes: Processes,
) -> Path | None:
    work = out / WORK
    shutil.rmtree(out / SCRAP, ignore_errors=True)
    stored = _stored(work, progress)
    if stored is not None and not resume:
        raise UserError(
            f"{out} holds an unfinished run ({_in_words(stored['request'])}). "
            f"Add --resume to continue it, choose another --out, or delete {work}."
        )
    if stored is None and resume and _finished(out):
        return None
    if stored is not None:
        request = _agreed(request, _understood(stored["request"], work), given)
        progress.say(f"continuing the run in {out} ({_in_words(request.to_json())})")
        _warn(stored["conditions"], progress)
    known = discover()
    missing = [name for name in request.experiments if name not in known]
    if missing:
        raise UserError(
            f"{work} is of another version of couplings: there is no experiment {missing[0]!r} in this one. "
            f"Continue it with that version, choose another --out, or delete {work}."
        )
    environment.check_device(request.device)
    if stored is None:
        _begin(work, request)
    clock = _Clock(work / _STORED[0], stored or _described(request, 0.0))
    results: dict[str, Any] = {}
    threads = torch.get_num_threads()
    progress.expect(sum(known[name].minutes.get(request.preset, 1.0) for name in request.experiments))
    try:
        for name in request.experiments:
            # whatever the experiment before has set, or, its units being stored, was spared from setting
            torch.set_num_threads(threads)
            together = processes if known[name].distributed else ALONE
            if together.size < processes.size:
                progress.say(f"{name} is not shared among processes: rank 0 runs it, the others wait")
            together.share(lambda name=name: (request, name, work / name))  # type: ignore[misc]
            ticking = _Ticking(progress, clock, name, known[name].minutes.get(request.preset, 1.0))
            context = Context(request, work / name, ticking, together)
            clock.begin(name)
            results[name] = _run(known[name], context)
            ticking.end()
    except KeyboardInterrupt:
        clock.store()
        raise
    except OutOfMemory:
        raise
    except UserError:
        # wrong --data-dir and the like: nothing to continue
        if stored is None and not any(path.is_file() for path in work.glob("*/**/*")):
            _end(work)
        raise
    finally:
        torch.set_num_threads(threads)
    write_json(
        out / "results.json",
        {
            "format": FORMAT,
            "version": environment.version("couplings") or "unknown",
            "request": request.to_json(),
            "command": command(request),
            "finished": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            "elapsed_seconds": clock.seconds(),
            "seconds": clock.each(),
            "environment": environment.describe(),
            "experiments": results,
        },
    )
    page = write_report(out)
    for name in results:
        _move(work / name / KEPT, out / name)
    _end(work)
    return page


def _run(experiment: Experiment, context: Context) -> dict[str, Any]:
    try:
        return experiment.run(context)
    except (MemoryError, RuntimeError) as error:
        explained = explain_memory_error(error, f"running the experiment {experiment.name}")
        if explained is None:
            raise
        raise explained from None


def _stored(work: Path, progress: Progress) -> dict[str, Any] | None:
    """What the unfinished run in ``work`` says of itself, or None if there is none."""
    if not work.exists():
        return None
    for name in _STORED:
        try:
            found = read_json(work / name)
        except Damaged as error:
            progress.say(f"{error}: damaged, passed over")
        else:
            if found is not None:
                return found
    raise UserError(
        f"{work} does not say what was asked for, or is not of this program ({' and '.join(_STORED)} are missing or "
        "damaged). Choose another --out, or delete it."
    )


def _finished(out: Path) -> bool:
    try:
        return read_json(out / "results.json") is not None
    except Damaged as error:
        raise UserError(
            f"{error}: it is damaged, and there is no unfinished run. Run it again without --resume."
        ) from None


def _described(request: Request, seconds: float) -> dict[str, Any]:
    conditions = {
        "couplings": environment.version("couplings") or "unknown",
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }
    return {"request": request.to_json(), "conditions": conditions, "seconds": seconds}


def _begin(work: Path, request: Request) -> None:
    scrap = work.with_name(SCRAP)
    make_directory(scrap)
    for name in _STORED:
        write_json(scrap / name, _described(request, 0.0))
    scrap.replace(work)


def _end(work: Path) -> None:
    scrap = work.with_name(SCRAP)
    work.replace(scrap)
    shutil.rmtree(scrap)


def _move(kept: Path, place: Path) -> None:
    """File by file: what else the user has in ``place`` stays there."""
    for file in sorted(kept.glob("[!.]*")):
        place.mkdir(exist_ok=True)
        file.replace(place / file.name)


def command(request: Request) -> str:
    """The command line that asks for ``request``."""
    words = ["couplings reproduce", *request.experiments, f"--preset {request.preset}"]
    words += [f"--dataset {request.dataset}"] * (request.dataset != "digits")
    words += [f"--data-dir {request.data_dir}"] * (request.data_dir is not None)
    words += [f"--seeds {request.seeds}"] * (request.seeds is not None)
    words += [f"--device {request.device}"] * (request.device != "cpu")
    words += [f"--language {request.language}"] * (request.language != "fr")
    return " ".join(words)


def _understood(stored: dict[str, Any], work: Path) -> Request:
    try:
        return Request.from_json(stored)
    except (TypeError, KeyError):
        raise UserError(
            f"{work} is of another version of couplings. Continue it with that version, choose another --out, "
            f"or delete {work}."
        ) from None


def _warn(before: dict[str, str], progress: Progress) -> None:
    """Say what is not as it was when the run was started."""
    now = _described(Request((), "", "", None, None, ""), 0.0)["conditions"]
    different = [f"{name} {before[name]}, now {now[name]}" for name in now if before.get(name) != now[name]]
    if different:
        progress.say(f"it was started with {'; '.join(different)}: its numbers may differ in the last digits")


def _agreed(asked: Request, stored: Request, given: frozenset[str]) -> Request:
    before, now = stored.to_json(), asked.to_json()
    different = [name for name in before if name in given and before[name] != now[name]]
    if different:
        name = different[0]
        raise UserError(
            f"the unfinished run was started with {name} {_shown(before[name])}, not {_shown(now[name])}. "
            f"Leave it out to continue, or choose another --out."
        )
    return stored


def _shown(value: Any) -> str:
    if value is None:
        return "left to the preset"
    return " ".join(value) if isinstance(value, list) else str(value)


def _in_words(request: dict[str, Any]) -> str:
    return f"{_shown(request['experiments'])}, preset {request['preset']}, {request['dataset']}"


class _Clock:
    """Computing time of a run over all its sessions, stored now and then beside the request."""

    def __init__(self, path: Path, stored: dict[str, Any]) -> None:
        self._path = path
        self._run = stored
        self._spent = float(stored["seconds"])
        self._each: dict[str, float] = dict(stored.get("each", {}))
        self._running: str | None = None
        self._started = self._stored = self._since = time.monotonic()

    def begin(self, name: str) -> None:
        """From now on it is this experiment's time."""
        self.each()
        self._running = name

    def seconds(self) -> float:
        return self._spent + time.monotonic() - self._started

    def each(self) -> dict[str, float]:
        """Of that, the experiments' parts."""
        now = time.monotonic()
        if self._running is not None:
            self._each[self._running] = self._each.get(self._running, 0.0) + now - self._since
        self._since = now
        return dict(self._each)

    def store(self) -> None:
        self._stored = time.monotonic()
        write_json(self._path, {**self._run, "seconds": self.seconds(), "each": self.each()})

    def tick(self) -> None:
        if time.monotonic() - self._stored > _PATIENCE:
            self.store()


class _Ticking:
    """An experiment's progress, as its part of the whole run's: the experiments' steps are not worth the same.

    Also keeps the clock.
    """

    def __init__(self, progress: Progress, clock: _Clock, name: str, minutes: float) -> None:
        self._progress = progress
        self._clock = clock
        self._name = name
        self._minutes = minutes
        self._expected = self._done = self._told = 0.0

    def expect(self, steps: float) -> None:
        self._expected += steps

    def advance(self, steps: float, what: str) -> None:
        self._done += steps
        self._tell(self._done / (max(self._expected, self._done) or 1.0), what)
        self._clock.tick()

    def end(self) -> None:
        """All of it is done, whatever was expected."""
        self._tell(1.0, "done")

    def _tell(self, share: float, what: str) -> None:
        gained = max(share * self._minutes - self._told, 0.0)  # none where more is expected than before
        self._told += gained
        self._progress.advance(gained, f"{self._name}: {what}")

    def say(self, line: str) -> None:
        self._progress.say(line)
