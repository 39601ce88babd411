"""Differentiable discrete operators for PyTorch."""

from couplings.selection import soft_topk, soft_topk_mask

__all__ = ["soft_topk", "soft_topk_mask"]
