"""Soft sorts, ranks, quantiles and permutations."""

from couplings.ordering.api import (
    OrderCertificate,
    order_certificate,
    quantile_normalize,
    soft_median,
    soft_permutation,
    soft_quantile,
    soft_quantize,
    soft_rank,
    soft_sort,
    soft_sort_by,
)
from couplings.ordering.wasserstein import wasserstein_1d

__all__ = [
    "OrderCertificate",
    "order_certificate",
    "quantile_normalize",
    "soft_median",
    "soft_permutation",
    "soft_quantile",
    "soft_quantize",
    "soft_rank",
    "soft_sort",
    "soft_sort_by",
    "wasserstein_1d",
]
