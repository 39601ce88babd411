"""The oldest and the newest supported torch, on every supported Python: ``nox``; ``nox -l`` lists the combinations.

``pip install nox`` first. A Python that is not installed is skipped; TORCH_INDEX says where torch comes
from, for instance the index of CPU builds.
"""

import os

import nox

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = ("2.8.0", "2.13.0")
QUICK = (
    "tests/laws",
    "tests/selection",
    "tests/ordering",
    "tests/transport",
    "tests/matching",
    "tests/similarity",
)

nox.options.error_on_missing_interpreters = False


@nox.session(python=PYTHONS)
@nox.parametrize("torch", TORCHES)
def tests(session: nox.Session, torch: str) -> None:
    """The operators' tests, without the experiments."""
    index = os.environ.get("TORCH_INDEX")
    session.install(*(["--index-url", index] if index else []), f"torch=={torch}")
    session.install(".[test,matching]", "jaxtyping", "beartype", "matplotlib", f"torch=={torch}")
    session.run("python", "-m", "pytest", "-n", "2", *QUICK, *session.posargs)
