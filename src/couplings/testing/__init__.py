"""Problems with known difficulties, independent float64 oracles: what the library tests itself with, and yours too."""

from couplings.testing.ordering import OrderedPlan, ordered_plan
from couplings.testing.scores import SCORE_KINDS, score_rows
from couplings.testing.similarity import maxsim_by_pairs
from couplings.testing.thresholds import sorted_plan_by_sinkhorn, topk_mask_by_bisection

__all__ = [
    "SCORE_KINDS",
    "OrderedPlan",
    "maxsim_by_pairs",
    "ordered_plan",
    "score_rows",
    "sorted_plan_by_sinkhorn",
    "topk_mask_by_bisection",
]
