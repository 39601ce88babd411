"""``python -m couplings_experiments`` is ``couplings``."""

from couplings_experiments.cli import main

main()
