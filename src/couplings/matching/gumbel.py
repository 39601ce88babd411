"""``gumbel_sinkhorn``: random permutations, relaxed (Mena et al., ICLR 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from couplings._checks import broadcastable, describe, real_tensor, reject, same_device
from couplings._rowwise import seen
from couplings.matching.normalize import sinkhorn_normalize


def gumbel_sinkhorn(
    scores: Tensor,
    *,
    epsilon: float | Tensor,
    noise: float = 1.0,
    generator: torch.Generator | None = None,
    iterations: int | None = None,
    on_fail: str = "warn",
) -> Tensor:
    r"""A relaxed random permutation: sinkhorn_normalize((scores + noise * Gumbel) / epsilon).

    As epsilon tends to 0 it becomes the permutation matrix of the best assignment under the perturbed scores. The
    gradient passes through scores and epsilon with the noise held fixed (the reparametrisation trick).

    Args:
        scores: (\*batch, n, m), any real floating dtype, n = m for permutations (else rows sum to 1, columns to n / m).
            -inf forbids a pair.
        epsilon: temperature, positive: a float, or a tensor that broadcasts to batch.
        noise: factor on independent standard Gumbel variables, at least 0; 0 draws nothing.
        generator: where the numbers come from; None is torch's default one. The same seed gives the same noise, in
            every dtype up to rounding. Under ``torch.vmap`` its ``randomness=`` says whether each item draws its own;
            there, and under ``torch.compile``, torch supports the default generator only.
        iterations: as in ``sinkhorn_normalize``.
        on_fail: likewise.

    Returns:
        (\*batch, n, m) in the dtype of scores.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range. An epsilon tensor is looked at on an eager CPU;
            elsewhere what is not positive gives NaN.
        RuntimeError: ``on_fail="raise"`` and a matrix is not solved to the certificate.

    Reference:
        Mena, Belanger, Linderman, Snoek: Learning Latent Permutations with Gumbel-Sinkhorn Networks, ICLR 2018,
        arXiv 1802.08665.

    Example:
        >>> import torch
        >>> scores = torch.eye(3) * 4
        >>> plan = gumbel_sinkhorn(scores, epsilon=0.1, generator=torch.Generator().manual_seed(0))
        >>> plan.sum(-1)
        tensor([1., 1., 1.])
    """
    real_tensor("scores", scores)
    if scores.dim() < 2 or 0 in scores.shape[-2:]:
        reject(
            "scores", "shape (*batch, n, m), n and m >= 1", describe(scores), "Add the missing dimensions."
        )
    _number("noise", noise, 0.0)
    if generator is not None and not isinstance(generator, torch.Generator):
        remedy = "Pass torch.Generator(device).manual_seed(seed)."
        reject("generator", "a torch.Generator or None", describe(generator), remedy, TypeError)
    if generator is not None and generator.device.type != scores.device.type:
        remedy = f"Pass torch.Generator('{scores.device.type}')."
        reject(
            "generator", f"one on {scores.device.type}, where scores is", f"one on {generator.device}", remedy
        )
    if isinstance(epsilon, Tensor):
        real_tensor("epsilon", epsilon)
        if epsilon.dim() > 0:
            same_device("epsilon", epsilon, scores, "scores")
        broadcastable("epsilon", epsilon, scores.shape[:-2], "one epsilon per matrix")
        if seen(~(epsilon > 0)):
            reject("epsilon", "positive values", float(epsilon.min()), "Pass epsilon > 0.")
    elif not _number("epsilon", epsilon, 0.0) > 0:
        remedy = "The limit epsilon = 0 is hard_assignment(scores + noise)."
        reject("epsilon", "a number > 0", epsilon, remedy)

    work = torch.float64 if scores.dtype == torch.float64 else torch.float32
    logits = scores.to(work)
    if noise:
        logits = logits + noise * _gumbel(scores, generator).to(work)
    if isinstance(epsilon, Tensor):
        temperature = epsilon.to(device=scores.device, dtype=work)[..., None, None]
        forbidden = logits == -torch.inf  # kept out of the division: epsilon has a derivative
        logits = torch.where(forbidden, 0, logits) / torch.where(temperature > 0, temperature, torch.nan)
        logits = logits.masked_fill(forbidden, -torch.inf)
    else:
        logits = logits / epsilon
    return sinkhorn_normalize(logits, iterations=iterations, on_fail=on_fail).to(scores.dtype)


def _gumbel(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel variables in float64, all finite: between -3.7 and 36.8."""
    uniform = torch.rand(like.shape, generator=generator, dtype=torch.float64, device=like.device)
    # rand is a multiple of 2^-53 in [0, 1); 0 stands for the numbers below the next one, whose middle is 2^-54
    return -(-uniform.clamp_min(2.0**-54).log()).log()


def _number(name: str, value: object, least: float) -> float:
    """A finite Python number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        reject(name, "a number", describe(value), "Pass a float.", TypeError)
    if not (math.isfinite(value) and value >= least):
        reject(name, f"a finite number >= {least:g}", value, f"Pass {name}=1.0, say.")
    return value
