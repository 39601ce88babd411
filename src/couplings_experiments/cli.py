"""The console script ``couplings``: says what is missing if its own dependencies are not installed."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; exit 130 on Ctrl-C, 1 with one line on errors a user can put right."""
    try:
        from couplings_experiments.app import run

        sys.exit(run(sys.argv[1:]))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("couplings"):
            raise
        _without(error.name)
    except KeyboardInterrupt:
        sys.exit(130)


def _without(missing: str | None) -> None:
    """Where a module is missing: the doctor runs all the same, every other command says what to do."""
    if sys.argv[1:] == ["doctor"] and missing != "torch":
        from couplings_experiments.doctor import main as doctor

        sys.exit(doctor())
    package, remedy = ("torch", "torch") if missing == "torch" else (missing, '"couplings[experiments]"')
    sys.exit(
        f"couplings: the command line needs {package}, which is not installed. Run: pip install {remedy} "
        "(couplings doctor shows what else is missing)"
    )
