"""Run the registry of benchmarks and write its tables."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all of them")
    parser.add_argument("--quick", action="store_true", help="seconds a case; not for quoting")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where tables go (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    options = parser.parse_args(arguments)
    # before they are imported: jax is not to look for accelerators, torch's profiler not to log every start
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # peers warn on every call that they did not converge: the error column says it
    warnings.filterwarnings("ignore")

    import torch

    from benchmarks.cases import load
    from benchmarks.runner import run_case

    registered = load()
    if options.list:
        for case in registered.values():
            print(f"{case.name:<20} {case.title}")
        return 0
    if unknown := [name for name in options.cases if name not in registered]:
        parser.error(f"no case named {', '.join(unknown)}; there are {', '.join(registered)}")
    torch.set_num_threads(options.threads)
    # glibc hands memory back at every free until one larger block (of at most 32 MiB) has been freed: as in training
    torch.empty(2**22).fill_(0)
    chosen = options.cases or list(registered)
    if (
        len(chosen) > 1
    ):  # each in a process of its own: what one leaves behind in the allocator would speed up others
        flags = ["--out", str(options.out), "--threads", str(options.threads), *["--quick"] * options.quick]
        command = [sys.executable, "-m", "benchmarks", *flags]
        return max(subprocess.run([*command, name], check=False).returncode for name in chosen)
    return 0 if run_case(registered[chosen[0]], options.out, quick=options.quick) else 1


if __name__ == "__main__":
    sys.exit(main())
