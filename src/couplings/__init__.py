"""Differentiable discrete operators for PyTorch: exact to a certificate, differentiable to any order, fast."""

from importlib.metadata import version as _version

from couplings import beam, distributed, losses, nn, testing
from couplings.attention import topk_attention
from couplings.losses.contrastive import EmbeddingDiagnostics, diagnostics
from couplings.losses.heatmap import similarity_heatmap
from couplings.matching import (
    gumbel_sinkhorn,
    hard_assignment,
    log_optimal_transport,
    match_with_dustbin,
    mutual_matches,
    sinkhorn_normalize,
)
from couplings.ordering import (
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
    wasserstein_1d,
)
from couplings.selection import soft_topk, soft_topk_mask
from couplings.similarity import MaxSimTopK, chamfer, maxsim, maxsim_topk
from couplings.transport import Coupling, Status, sinkhorn_divergence, solve

__version__ = _version("couplings")

__all__ = [
    "Coupling",
    "EmbeddingDiagnostics",
    "MaxSimTopK",
    "OrderCertificate",
    "Status",
    "beam",
    "chamfer",
    "diagnostics",
    "distributed",
    "gumbel_sinkhorn",
    "hard_assignment",
    "log_optimal_transport",
    "losses",
    "match_with_dustbin",
    "maxsim",
    "maxsim_topk",
    "mutual_matches",
    "nn",
    "order_certificate",
    "quantile_normalize",
    "similarity_heatmap",
    "sinkhorn_divergence",
    "sinkhorn_normalize",
    "soft_median",
    "soft_permutation",
    "soft_quantile",
    "soft_quantize",
    "soft_rank",
    "soft_sort",
    "soft_sort_by",
    "soft_topk",
    "soft_topk_mask",
    "solve",
    "testing",
    "topk_attention",
    "wasserstein_1d",
]
