"""Pictures of the alignment experiment: diagnostics over steps, and similarities before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
import torch

import couplings as cp
from couplings_experiments.report.blocks import Figure
from couplings_experiments.report.figures import COLOURS, FAINT, drawing

_PANELS: dict[str, Callable[[dict[str, Any]], float]] = {
    "found, %": lambda point: 100 * fmean(point["accuracy"]),
    "effective rank": lambda point: fmean(point["rank"]),
    "alignment": lambda point: point["alignment"],
    "uniformity": lambda point: fmean(point["uniformity"]),
}
_STYLES = ("-", (0, (4, 2)), ":", "-.")


def curves(result: dict[str, Any], labels: Mapping[str, str], starts: Mapping[str, str]) -> Figure:
    """A row of panels for each loss, a line for each start; crosses where all vectors are one."""
    trained = result["trained"]
    with drawing("alignment-curves", 7.8, 0.9 + 1.15 * len(trained)) as (canvas, out):
        grid = canvas.subplots(len(trained), len(_PANELS), sharex=True, squeeze=False)
        for place, what in zip(grid[0], _PANELS, strict=True):
            place.set_title(what, fontsize=9)
        for line, (name, found) in zip(grid, trained.items(), strict=True):
            for place, read in zip(line, _PANELS.values(), strict=True):
                for (key, units), colour, style in zip(found.items(), COLOURS, _STYLES, strict=False):
                    steps = [point["step"] for point in units[0]["history"]]
                    values = np.mean([[read(point) for point in unit["history"]] for unit in units], 0)
                    dead = np.all([[point["collapsed"] for point in unit["history"]] for unit in units], 0)
                    place.plot(steps, values, color=colour, linestyle=style, linewidth=1.4, label=starts[key])
                    thinned = dead & (np.arange(len(steps)) % max(1, len(steps) // 8) == 0)
                    place.plot(np.asarray(steps)[thinned], values[thinned], "x", color=colour, markersize=4)
                place.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.6)
                place.tick_params(labelsize=7)
            line[0].set_ylabel(labels[name], fontsize=8)
        for place in grid[-1]:
            place.set_xlabel("step", fontsize=8)
        handles, names = grid[0][0].get_legend_handles_labels()
        canvas.legend(handles, names, loc="outside lower center", ncols=len(starts), fontsize=8)
    return Figure(
        out[-1],
        "Diagnostics of the validation images during training, means over seeds and over both halves. Alignment is the "
        "mean squared distance of the two of a pair, uniformity the log of the mean of exp(-2 distance²) over others "
        "(0: all equal). A cross: the flag `collapsed` is set.",
        "Line charts by step, a row for each loss. At the end the effective rank is "
        + "; ".join(
            f"{labels[name]} "
            + ", ".join(
                f"{starts[key]} {fmean(fmean(unit['history'][-1]['rank']) for unit in units):.1f}"
                for key, units in found.items()
            )
            for name, found in trained.items()
        )
        + ".",
    )


def heatmaps(pictured: dict[str, Any], label: str, starts: Mapping[str, str]) -> Figure:
    """Cosines of left halves with right halves, before training above, after it below."""
    small: Any = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8}
    with drawing("alignment-similarities", 7.8, 4.6) as (canvas, out), matplotlib.rc_context(small):
        grid = canvas.subplots(2, len(pictured), squeeze=False)
        means = []
        for column, (key, found) in enumerate(pictured.items()):
            for line, when in enumerate(("before", "after")):
                left, right = (torch.tensor(side) for side in found[when])
                place = grid[line, column]
                cp.similarity_heatmap(left, right, annotate=False, title=f"{starts[key]}, {when}", axes=place)
                place.set(xlabel="right halves", ylabel="left halves", xticks=[], yticks=[])
                seen = cp.diagnostics(left, right, rows=len(left))
                means.append(f"{starts[key]} {when}: {seen.diagonal:.2f} and {seen.off_diagonal:.2f}")
    return Figure(
        out[-1],
        f"Cosines of left with right halves of test images, three of each label in the order of the labels; {label}, "
        "first seed. A pair is on the diagonal; blocks along it are halves of images of one label.",
        f"Heat maps. Mean cosine of pairs and of all others: {'; '.join(means)}.",
    )
