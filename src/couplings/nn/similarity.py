"""Late interaction as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from couplings.similarity import maxsim


class MaxSim(nn.Module):
    r"""``maxsim`` as a module.

    Args:
        layout, reduction, normalize, temperature, topk, empty: as in ``couplings.maxsim``.

    Example:
        >>> import torch
        >>> queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> MaxSim()(queries, torch.tensor([[[0.5, 0.0], [0.0, 2.0]], [[1.0, 1.0], [0.0, 0.0]]]))
        tensor([[2.5000, 2.0000]])
    """

    def __init__(
        self,
        *,
        layout: str = "all_pairs",
        reduction: str = "sum",
        normalize: bool = False,
        temperature: float | None = None,
        topk: int | None = None,
        empty: float = 0.0,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.reduction = reduction
        self.normalize = normalize
        self.temperature = temperature
        self.topk = topk
        self.empty = empty

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._settings().items())

    def _settings(self) -> dict[str, Any]:
        names = ("layout", "reduction", "normalize", "temperature", "topk", "empty")
        return {name: getattr(self, name) for name in names}

    def forward(
        self,
        queries: Tensor | list[Tensor] | tuple[Tensor, ...],
        documents: Tensor | list[Tensor] | tuple[Tensor, ...],
        *,
        query_mask: Tensor | None = None,
        document_mask: Tensor | None = None,
    ) -> Tensor:
        """Queries (Nq, Lq, d) and documents as the layout says -> scores."""
        return maxsim(
            queries, documents, query_mask=query_mask, document_mask=document_mask, **self._settings()
        )
