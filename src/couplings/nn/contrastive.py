"""Cross-similarity losses as modules: settings and learned temperature in the module, embeddings in the call."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from couplings import losses
from couplings._checks import describe, reject


class _Contrastive(nn.Module):
    """Settings of a loss, passed on by name; ``options`` are those of the function."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class _Tempered(_Contrastive):
    """A loss with a temperature, a number or a parameter, kept positive by its logarithm."""

    def __init__(self, temperature: float, *, learn_temperature: bool = False, **options: Any) -> None:
        super().__init__(**options)
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
            reject("temperature", "a number", describe(temperature), "Pass a float > 0.", TypeError)
        if not (math.isfinite(temperature) and temperature > 0):
            reject("temperature", "a finite number > 0", temperature, "Raise it.")
        value = torch.tensor(math.log(temperature))
        self.log_temperature = nn.Parameter(value) if learn_temperature else None
        self.fixed_temperature = float(temperature)

    @property
    def temperature(self) -> float | Tensor:
        """The current temperature; a tensor if it is learned."""
        return self.fixed_temperature if self.log_temperature is None else self.log_temperature.exp()

    def extra_repr(self) -> str:
        text = f"temperature={float(self.temperature):g}"
        if self.log_temperature is not None:
            text += " (learned)"
        return ", ".join(filter(None, (text, super().extra_repr())))


class NPairsLoss(_Tempered):
    """``losses.n_pairs_loss`` as a module.

    Args:
        temperature: a number > 0; the parameter's first value with ``learn_temperature=True``.
        learn_temperature: whether it is a parameter.
        options: the other keyword arguments of ``couplings.losses.n_pairs_loss``.

    Example:
        >>> import torch
        >>> NPairsLoss(0.1)(torch.eye(3), torch.eye(3)) < 1e-3
        tensor(True)
    """

    def forward(self, x1: Tensor, x2: Tensor, **extra: Any) -> Tensor:
        """x1 (n, d), x2 (m, d), and per call what belongs to the batch: ``groups``, ``mask``, .. -> a scalar."""
        return losses.n_pairs_loss(x1, x2, temperature=self.temperature, **self.options, **extra)


class InfoNCELoss(_Tempered):
    """``losses.info_nce_loss`` as a module.

    Args:
        temperature: a number > 0; the parameter's first value with ``learn_temperature=True``.
        learn_temperature: whether it is a parameter.
        options: the other keyword arguments of ``couplings.losses.info_nce_loss``.

    Example:
        >>> import torch
        >>> InfoNCELoss()(torch.eye(3), torch.eye(3)) < 1e-3
        tensor(True)
    """

    def __init__(self, temperature: float = 0.07, **options: Any) -> None:
        super().__init__(temperature, **options)

    def forward(self, x1: Tensor, x2: Tensor, **extra: Any) -> Tensor:
        """x1 (n, d), x2 (m, d), and per call what belongs to the batch: ``groups``, ``mask``, .. -> a scalar."""
        return losses.info_nce_loss(x1, x2, temperature=self.temperature, **self.options, **extra)


class CLIPLoss(_Tempered):
    """``losses.clip_loss`` as a module.

    Args:
        temperature: a number > 0; the parameter's first value with ``learn_temperature=True``.
        learn_temperature: whether it is a parameter.
        options: the other keyword arguments of ``couplings.losses.clip_loss``.

    Example:
        >>> import torch
        >>> CLIPLoss(learn_temperature=True)(torch.eye(3), torch.eye(3)) < 1e-3
        tensor(True)
    """

    def __init__(self, temperature: float = 0.07, **options: Any) -> None:
        super().__init__(temperature, **options)

    def forward(self, x1: Tensor, x2: Tensor, **extra: Any) -> Tensor:
        """x1 (n, d), x2 (m, d), and per call what belongs to the batch: ``groups``, ``mask``, .. -> a scalar."""
        return losses.clip_loss(x1, x2, temperature=self.temperature, **self.options, **extra)


class NTXentLoss(_Tempered):
    """``losses.nt_xent_loss`` as a module.

    Args:
        temperature: a number > 0; the parameter's first value with ``learn_temperature=True``.
        learn_temperature: whether it is a parameter.
        options: the other keyword arguments of ``couplings.losses.nt_xent_loss``.

    Example:
        >>> import torch
        >>> NTXentLoss(0.05)(torch.eye(3), torch.eye(3)) < 1e-3
        tensor(True)
    """

    def __init__(self, temperature: float = 0.5, **options: Any) -> None:
        super().__init__(temperature, **options)

    def forward(self, x1: Tensor, x2: Tensor, **extra: Any) -> Tensor:
        """x1 and x2 (n, d), and per call what belongs to the batch: ``groups``, ``mask``, .. -> a scalar."""
        return losses.nt_xent_loss(x1, x2, temperature=self.temperature, **self.options, **extra)


class SigmoidLoss(_Tempered):
    """``losses.sigmoid_loss`` as a module, with temperature and bias as parameters by default, as in SigLIP.

    Args:
        temperature: a number > 0, the parameter's first value.
        bias: the bias' first value.
        learn_temperature: whether both are parameters.
        options: the other keyword arguments of ``couplings.losses.sigmoid_loss``.

    Example:
        >>> import torch
        >>> SigmoidLoss(0.05)(torch.eye(3), torch.eye(3)) < 1e-3
        tensor(True)
    """

    def __init__(
        self, temperature: float = 0.1, bias: float = -10.0, *, learn_temperature: bool = True, **options: Any
    ) -> None:
        super().__init__(temperature, learn_temperature=learn_temperature, **options)
        value = torch.tensor(float(bias))
        self.bias = nn.Parameter(value) if learn_temperature else float(bias)

    def forward(self, x1: Tensor, x2: Tensor, **extra: Any) -> Tensor:
        """x1 (n, d), x2 (m, d), and per call what belongs to the batch: ``groups``, ``mask``, .. -> a scalar."""
        return losses.sigmoid_loss(
            x1, x2, temperature=self.temperature, bias=self.bias, **self.options, **extra
        )


class TripletLoss(_Contrastive):
    """``losses.triplet_loss`` as a module.

    Args:
        options: the keyword arguments of ``couplings.losses.triplet_loss``.

    Example:
        >>> import torch
        >>> TripletLoss(margin=0.2)(torch.eye(3), torch.eye(3))
        tensor(0.)
    """

    def forward(self, x1: Tensor, x2: Tensor, **extra: Any) -> Tensor:
        """x1 (n, d), x2 (m, d), and per call what belongs to the batch: ``groups``, ``mask``, .. -> a scalar."""
        return losses.triplet_loss(x1, x2, **self.options, **extra)


class CosineTargetLoss(_Contrastive):
    """``losses.cosine_target_loss`` as a module.

    Args:
        options: the keyword arguments of ``couplings.losses.cosine_target_loss``.

    Example:
        >>> import torch
        >>> CosineTargetLoss(target=0.0)(torch.eye(3), torch.eye(3))
        tensor(0.)
    """

    def forward(self, x1: Tensor, x2: Tensor, **extra: Any) -> Tensor:
        """x1 (n, d), x2 (m, d), and per call what belongs to the batch: ``groups``, ``mask``, .. -> a scalar."""
        return losses.cosine_target_loss(x1, x2, **self.options, **extra)
