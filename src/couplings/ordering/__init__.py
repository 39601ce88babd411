"""Soft sorts, ranks, quantiles and permutations."""

from couplings.ordering.api import (
    quantile_normalize,
    soft_median,
    soft_permutation,
    soft_quantile,
    soft_quantize,
    soft_rank,
    soft_sort,
    soft_sort_by,
)

__all__ = [
    "quantile_normalize",
    "soft_median",
    "soft_permutation",
    "soft_quantile",
    "soft_quantize",
    "soft_rank",
    "soft_sort",
    "soft_sort_by",
]
