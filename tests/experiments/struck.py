"""What runs in the processes that `test_survival.py` kills. A fork server imports this once, and then only forks."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from couplings_experiments import environment, experiments, matching_training, retrieval_training
from couplings_experiments.app import run
from couplings_experiments.data import photographs
from couplings_experiments.experiment import discover

SERVER = "COUPLINGS_TEST_SERVER"  # set in the environment of the fork server
IMPORTED_BY = os.getpid()
PLANTED = str(Path(__file__).parent / "planted")
_CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}  # audit events of what changes files
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def check():
    """Exit with status 0 if it was the server that imported this module."""
    sys.exit(os.getpid() == IMPORTED_BY)


def warm():
    """Import and read what every run needs: the same for all, and seconds of work."""
    discover()
    environment.describe()
    torch.set_num_threads(1)
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)  # without a backward, which may start threads
    torch.optim.Adam([weight]).step()  # the first step imports half of torch
    os.fsync = lambda descriptor: (
        None
    )  # of use when the machine dies, not when a process does; takes most of the time
    plan = retrieval_training.PLANS["smoke"]
    retrieval_training.corpus(plan.packages, plan.training.limit)
    plan = matching_training.PLANS["smoke"]
    matching_training.training_views(plan.views, plan.limit[0], 0)
    for part, count in (("validation", plan.validation), ("test", plan.test)):
        matching_training.held(part, count, plan.limit[1])
    photographs.stereo_pairs()


def command(arguments, log):
    """The command line, as a process of its own has it; what it says goes to the file ``log``."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
    sys.exit(run(arguments))


def every_moment(out, log, strides, step):
    """Run `planted.tiny` into folders of ``out``, killed before its changes of files in turn, and resume it.

    Args:
        out: one folder for each moment. The last one is of a run that was over before: it was not killed.
        log: see `command`.
        strides: of one killed run after the other: how far each gets, as a share of the moment.
        step: from moment to moment.
    """
    experiments.__path__.append(PLANTED)
    sys.dont_write_bytecode = True
    moment, struck = 0, True
    while struck:
        place = out / f"{moment:04d}"
        arguments = ["reproduce", "tiny", "--preset", "smoke", "--out", str(place), "--resume"]
        struck, *_ = [_killed_before(arguments, log, int(moment * stride)) for stride in strides]
        if _forked(arguments, log, None) != 0:
            sys.exit(f"{place} was not finished")
        moment += step


def _killed_before(arguments, log, moment):
    status = _forked(arguments, log, moment)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def _forked(arguments, log, moment):
    """Fork, run the command, and die before the change of files number ``moment``."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    left = -1 if moment is None else moment

    def count(event, values):
        nonlocal left
        if event in _CHANGES and (event != "open" or (isinstance(values[2], int) and values[2] & _WRITES)):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    status = 70
    try:
        sys.addaudithook(count)
        command(arguments, log)
    except SystemExit as end:
        status = end.code or 0
    finally:
        os._exit(status)


if SERVER in os.environ:
    warm()
