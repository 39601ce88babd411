"""What each loss says of three batches: all vectors equal, all equal with opposite sides, and healthy random ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import couplings as cp

ROWS, WIDTH = 7, 768
SCENARIOS = ("all equal", "all equal, x2 = -x1", "random, x2 = x1")

# on raw cosines, as the question was asked: no temperature, no bias
RAW: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "n-pairs": ("N-pairs", partial(cp.losses.n_pairs_loss, temperature=1.0)),
    "info-nce": ("InfoNCE", partial(cp.losses.info_nce_loss, temperature=1.0)),
    "clip": ("CLIP", partial(cp.losses.clip_loss, temperature=1.0)),
    "nt-xent": ("NT-Xent", partial(cp.losses.nt_xent_loss, temperature=1.0)),
    "sigmoid": ("SigLIP", partial(cp.losses.sigmoid_loss, temperature=1.0, bias=0.0)),
    "triplet": ("triplet", cp.losses.triplet_loss),
    "cosine-target": ("cosine target", cp.losses.cosine_target_loss),
    "cosine-target-low": (
        "cosine target -1, above its floor",
        partial(cp.losses.cosine_target_loss, target=-1.0),
    ),
    "guard": ("collapse guard", cp.losses.collapse_guard),
}


def scenarios(draws: int) -> dict[str, Any]:
    """Of each loss in each scenario the mean value and gradient norm; of each scenario how often it is "collapsed"."""
    values: dict[str, list[list[float]]] = {name: [[] for _ in SCENARIOS] for name in RAW}
    slopes: dict[str, list[list[float]]] = {name: [[] for _ in SCENARIOS] for name in RAW}
    flags: list[list[bool]] = [[] for _ in SCENARIOS]
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        for number, (x1, x2) in enumerate(_draw(generator)):
            flags[number].append(cp.diagnostics(x1, x2).collapsed)
            for name, (_, loss) in RAW.items():
                leaves = x1.clone().requires_grad_(), x2.clone().requires_grad_()
                value = loss(*leaves)
                value.backward()
                values[name][number].append(value.item())
                slopes[name][number].append(float(torch.stack([x.grad.norm() for x in leaves]).norm()))  # type: ignore[union-attr]
    return {
        "draws": draws,
        "collapsed": [fmean(found) for found in flags],
        "losses": {
            name: {
                "label": label,
                "value": [fmean(found) for found in values[name]],
                "gradient": [fmean(found) for found in slopes[name]],
            }
            for name, (label, _) in RAW.items()
        },
    }


def _draw(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    same = torch.rand(WIDTH, generator=generator, dtype=torch.float64).expand(ROWS, WIDTH).contiguous()
    random = torch.rand(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    return [(same, same), (same, -same), (random, random)]
