"""Soft top-k: which entries are among the k largest, differentiably."""

from couplings.selection.api import soft_topk, soft_topk_mask

__all__ = ["soft_topk", "soft_topk_mask"]
