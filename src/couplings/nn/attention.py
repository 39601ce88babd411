"""Top-k attention in the place of ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from couplings import _checks
from couplings.attention import topk_attention


class TopKAttention(nn.MultiheadAttention):
    r"""``torch.nn.MultiheadAttention`` in which each query attends to its ``topk`` best sources, softly.

    Same parameters, arguments, masks (True = may *not* be attended to, as there) and state dict: replace the
    class, load the weights. See ``couplings.topk_attention`` for what is computed.

    Args:
        embed_dim, num_heads: as in ``torch.nn.MultiheadAttention``.
        topk: how many sources, a number, or a tensor that broadcasts to (N, num_heads, L): one per head is
            ``torch.tensor([[4], [8]])``.
        epsilon, method, hard: as in ``couplings.topk_attention``.
        options: as in ``torch.nn.MultiheadAttention``, but ``add_bias_kv`` and ``add_zero_attn``.

    Example:
        >>> import torch
        >>> layer = TopKAttention(8, 2, topk=3, batch_first=True)
        >>> x = torch.randn(4, 5, 8)
        >>> out, weights = layer(x, x, x)
        >>> out.shape, weights.shape
        (torch.Size([4, 5, 8]), torch.Size([4, 5, 5]))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        topk: int | float | Tensor,
        *,
        epsilon: float | None = None,
        method: str = "transport",
        hard: bool = False,
        **options: Any,
    ) -> None:
        for name in ("add_bias_kv", "add_zero_attn"):
            if options.get(name):
                _checks.reject(name, "False", True, "An added source would always be among the candidates.")
        super().__init__(embed_dim, num_heads, **options)
        if isinstance(topk, Tensor):
            self.register_buffer("topk", topk, persistent=False)
        else:
            self.topk = topk
        self.epsilon = epsilon
        self.method = method
        self.hard = hard

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, topk={self.topk}, "
            f"epsilon={self.epsilon}, method={self.method!r}, hard={self.hard}"
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        r"""As ``torch.nn.MultiheadAttention``: (output, weights or None)."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._projected(query, key, value)
        mask, bias = self._masks(key_padding_mask, attn_mask, q, k)
        out = topk_attention(
            q,
            k,
            v,
            self.topk,
            epsilon=self.epsilon,
            mask=mask,
            causal=is_causal and attn_mask is None,
            bias=bias,
            dropout_p=self.dropout if self.training else 0.0,
            method=self.method,
            hard=self.hard,
            return_weights=need_weights,
        )
        attended, weights = out if isinstance(out, tuple) else (out, None)
        attended = self.out_proj(attended.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return attended[0], None if weights is None else weights[0]
        return attended if self.batch_first else attended.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, (N, heads, length, head_dim)."""
        joint: Tensor | None = self.in_proj_bias
        biases = (None,) * 3 if joint is None else joint.chunk(3)
        if self._qkv_same_embed_dim:
            matrices = self.in_proj_weight.chunk(3)
        else:
            matrices = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return tuple(
            nn.functional.linear(x, matrix, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, matrix, bias in zip((query, key, value), matrices, biases, strict=True)
        )

    def _masks(
        self, padding: Tensor | None, attention: Tensor | None, q: Tensor, k: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """torch's masks (True = out, or a float bias) as ours (True = in) and a bias."""
        mask: Tensor | None = None
        bias: Tensor | None = None
        if attention is not None and attention.dim() == 3:
            attention = attention.unflatten(0, (q.shape[0], self.num_heads))
        if padding is not None:
            padding = padding[:, None, None, :]
        for given in (padding, attention):
            if given is None:
                continue
            if given.dtype == torch.bool:
                mask = ~given if mask is None else mask & ~given
            else:
                bias = given.to(q.dtype) if bias is None else bias + given.to(q.dtype)
        return mask, bias
