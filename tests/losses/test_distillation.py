"""Distillation: torch's KL, masks, limits, gradients, messages."""

import pytest
import torch

from couplings.losses.distillation import distillation_loss
from couplings.similarity import maxsim


def draw(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(4, 6, generator=g), 3 * torch.randn(4, 6, generator=g)
    mask = torch.rand(4, 6, generator=g) > 0.3
    return student.to(dtype), teacher.to(dtype), mask


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_equal_to_torch(temperature):
    student, teacher, _ = draw()
    expected = temperature**2 * torch.nn.functional.kl_div(
        (student / temperature).log_softmax(-1),
        (teacher / temperature).log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    for reduction, value in (("none", expected), ("sum", expected.sum()), ("mean", expected.mean())):
        found = distillation_loss(student, teacher, temperature=temperature, reduction=reduction)
        torch.testing.assert_close(found, value)


def test_masked_candidates_play_no_part():
    student, teacher, mask = draw()
    mask[3] = False
    dirty = student.masked_fill(~mask, torch.nan).requires_grad_()
    found = distillation_loss(dirty, teacher.masked_fill(~mask, torch.inf), mask=mask, reduction="none")
    for row in range(3):
        one = distillation_loss(student[row][mask[row]], teacher[row][mask[row]])
        torch.testing.assert_close(found[row], one)
    assert found[3] == 0
    found.sum().backward()
    assert (dirty.grad[~mask] == 0).all()
    assert dirty.grad.isfinite().all()


def test_zero_at_the_teacher_and_shift_invariant():
    student, teacher, mask = draw()
    loss = distillation_loss(teacher + 5, teacher, mask=mask)
    assert abs(loss.item()) < 1e-12
    torch.testing.assert_close(
        distillation_loss(student + 3, teacher - 2), distillation_loss(student, teacher), atol=1e-12, rtol=0
    )
    assert distillation_loss(student, teacher).item() > 0


def test_a_candidate_the_teacher_rules_out():
    student, teacher, _ = draw()
    teacher[0, 2] = -torch.inf
    leaf = student.clone().requires_grad_()
    loss = distillation_loss(leaf, teacher)
    loss.backward()
    assert loss.isfinite()
    assert leaf.grad.isfinite().all()
    assert leaf.grad[0, 2] > 0
    ruled_out = student.index_fill(1, torch.tensor([1]), -torch.inf)
    assert distillation_loss(ruled_out, teacher).item() == torch.inf


def test_gradients_and_transforms():
    student, teacher, mask = draw()

    def loss(s, t):
        return distillation_loss(s, t, mask=mask, temperature=2.0)

    inputs = (student.requires_grad_(), teacher.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)
    (expected,) = torch.autograd.grad(loss(*inputs), student)
    torch.testing.assert_close(torch.func.grad(loss)(student, teacher), expected)
    rows = torch.func.vmap(lambda s, t: distillation_loss(s, t))(student, teacher)
    torch.testing.assert_close(rows, distillation_loss(student, teacher, reduction="none"))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), loss(*inputs))
    torch._dynamo.reset()


def test_half_precision_is_computed_in_float32():
    student, teacher, mask = draw(torch.bfloat16)
    found = distillation_loss(student, teacher.float(), mask=mask)
    assert found.dtype == torch.bfloat16
    expected = distillation_loss(student.double(), teacher.double(), mask=mask)
    assert found.item() == pytest.approx(expected.item(), rel=2**-8)


def test_maxsim_candidates_learn_the_teachers_order():
    g = torch.Generator().manual_seed(1)
    queries = torch.randn(8, 4, 6, generator=g).requires_grad_()
    documents, mask = torch.randn(8, 5, 7, 6, generator=g), torch.rand(8, 5, 7, generator=g) > 0.2
    teacher = torch.randn(8, 5, generator=g) * 3
    optimizer = torch.optim.Adam([queries], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        scores = maxsim(queries, documents, document_mask=mask, layout="candidates", normalize=True)
        distillation_loss(scores * 3, teacher).backward()
        optimizer.step()
    assert (scores.argmax(-1) == teacher.argmax(-1)).float().mean() > 0.8


@pytest.mark.parametrize(
    ("argument", "options", "error"),
    [
        ("scores", {"scores": [1.0]}, TypeError),
        ("scores", {"scores": torch.ones(3, dtype=torch.int64)}, TypeError),
        ("scores", {"scores": torch.tensor(1.0)}, ValueError),
        ("scores", {"scores": torch.ones(3, 0)}, ValueError),
        ("teacher_scores", {"teacher_scores": [1.0]}, TypeError),
        ("teacher_scores", {"teacher_scores": torch.ones(4, 5)}, ValueError),
        ("teacher_scores", {"teacher_scores": torch.ones(6, device="meta")}, ValueError),
        ("mask", {"mask": torch.ones(4, 6)}, TypeError),
        ("mask", {"mask": torch.ones(5, 6, dtype=torch.bool)}, ValueError),
        ("temperature", {"temperature": 0.0}, ValueError),
        ("temperature", {"temperature": float("nan")}, ValueError),
        ("temperature", {"temperature": "hot"}, TypeError),
        ("reduction", {"reduction": "batchmean"}, ValueError),
    ],
)
def test_bad_input(argument, options, error):
    arguments = {"scores": torch.randn(4, 6), "teacher_scores": torch.randn(4, 6), **options}
    with pytest.raises(error, match=f"^{argument}: expected .+, got ") as caught:
        distillation_loss(**arguments)
    assert type(caught.value) is error
