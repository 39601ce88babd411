"""Matching: couplings with dustbins, their discrete readings, doubly stochastic matrices."""

from couplings.matching.api import Dustbin, log_optimal_transport, match_with_dustbin
from couplings.matching.mutual import Matches, mutual_matches

__all__ = ["Dustbin", "Matches", "log_optimal_transport", "match_with_dustbin", "mutual_matches"]
