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
        sys.exit(
            f"couplings: the command line needs {error.name}, which is not installed. "
            'Run: pip install "couplings[experiments]"'
        )
    except KeyboardInterrupt:
        sys.exit(130)
