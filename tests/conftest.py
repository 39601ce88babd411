"""Options, determinism and poisoned memory for every test.

``--device cuda`` moves the tests that take the ``device`` fixture; ``--slow`` includes the slow ones.
"""

from __future__ import annotations

import os
import random

import hypothesis
import pytest
import torch

# Tensors here are tiny: on busy cores two threads wait for each other and cost up to ten times as much as one.
THREADS = 1


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("couplings")
    group.addoption("--device", default="cpu", help="torch device for the `device` fixture (default: cpu)")
    group.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_configure(config: pytest.Config) -> None:
    try:
        torch.empty(1, device=config.getoption("--device"))
    except (RuntimeError, AssertionError) as error:
        raise pytest.UsageError(f"--device {config.getoption('--device')}: {error}") from error
    torch.set_num_threads(THREADS)
    # In deterministic mode torch.empty and its kin come filled with NaN (integers: the largest value), in C++
    # too: a kernel that reads what it never wrote cannot pass by luck.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers alone, in a group and in any order."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device named by --device."""
    return torch.device(request.config.getoption("--device"))


# Property tests run the same examples on every machine; HYPOTHESIS_PROFILE=explore looks for new ones.
COMMON = {
    "deadline": None,
    "suppress_health_check": [
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,  # _seed: torch is reseeded per example below
    ],
}
hypothesis.settings.register_profile("ci", derandomize=True, database=None, max_examples=50, **COMMON)
hypothesis.settings.register_profile("explore", max_examples=1000, **COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


class TorchRandom:
    """torch's generator in the form hypothesis knows, which seeds it before each example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # kept: hypothesis holds a weak reference
hypothesis.register_random(TORCH_RANDOM)
