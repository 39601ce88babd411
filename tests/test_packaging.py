"""What an installation promises: it loads only torch, ships its types, and its pins are exact and complete."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import couplings

ROOT = Path(__file__).resolve().parents[1]


def third_party(statement: str) -> set[str]:
    """Top-level modules outside the standard library that a fresh interpreter holds after ``statement``."""
    report = f"{statement}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    listing = subprocess.run([sys.executable, "-c", report], check=True, capture_output=True, text=True)
    names = {name.partition(".")[0] for name in json.loads(listing.stdout)}
    return names - set(sys.stdlib_module_names)


def test_import_loads_torch_and_nothing_else():
    assert third_party("import couplings") - third_party("import torch") == {"couplings"}


def test_every_module_imports_without_the_extras():
    """The library never needs what only the experiments, tests and benchmarks need."""
    blocked = ["beartype", "hypothesis", "jax", "jaxtyping", "matplotlib", "numba", "ot", "ott", "pytest"]
    blocked += ["rich", "safetensors", "scipy", "sklearn", "typer"]
    modules = ["couplings", *(m.name for m in pkgutil.walk_packages(couplings.__path__, "couplings."))]
    public = [name for name in modules if not name.startswith("couplings.kernels.")]
    script = "\n".join(
        [
            "import sys, importlib",
            f"sys.modules.update(dict.fromkeys({blocked}))",
            f"for name in {public}: importlib.import_module(name)",
        ]
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_public_names_exist():
    assert sorted(set(couplings.__all__)) == sorted(couplings.__all__)
    for name in couplings.__all__:
        assert getattr(couplings, name) is not None
        assert not name.startswith("_") or name == "__version__"


@pytest.mark.parametrize("package", ["couplings", "couplings_experiments"])
def test_types_are_shipped(package):
    module = importlib.import_module(package)
    assert Path(module.__file__).with_name("py.typed").is_file()


def requirements(lines: list[str]) -> dict[str, list[str]]:
    """Normalised name -> the requirement lines that name it."""
    found: dict[str, list[str]] = {}
    for line in lines:
        text = line.split("#")[0].strip()
        if text:
            name = re.split(r"[\s\[<>=!~;]", text, maxsplit=1)[0]
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), []).append(text)
    return found


def test_torch_is_the_only_dependency():
    needs = importlib.metadata.requires("couplings") or []
    assert list(requirements([need for need in needs if "extra ==" not in need])) == ["torch"]


def test_every_requirement_is_pinned_exactly():
    pins = requirements((ROOT / "constraints.txt").read_text().splitlines())
    for name, lines in pins.items():
        for line in lines:
            assert re.match(r"^[A-Za-z0-9._-]+==[^\s;*]+(\s*;.*)?$", line), (name, line)
    needs = requirements(importlib.metadata.requires("couplings") or [])
    assert not set(needs) - set(pins), "add these to constraints.txt"


def test_installed_versions_are_the_pinned_ones():
    """The environment is the one that constraints.txt describes, local build tags such as +cpu apart."""
    from packaging.requirements import Requirement

    pinned = {}
    for lines in requirements((ROOT / "constraints.txt").read_text().splitlines()).values():
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate():
                pinned[requirement.name] = requirement.specifier
    wrong = {}
    for name, specifier in pinned.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not specifier.contains(installed.split("+")[0], prereleases=True):
            wrong[name] = f"{installed}, pinned {specifier}"
    assert not wrong, wrong


def test_changelog_and_citation_name_the_version():
    version = importlib.metadata.version("couplings")
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()


def test_uninitialised_memory_is_poisoned():
    """What conftest.py sets up: an operator that reads what it never wrote returns NaN here."""
    for memory in (torch.empty(3), torch.empty_like(torch.zeros(3)), torch.zeros(2).new_empty(3)):
        assert memory.isnan().all()
