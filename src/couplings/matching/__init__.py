"""Matching: couplings with dustbins, their discrete readings, doubly stochastic matrices."""

from couplings.matching.api import Dustbin, log_optimal_transport, match_with_dustbin
from couplings.matching.assignment import hard_assignment
from couplings.matching.gumbel import gumbel_sinkhorn
from couplings.matching.mutual import Matches, mutual_matches
from couplings.matching.normalize import sinkhorn_normalize

__all__ = [
    "Dustbin",
    "Matches",
    "gumbel_sinkhorn",
    "hard_assignment",
    "log_optimal_transport",
    "match_with_dustbin",
    "mutual_matches",
    "sinkhorn_normalize",
]
