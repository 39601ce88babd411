"""Adapters to installed peers. Each raises Missing with a word when its library is absent."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.registry import Missing


@cache
def library(module: str, package: str) -> ModuleType:
    """Import a peer, or say what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"{error}; pip install {package}") from error


def to_torch(array: Any) -> Tensor:
    """A JAX array as a tensor."""
    return torch.from_numpy(library("numpy", "numpy").array(array))


def precision(jax: Any, dtype: torch.dtype) -> Any:
    """JAX's context in which float64 exists, or does not: with it on, OTT's float32 gradients raise."""
    home = jax if hasattr(jax, "enable_x64") else library("jax.experimental", "jax")
    return home.enable_x64(dtype == torch.float64)


def ott_mask(
    x: Tensor, k: int, epsilon: float, cotangent: Tensor, threshold: float
) -> Callable[[], tuple[Any, Any]]:
    """OTT-JAX's top-k mask on the same standardised scores, jitted, value and gradient."""
    library("ott", "ott-jax")
    jax, soft_sort = library("jax", "jax"), library("ott.tools.soft_sort", "ott-jax")
    with precision(jax, x.dtype):
        scores, weight = jax.numpy.asarray(x.numpy()), jax.numpy.asarray(cotangent.numpy())

    def standardized(z: Any) -> Any:
        return (z - z.mean()) / z.std()

    def loss(z: Any) -> Any:
        found = soft_sort.topk_mask(z, k=k, epsilon=epsilon, squashing_fun=standardized, threshold=threshold)
        return (found * weight).sum(), found

    with precision(jax, x.dtype):
        step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(scores).compile()

    def run() -> tuple[Any, Any]:
        with precision(jax, x.dtype):
            (_, found), gradient = jax.block_until_ready(step(scores))
        return found, gradient

    return run


def ott_ranks(u: Tensor, epsilon: float, *, threshold: float) -> Callable[[], Any]:
    """OTT-JAX's soft ranks (from 1) of scores that are squashed already, jitted."""
    library("ott", "ott-jax")
    jax, soft_sort = library("jax", "jax"), library("ott.tools.soft_sort", "ott-jax")

    def found(z: Any) -> Any:
        ranks = soft_sort.ranks(
            z,
            axis=-1,
            epsilon=epsilon,
            squashing_fun=lambda t: t,
            threshold=threshold,
            max_iterations=100_000,
        )
        return ranks + 1

    with precision(jax, u.dtype):
        scores = jax.numpy.asarray(u.numpy())
        compiled = jax.jit(found).lower(scores).compile()

    def run() -> Any:
        with precision(jax, u.dtype):
            return jax.block_until_ready(compiled(scores))

    return run


def ott_dense(
    cost: Tensor, a: Tensor, b: Tensor, epsilon: float, *, sweeps: int, tolerance: float
) -> Callable[[], Any]:
    """OTT-JAX's Sinkhorn on a dense cost, jitted; the plan."""
    library("ott", "ott-jax")
    jax = library("jax", "jax")
    geometry = library("ott.geometry.geometry", "ott-jax")
    linear_problem = library("ott.problems.linear.linear_problem", "ott-jax")
    sinkhorn = library("ott.solvers.linear.sinkhorn", "ott-jax")
    solver = sinkhorn.Sinkhorn(threshold=tolerance, max_iterations=sweeps)

    def plan(c: Any, left: Any, right: Any) -> Any:
        return solver(linear_problem.LinearProblem(geometry.Geometry(c, epsilon=epsilon), left, right)).matrix

    with precision(jax, cost.dtype):
        arrays = [jax.numpy.asarray(t.numpy()) for t in (cost, a, b)]
        compiled = jax.jit(plan).lower(*arrays).compile()

    def run() -> Any:
        with precision(jax, cost.dtype):
            return jax.block_until_ready(compiled(*arrays))

    return run


def pot_dense(
    cost: Tensor, a: Tensor, b: Tensor, epsilon: float, *, sweeps: int, tolerance: float
) -> Callable[[], Tensor]:
    """POT's ot.sinkhorn in the log domain; its threshold is an L2 error, so it gets a tenth of ours."""
    ot = library("ot", "POT")

    def run() -> Tensor:
        return ot.sinkhorn(  # type: ignore[no-any-return]
            a, b, cost, epsilon, method="sinkhorn_log", stopThr=tolerance / 10, numItermax=sweeps, warn=False
        )

    return run


def pot_batch(
    cost: Tensor, a: Tensor, b: Tensor, epsilon: float, *, sweeps: int, tolerance: float
) -> Callable[[], Tensor]:
    """POT's ot.batch.solve_batch, log domain."""
    batch = library("ot.batch", "POT")

    def run() -> Tensor:
        return batch.solve_batch(  # type: ignore[no-any-return]
            cost[None],
            reg=epsilon,
            a=a[None],
            b=b[None],
            max_iter=sweeps,
            tol=tolerance,
            method="log_sinkhorn",
            grad="detach",
        ).plan[0]

    return run


def softtorch_topk(x: Tensor, k: int, softness: float, method: str) -> tuple[Tensor, Tensor]:
    """Softtorch's top-k: values and the soft indices (..., k, n); its own relaxation, squashed scores."""
    found = library("softtorch", "softtorch (Python >= 3.12)").topk(
        x, k, dim=-1, softness=softness, method=method
    )
    return found.values, found.indices


def softtorch_rank(x: Tensor, softness: float, method: str) -> Callable[[], Tensor]:
    """Softtorch's ranks, rising; its own relaxation."""
    rank = library("softtorch", "softtorch (Python >= 3.12)").rank

    def run() -> Tensor:
        found: Tensor = rank(x, dim=-1, softness=softness, method=method, descending=False, standardize=False)
        return found

    return run


def diffsort_permutation(network: str, size: int, steepness: float) -> Callable[[Tensor], Tensor]:
    """diffsort's sorting network with Cauchy swaps: scores (rows, n) to matrices (rows, n, n), places first as ours."""
    net = library("diffsort", "diffsort").DiffSortNet(
        network, size, steepness=steepness, distribution="cauchy"
    )

    def run(x: Tensor) -> Tensor:
        found: Tensor = net(x)[1].transpose(-1, -2)
        return found

    return run
