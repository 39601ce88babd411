"""Each rank's rows against the rows of all ranks, scaled so that the mean over ranks is the joined batch's loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from couplings import losses
from couplings._autocast import full_precision
from couplings._checks import choice, describe, reject
from couplings.distributed import gather_losses, ring_losses
from couplings.distributed.collectives import Group, agree, position
from couplings.distributed.sides import Sides, each_row
from couplings.losses.contrastive.prepare import check_options, prepare

FAMILIES: dict[Callable[..., Tensor], str] = {
    losses.n_pairs_loss: "softmax",
    losses.info_nce_loss: "softmax",
    losses.clip_loss: "softmax",
    losses.nt_xent_loss: "views",
    losses.sigmoid_loss: "sigmoid",
    losses.triplet_loss: "triplet",
    losses.cosine_target_loss: "square",
}
"""What is done for each loss."""


def contrastive(
    loss: Callable[..., Tensor],
    x1: Tensor,
    x2: Tensor,
    *,
    group: Group = None,
    mode: str = "gather",
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """A cross-similarity loss with the rows of all ranks: each rank's own rows against everybody's.

    With the default reduction the mean over ranks of what is returned is the loss of the joined batch (the ranks' rows
    one below the other), and the mean over ranks of the parameters' gradients is its gradient. That mean is what
    ``DistributedDataParallel`` takes, for a learned temperature too if it is a parameter of the wrapped module; without
    DDP, all-reduce the gradients and divide by the number of ranks. ``backward`` must be called on every rank.

    Without an initialised process group, and in a group of one, it is ``loss(x1, x2, reduction=reduction, **options)``.

    Args:
        loss: one of ``couplings.losses.n_pairs_loss``, ``info_nce_loss``, ``clip_loss``, ``nt_xent_loss``,
            ``sigmoid_loss``, ``triplet_loss``, ``cosine_target_loss``.
        x1: (n, d) this rank's rows; ranks may differ in n, and n >= 1.
        x2: (n, d) their counterparts.
        group: a process group (gloo, nccl); None is the default one.
        mode: "gather" gathers the rows of all ranks, O(total rows d) memory. "ring" passes them on from rank to rank,
            O(n d) memory, for all but ``triplet_loss``; first derivatives only, and neither ``negatives`` nor ``guide``
            nor ``similarity``. Both give the same values and gradients.
        reduction: "mean" and "sum" as above; "none" gives the values of this rank's rows, (n,) ((2n,) for
            ``nt_xent_loss``), unscaled: the loss's own "none" on the joined batch, a rank's part of it.
        options: the loss's own, with this rank's part of ``groups``, ``mask`` and ``negatives`` (which are all
            gathered; a group may have members on many ranks). ``guide`` takes embeddings, not scores, and not for
            ``sigmoid_loss``. ``offset`` is set here. They must be alike on all ranks.

    Returns:
        A scalar, or (n,) with ``reduction="none"``, in the dtype of x1.

    Raises:
        TypeError, ValueError: as ``loss``; ranks that differ in dtype, d or in which arguments they pass; options
            that the mode lacks. Where one rank's tensors are at fault, every rank raises.

    Reference:
        Radford et al.: Learning transferable visual models from natural language supervision, ICML 2021 (gather). Zhai,
        Mustafa, Kolesnikov, Beyer: Sigmoid loss for language image pre-training, ICCV 2023 (ring).

    Example:
        >>> import torch
        >>> from couplings import losses
        >>> x = torch.eye(4)  # one process: the loss itself
        >>> round(contrastive(losses.clip_loss, x, x, temperature=1.0).item(), 4)
        0.7437
    """
    if loss not in FAMILIES:
        known = ", ".join(f"losses.{f.__name__}" for f in FAMILIES)
        reject("loss", f"one of {known}", describe(loss), "Pass the function, not the module.")
    choice("mode", mode, ("gather", "ring"))
    if "offset" in options:
        reject("offset", "none: it is this rank's place in the batch", options["offset"], "Leave it out.")
    bound = inspect.signature(loss).bind(x1, x2, reduction=reduction, **options)
    bound.apply_defaults()
    given = bound.arguments
    check_options(reduction, "each")
    family = FAMILIES[loss]
    _check_mode(mode, family, given)
    if position(group)[1] == 1:
        return loss(x1, x2, reduction=reduction, **options)
    given["symmetric"] = loss is losses.clip_loss or given.get("symmetric", False)
    try:
        _check_local(given, family)
    except (TypeError, ValueError) as error:
        agree({}, group, error)
    with full_precision(x1):
        sides = Sides(given, group)
        found = _RUN[mode, family](sides, given)
        if reduction == "none":
            return found.to(x1.dtype)
        # each rank holds its rows' share of a sum: times the number of ranks, their mean is that sum
        return (found * sides.size).to(x1.dtype)


def _check_mode(mode: str, family: str, given: dict[str, Any]) -> None:
    for name in ("negatives", "guide", "similarity") if mode == "ring" else ():
        if given.get(name) is not None:
            reject(name, "None with mode='ring'", describe(given[name]), "Use mode='gather'.")
    if mode == "ring" and family == "triplet":
        reject("mode", "'gather' for triplet_loss", repr(mode), "A ring would have to mine twice.")
    guide = given.get("guide")
    if guide is None:
        return
    if not isinstance(guide, tuple) or len(guide) != 2:
        reject(
            "guide",
            "a tuple of embeddings of x1 and x2",
            describe(guide),
            "Scores would lack other ranks' columns.",
        )
    if family == "sigmoid":
        reject("guide", "None for sigmoid_loss on several ranks", "a guide", "Mark duplicates by groups.")


def _check_local(given: dict[str, Any], family: str) -> None:
    """What the loss itself would say to this rank's tensors."""
    x1, x2 = given["x1"], given["x2"]
    if x2 is None:
        reject("x2", "a tensor", "None", "Scores of other ranks' rows cannot be known here: pass embeddings.")
    names = ("normalize", "groups", "mask", "guide", "similarity")
    negatives = given.get("negatives")
    each = each_row(negatives, given)
    with torch.no_grad():
        shared = {name: given[name] for name in names if name in given}
        prepare(x1, x2, **shared, negatives=None if each else negatives)
    if x1.shape[0] != x2.shape[0]:
        reject("x2", f"{x1.shape[0]} rows, as x1 has", describe(x2), "Pass more candidates as negatives=.")
    if given["symmetric"] and negatives is not None and "mining" in given:
        reject("negatives", "None where symmetric=True", describe(negatives), "Pass symmetric=False.")
    if each and negatives is not None and negatives.shape[0] != x1.shape[0]:
        reject(
            "negatives",
            f"k negatives for each of {x1.shape[0]} rows",
            describe(negatives),
            "Or (k, d) for all.",
        )
    for name in ("groups", "mask") if family == "views" else ():
        if isinstance(given[name], tuple):
            reject(name, "one tensor, for both views", describe(given[name]), "Pass one value for each item.")


_RUN: dict[tuple[str, str], Callable[[Sides, dict[str, Any]], Tensor]] = {
    ("gather", "softmax"): gather_losses.softmax,
    ("gather", "views"): gather_losses.views,
    ("gather", "sigmoid"): gather_losses.sigmoid,
    ("gather", "triplet"): gather_losses.triplet,
    ("gather", "square"): gather_losses.square,
    ("ring", "softmax"): ring_losses.softmax,
    ("ring", "views"): ring_losses.views,
    ("ring", "sigmoid"): ring_losses.sigmoid,
    ("ring", "square"): ring_losses.square,
}
