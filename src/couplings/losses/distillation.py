"""Knowledge distillation of rankings: a student's scores of a list of candidates towards a teacher's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from couplings import _checks
from couplings.losses.ranking.lists import check_lists, reduce


def distillation_loss(
    scores: Tensor,
    teacher_scores: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""KL divergence of the student's softmax over candidates from the teacher's, times temperature squared.

    For each list, t^2 sum_j p_j (log p_j - log s_j) with p = softmax(teacher_scores / t), s = softmax(scores / t).
    Hinton's factor t^2 keeps the gradient's size as t grows: it tends to that of half the squared error of centred
    scores over n. The minimum is 0, where the scores differ by a constant. Any scores do, those of
    ``maxsim(..., layout="candidates")`` for one; ``dtype=torch.float32`` there keeps half precision from rounding them.

    Args:
        scores: (\*batch, n) student's scores, float64, float32, bfloat16 or float16.
        teacher_scores: broadcasts to scores' shape, of any real dtype. A teacher's -inf gives its candidate
            probability 0. Gradients flow into it too: detach it if it is a network's output.
        mask: bool, broadcasts to scores' shape, True = takes part. A list without valid candidates has loss 0.
        temperature: t > 0; larger values compare more of the list than its top.
        reduction: ``"mean"`` over lists, ``"sum"`` or ``"none"`` for (\*batch).

    Returns:
        A scalar, or (\*batch) with ``reduction="none"``, in the dtype of ``scores``. A list that holds NaN is NaN.

    Raises:
        TypeError: scores that are not floating point, a mask that is not bool.
        ValueError: shapes that do not fit, a temperature that is not positive, an unknown reduction.

    Reference:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, section 2.

    Example:
        >>> import torch
        >>> from couplings.losses.distillation import distillation_loss
        >>> teacher = torch.tensor([[9.0, 5.0, 1.0]])
        >>> distillation_loss(teacher - 7, teacher).item()
        0.0
        >>> round(distillation_loss(torch.zeros(1, 3), teacher, temperature=4.0).item(), 2)
        4.26
    """
    check_lists("scores", scores)
    given: object = teacher_scores
    if not isinstance(given, Tensor) or given.is_complex():
        _checks.reject(
            "teacher_scores",
            "a tensor of real numbers",
            _checks.describe(teacher_scores),
            "Pass the teacher's scores as a tensor.",
            TypeError,
        )
    _checks.same_device("teacher_scores", teacher_scores, scores, "scores")
    _checks.broadcastable("teacher_scores", teacher_scores, scores.shape, "one score per candidate")
    if mask is not None:
        _checks.bool_tensor("mask", mask)
        _checks.same_device("mask", mask, scores, "scores")
        _checks.broadcastable("mask", mask, scores.shape, "the shape of scores")
        mask = mask.expand(scores.shape)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        _checks.reject("temperature", "a float", _checks.describe(temperature), "Pass 1.0.", TypeError)
    if not 0 < temperature < math.inf:
        _checks.reject("temperature", "a positive finite number", temperature, "Pass 1.0.")
    _checks.choice("reduction", reduction, ("mean", "sum", "none"))
    dtype = torch.promote_types(scores.dtype, torch.float32)
    student = scores.to(dtype) / temperature
    teacher = teacher_scores.expand(scores.shape).to(dtype) / temperature
    idle = None
    if mask is not None:
        idle = ~mask.any(-1, keepdim=True)  # such a list is compared with itself below
        student = student.masked_fill(~mask, -math.inf).masked_fill(idle, 0)
        teacher = teacher.masked_fill(~mask, -math.inf).masked_fill(idle, 0)
    log_p, log_s = teacher.log_softmax(-1), student.log_softmax(-1)
    p = log_p.exp()
    # 0 log 0 = 0: where the teacher sees nothing, neither logarithm is touched
    nothing = log_p == -math.inf
    gap = torch.where(nothing, 0, log_p) - torch.where(nothing, 0, log_s)
    loss = temperature**2 * (p * gap).sum(-1)
    return reduce(loss, reduction, scores.dtype)
