"""The table of methods: which relaxation has which operator, its variants and its default epsilon."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from couplings.ordering import gaussian, network, neuralsort, projection, sigmoid, softsort

Operator = Callable[..., Tensor]


class Method(NamedTuple):
    """One relaxation of sorting.

    Attributes:
        epsilon: the default of each operator, or of an operator and a variant.
        variants: names and the options they stand for; the first one is the default.
        ranks, sorted_values, permutation: its operators on ``Rows``, None where it defines none.
    """

    epsilon: dict[str, float]
    variants: dict[str, dict[str, Any]]
    ranks: Operator | None
    sorted_values: Operator | None
    permutation: Operator | None


def _alike(epsilon: float) -> dict[str, float]:
    return dict.fromkeys(("ranks", "sorted_values", "permutation"), epsilon)


_NETWORKS = {
    f"{wires}_{swap}": {"network": wires, "swap": swap}
    for wires in network.NETWORKS[::-1]
    for swap in network.SWAPS[::-1]
}

METHODS = {
    "projection": Method(
        {
            "ranks": projection.DEFAULT_EPSILON["soft_rank"],
            "ranks kl": projection.DEFAULT_EPSILON["soft_rank kl"],
            "sorted_values": projection.DEFAULT_EPSILON["soft_sort"],
        },
        {"l2": {"regularization": "l2"}, "kl": {"regularization": "kl"}},
        projection.ranks,
        projection.sorted_values,
        None,
    ),
    "neuralsort": Method(
        _alike(neuralsort.DEFAULT_EPSILON),
        {"deterministic": {}, "stochastic": {"noise": 1.0}},
        neuralsort.ranks,
        neuralsort.sorted_values,
        neuralsort.permutation,
    ),
    "softsort": Method(
        _alike(softsort.DEFAULT_EPSILON),
        {"l1": {"p": 1.0}, "l2": {"p": 2.0}},
        softsort.ranks,
        softsort.sorted_values,
        softsort.permutation,
    ),
    "sigmoid": Method(_alike(sigmoid.DEFAULT_EPSILON), {"": {}}, sigmoid.ranks, None, None),
    "gaussian": Method(
        _alike(gaussian.DEFAULT_EPSILON), {"": {}}, gaussian.ranks, None, gaussian.permutation
    ),
    "network": Method(
        _alike(network.DEFAULT_EPSILON), _NETWORKS, network.ranks, network.sorted_values, network.permutation
    ),
}

NAMES = ("transport", *METHODS)
RANDOM = ("stochastic",)


def with_options(operator: Operator, options: dict[str, Any]) -> Operator:
    """The operator with its variant's options filled in."""
    return partial(operator, **options) if options else operator
