"""A picture of a similarity matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from couplings._checks import HALF, describe, real_tensor, reject, same_device
from couplings.losses.contrastive.prepare import unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 512
"""More rows than a figure has pixels are thinned out evenly."""


def similarity_heatmap(
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    normalize: bool = True,
    annotate: bool | None = None,
    title: str = "",
    axes: Axes | None = None,
) -> Figure:
    """The similarity matrix of two sets of embeddings as a heat map: what a contrastive loss sees.

    Args:
        x1: (n, d).
        x2: (m, d); None compares x1 with itself.
        normalize: cosines, on a colour scale from -1 to 1; otherwise dot products, on a symmetric scale.
        annotate: write the numbers into the cells; None does so up to 12 rows and columns.
        title: above the picture.
        axes: where to draw; None makes a figure of its own, which no window manager knows (close it by dropping it).

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: arguments of the wrong type or shape.

    Example:
        >>> import torch
        >>> figure = similarity_heatmap(torch.eye(3), title="identity")
        >>> figure.axes[0].get_title()
        'identity'
    """
    for name, x in (("x1", x1), ("x2", x2)):
        if x is None and name == "x2":
            continue
        real_tensor(name, x)
        if x is not None and (x.ndim != 2 or x.numel() == 0):
            reject(name, "shape (rows, features), not empty", describe(x), f"Call {name}.flatten(1).")
    x2 = x1 if x2 is None else x2
    same_device("x2", x2, x1, "x1")
    if x1.shape[1] != x2.shape[1]:
        reject("x2", f"{x1.shape[1]} features per row, as x1 has", describe(x2), "Project them to one space.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("similarity_heatmap needs matplotlib: pip install matplotlib") from error

    with torch.no_grad():
        sides = [(x.float() if x.dtype in HALF else x) for x in (_thinned(x1), _thinned(x2))]
        first, second = (unit(x) for x in sides) if normalize else sides
        scores = (first @ second.mT).cpu()
    limit = 1.0 if normalize else float(scores.abs().max()) or 1.0
    if axes is None:
        axes = Figure(figsize=(6, 5), layout="constrained").add_subplot()
    figure = axes.get_figure(root=True)
    if not isinstance(figure, Figure):
        raise TypeError("axes: expected axes that belong to a figure, got none. Pass figure.add_subplot().")
    image = axes.imshow(scores.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set(xlabel="x2", ylabel="x1", title=title)
    figure.colorbar(image, ax=axes, label="cosine" if normalize else "dot product")
    if annotate if annotate is not None else max(scores.shape) <= 12:
        for i, row in enumerate(scores.tolist()):
            for j, value in enumerate(row):
                shade = "white" if abs(value) > 0.6 * limit else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=shade)
    return figure


def _thinned(x: Tensor) -> Tensor:
    n = x.shape[0]
    return x if n <= MOST else x[torch.arange(MOST, device=x.device) * n // MOST]
