"""One file per operator; importing it registers its cases."""

from __future__ import annotations

import importlib
import pkgutil

from benchmarks.registry import CASES, Case


def load() -> dict[str, Case]:
    """Import every file of this folder and return the registry."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    return CASES
