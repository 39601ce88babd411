"""Similarity of token sets: late interaction (MaxSim), its symmetric form, and exact retrieval with it."""

from couplings.similarity.api import chamfer, maxsim
from couplings.similarity.retrieval import MaxSimTopK, maxsim_topk

__all__ = ["MaxSimTopK", "chamfer", "maxsim", "maxsim_topk"]
