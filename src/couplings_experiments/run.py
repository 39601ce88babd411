"""One run of some experiments in one directory: refused, started, resumed or finished, never half."""

from __future__ import annotations

import datetime
import shutil
import time
from pathlib import Path
from typing import Any

import couplings_experiments.environment as environment
from couplings_experiments.errors import UserError, explain_os_error
from couplings_experiments.experiment import KEPT, Context, Experiment, Progress, Request, discover
from couplings_experiments.files import make_directory, owned, read_json, write_json
from couplings_experiments.report.page import FORMAT, write_report

WORK = "work"  # the unfinished run inside --out; gone when the run is finished
_PATIENCE = 30.0


def reproduce(
    request: Request, out: Path, *, resume: bool, progress: Progress, given: frozenset[str]
) -> Path | None:
    """Run what ``request`` asks for and write ``results.json`` and ``index.html`` into ``out``.

    Args:
        request: what to run; with ``resume``, fields that are not in ``given`` come from the unfinished run.
        out: the directory; held by a lock while the run lasts.
        resume: continue an unfinished run.
        progress: whom to report to.
        given: names of the request's fields that the user stated.

    Returns:
        The page, or None if there was nothing left to resume.

    Raises:
        UserError: an unfinished run without ``resume``, one that asked for something else, a directory in use, ...
    """
    make_directory(out)
    with owned(out):
        try:
            return _reproduce(request, out, resume, progress, given)
        except OSError as error:
            raise explain_os_error(error, f"writing to {out}") from None


def _reproduce(
    request: Request, out: Path, resume: bool, progress: Progress, given: frozenset[str]
) -> Path | None:
    work = out / WORK
    stored = read_json(work / "run.json")
    if stored is not None and not resume:
        raise UserError(
            f"{out} holds an unfinished run ({_in_words(stored['request'])}). "
            f"Add --resume to continue it, choose another --out, or delete {work}."
        )
    if stored is None and resume and (out / "results.json").exists():
        return None
    spent = 0.0
    if stored is not None:
        request = _agreed(request, Request.from_json(stored["request"]), given)
        spent = stored["seconds"]
        progress.say(f"continuing the run in {out} ({_in_words(request.to_json())})")
    else:
        if work.exists():  # left by a crash before run.json was there: holds nothing
            shutil.rmtree(work)
        make_directory(work)
    environment.check_device(request.device)
    clock = _Clock(work / "run.json", request, spent)
    known = discover()
    chosen: list[Experiment] = [known[name] for name in request.experiments]
    results: dict[str, Any] = {}
    try:
        for experiment in chosen:
            context = Context(request, work / experiment.name, _Ticking(progress, clock))
            results[experiment.name] = experiment.run(context)
    except KeyboardInterrupt:
        clock.store()
        raise
    except UserError:
        if stored is None and not any(
            work.glob("*/*.json")
        ):  # wrong --data-dir and the like: nothing to continue
            shutil.rmtree(work)
        raise
    write_json(
        out / "results.json",
        {
            "format": FORMAT,
            "version": environment.version("couplings") or "unknown",
            "request": request.to_json(),
            "command": command(request),
            "finished": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            "elapsed_seconds": clock.seconds(),
            "environment": environment.describe(),
            "experiments": results,
        },
    )
    page = write_report(out)
    for name in results:
        if (work / name / KEPT).is_dir():
            shutil.rmtree(out / name, ignore_errors=True)
            (work / name / KEPT).replace(out / name)
    shutil.rmtree(work)
    return page


def command(request: Request) -> str:
    """The command line that asks for ``request``."""
    words = ["couplings reproduce", *request.experiments, f"--preset {request.preset}"]
    words += [f"--dataset {request.dataset}"] * (request.dataset != "digits")
    words += [f"--data-dir {request.data_dir}"] * (request.data_dir is not None)
    words += [f"--seeds {request.seeds}"] * (request.seeds is not None)
    words += [f"--device {request.device}"] * (request.device != "cpu")
    words += [f"--language {request.language}"] * (request.language != "fr")
    return " ".join(words)


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

    def __init__(self, path: Path, request: Request, spent: float) -> None:
        self._path = path
        self._request = request
        self._spent = spent
        self._started = self._stored = time.monotonic()
        self.store()

    def seconds(self) -> float:
        return self._spent + time.monotonic() - self._started

    def store(self) -> None:
        self._stored = time.monotonic()
        write_json(self._path, {"request": self._request.to_json(), "seconds": self.seconds()})

    def tick(self) -> None:
        if time.monotonic() - self._stored > _PATIENCE:
            self.store()


class _Ticking:
    """Progress that also keeps the clock."""

    def __init__(self, progress: Progress, clock: _Clock) -> None:
        self._progress = progress
        self._clock = clock

    def expect(self, steps: float) -> None:
        self._progress.expect(steps)

    def advance(self, steps: float, what: str) -> None:
        self._progress.advance(steps, what)
        self._clock.tick()

    def say(self, line: str) -> None:
        self._progress.say(line)
