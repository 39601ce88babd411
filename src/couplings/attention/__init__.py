"""Attention to the k best sources, softly."""

from couplings.attention.api import topk_attention

__all__ = ["topk_attention"]
