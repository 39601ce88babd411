"""Runs in an environment that holds torch and the built wheel, nothing else."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path


def third_party(statement: str) -> set[str]:
    """Top-level modules outside the standard library that a fresh interpreter holds after ``statement``."""
    report = (
        f"{statement}; import sys; print(*sorted({{m.partition('.')[0] for m in sys.modules}}), sep='\\n')"
    )
    listing = subprocess.run([sys.executable, "-I", "-c", report], check=True, capture_output=True, text=True)
    return {name for name in listing.stdout.split() if name not in sys.stdlib_module_names}


def fail(message: str) -> None:
    sys.exit(f"check_wheel: {message}")


if extra := third_party("import couplings") - third_party("import torch") - {"couplings"}:
    fail(f"`import couplings` loads more than torch: {sorted(extra)}")

import couplings  # noqa: E402

where = Path(couplings.__file__).resolve()
if Path(sysconfig.get_paths()["purelib"]).resolve() not in where.parents:
    fail(f"couplings came from {where}, not from the wheel")
for package in ("couplings", "couplings_experiments"):
    if not any(
        str(f) == f"{package}/py.typed" for f in importlib.metadata.distribution("couplings").files or []
    ):
        fail(f"the wheel lacks {package}/py.typed")

# the console script says what is missing; it does not show a traceback
script = Path(sysconfig.get_path("scripts"), "couplings")
ran = subprocess.run([script, "list"], capture_output=True, text=True)
said = ran.stdout + ran.stderr
if ran.returncode == 0 or "Traceback" in said or "couplings[experiments]" not in said:
    fail(f"`couplings list` without the extra should name couplings[experiments] in one line, said:\n{said}")

# and the doctor answers where nothing but torch is
ran = subprocess.run([script, "doctor"], capture_output=True, text=True)
said = ran.stdout + ran.stderr
if ran.returncode != 1 or "Traceback" in said or 'pip install "couplings[experiments]"' not in ran.stdout:
    fail(f"`couplings doctor` without the extra should name it as the problem, said:\n{said}")

print(f"couplings {importlib.metadata.version('couplings')} imports with torch alone: {where.parent.name} ok")
