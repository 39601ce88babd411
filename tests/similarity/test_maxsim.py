"""MaxSim against its definition: values, gradients of every order, precision, and what other libraries get wrong."""

import itertools

import pytest
import torch

from couplings.similarity import chamfer, maxsim, tiles
from couplings.testing.similarity import maxsim_by_pairs

WORKED = torch.tensor(
    [
        [[0.0017, 0.5781], [0.8136, 0.5971], [0.7697, 0.0795]],
        [[0.2794, 0.7285], [0.1528, 0.8503], [0.9714, 0.1060]],
        [[0.6907, 0.8831], [0.4691, 0.4254], [0.2539, 0.7538]],
        [[0.3717, 0.2229], [0.6134, 0.4810], [0.7595, 0.9449]],
    ]
)
PRINTED = torch.tensor(
    [
        [2.0387, 2.1016, 2.2028, 2.3894],
        [2.1480, 2.3633, 2.4573, 2.6580],
        [2.3816, 2.0370, 2.7977, 3.0224],
        [2.4039, 1.9510, 2.6611, 2.8830],
    ]
)
FORMS = {"hard": {}, "smooth": {"temperature": 0.3}, "xtr": {"topk": 7}}
forms = pytest.mark.parametrize("form", FORMS)
CHUNKS = (None, 1, 700)


def draw(seed=0, nq=3, nd=4, lq=5, ld=7, d=6, dtype=torch.float64, masks=True, device="cpu"):
    """Queries, documents and masks with holes; one document and one query lose all tokens."""
    g = torch.Generator().manual_seed(seed)
    q, x = torch.randn(nq, lq, d, generator=g), torch.randn(nd, ld, d, generator=g)
    q, x = q.to(device, dtype), x.to(device, dtype)
    if not masks:
        return q, x, None, None
    qm, dm = torch.rand(nq, lq, generator=g) > 0.3, torch.rand(nd, ld, generator=g) > 0.3
    dm[nd // 2] = False
    qm[-1] = False
    return q, x, qm.to(device), dm.to(device)


def test_worked_example():
    torch.testing.assert_close(maxsim(WORKED, WORKED), PRINTED, atol=1e-4, rtol=0)


@forms
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_values_and_gradients_against_the_definition(form, masks, chunk, device):
    q, x, qm, dm = draw(masks=masks, device=device)
    options = FORMS[form]
    oracle = [t.detach().clone().requires_grad_() for t in (q, x)]
    expected = maxsim_by_pairs(*oracle, qm, dm, empty=-3.0, **options)
    ours = [t.detach().clone().requires_grad_() for t in (q, x)]
    found = maxsim(*ours, query_mask=qm, document_mask=dm, empty=-3.0, chunk_bytes=chunk, **options)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    cotangent = torch.randn_like(found)
    for mine, theirs in zip(
        torch.autograd.grad(found, ours, cotangent),
        torch.autograd.grad(expected, oracle, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)
    with torch.no_grad():  # the path that keeps nothing
        assert torch.equal(
            maxsim(q, x, query_mask=qm, document_mask=dm, empty=-3.0, chunk_bytes=chunk, **options), found
        )


@forms
def test_float32_to_1e_6(form):
    q, x, _, _ = draw(nq=6, nd=9, lq=32, ld=60, d=64, dtype=torch.float32, masks=False)
    q, x = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(x, dim=-1)
    leaves = [q.requires_grad_(), x.requires_grad_()]
    found, expected = maxsim(q, x, **FORMS[form]), maxsim_by_pairs(q, x, **FORMS[form])
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
    cotangent = torch.randn_like(found)
    for mine, theirs in zip(
        torch.autograd.grad(found, leaves, cotangent),
        torch.autograd.grad(expected, leaves, cotangent.double()),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=2e-6)


@forms
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("options", [{}, {"normalize": True, "reduction": "mean", "chunk_bytes": 300}])
def test_gradcheck_and_gradgradcheck(form, masks, options):
    q, x, qm, dm = draw(nq=2, nd=3, lq=3, ld=4, d=3, masks=masks)

    def function(q, x):
        return maxsim(q, x, query_mask=qm, document_mask=dm, **FORMS[form], **options)

    inputs = (q.requires_grad_(), x.requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
@forms
def test_second_order_in_one_argument(form, wanted):
    inputs = [
        t.requires_grad_(want) for t, want in zip(draw(nq=2, nd=2, lq=2, ld=3)[:2], wanted, strict=True)
    ]
    assert torch.autograd.gradgradcheck(lambda q, x: maxsim(q, x, **FORMS[form]), inputs)


def test_third_order_of_the_smooth_maximum():
    q, x, qm, dm = draw(nq=2, nd=3, lq=2, ld=3, d=2)

    def second(q, x):
        """Something that holds second derivatives."""
        leaf = q if q.requires_grad else q.detach().requires_grad_()
        score = maxsim(leaf, x, query_mask=qm, document_mask=dm, temperature=0.5).square().sum()
        (first,) = torch.autograd.grad(score, leaf, create_graph=True)
        (out,) = torch.autograd.grad(first.sin().sum(), leaf, create_graph=True)
        return out

    assert torch.autograd.gradcheck(second, (q.requires_grad_(), x.requires_grad_()))


def test_learned_temperature():
    q, x, qm, dm = draw(nq=2, nd=3)
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def function(t, q):
        return maxsim(q, x, query_mask=qm, document_mask=dm, temperature=t)

    torch.testing.assert_close(function(t, q), function(0.4, q))
    assert torch.autograd.gradcheck(function, (t, q.requires_grad_()))
    assert torch.autograd.gradgradcheck(function, (t, q))


def test_first_of_equal_maxima_gets_the_gradient():
    q = torch.ones(1, 2, 3, requires_grad=True)
    x = torch.ones(2, 5, 3, requires_grad=True)
    mask = torch.tensor([[True] * 5, [False, False, True, True, True]])
    maxsim(q, x, document_mask=mask).sum().backward()
    assert x.grad[..., 0].tolist() == [[2, 0, 0, 0, 0], [0, 0, 2, 0, 0]]


def test_smooth_maximum_tends_to_the_maximum():
    q, x, qm, dm = draw(dtype=torch.float32)
    hard = maxsim(q, x, query_mask=qm, document_mask=dm)
    for temperature in (1e-2, 1e-4, 1e-6):
        soft = maxsim(q, x, query_mask=qm, document_mask=dm, temperature=temperature)
        assert (soft >= hard - 1e-5).all()
        assert (soft <= hard + 5 * temperature * 7 + 1e-5).all()
    assert torch.equal(maxsim(q, x, query_mask=qm, document_mask=dm, temperature=0.0), hard)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("units", [True, False])
@forms
def test_half_precision_is_summed_in_float32(dtype, units, form, monkeypatch, device):
    """PyLate PR 237: summing over query tokens in bfloat16 costs 2.2 nDCG@10."""
    monkeypatch.setattr(tiles, "_has_bfloat16_units", lambda: units)
    q, x, qm, dm = draw(nq=4, nd=6, lq=40, ld=50, d=64, dtype=dtype, device=device)
    oracle = [t.detach().double().requires_grad_() for t in (q, x)]
    expected = maxsim_by_pairs(*oracle, qm, dm, **FORMS[form])
    q.requires_grad_()
    x.requires_grad_()
    # where bfloat16 units pick the winner, it is one of those that rounding cannot tell from the best
    rounds = units and dtype == torch.bfloat16 and form == "hard"
    exact = maxsim(q, x, query_mask=qm, document_mask=dm, dtype=torch.float32, **FORMS[form])
    assert exact.dtype == torch.float32
    torch.testing.assert_close(exact.double(), expected, atol=1e-6, rtol=2e-3 if rounds else 1e-6)
    found = maxsim(q, x, query_mask=qm, document_mask=dm, **FORMS[form])
    assert found.dtype == dtype
    assert torch.equal(found, exact.to(dtype))
    grads = torch.autograd.grad(exact.sum(), (q, x))
    for mine, theirs, leaf in zip(grads, torch.autograd.grad(expected.sum(), oracle), (q, x), strict=True):
        assert mine.dtype == leaf.dtype
        if not rounds:  # accumulated in float32, rounded once
            torch.testing.assert_close(mine.double(), theirs, atol=1e-3, rtol=2.0**-8)


def test_bfloat16_units_pick_a_winner_within_rounding_and_score_it_exactly(monkeypatch):
    monkeypatch.setattr(tiles, "_has_bfloat16_units", lambda: True)
    q, x, _, _ = draw(nq=3, nd=5, lq=8, ld=40, d=32, dtype=torch.bfloat16, masks=False)
    grid = torch.einsum("iqd,jld->ijql", q.double(), x.double())
    best = grid.amax(-1)
    found = maxsim(q, x, dtype=torch.float32).double()
    assert (found <= best.sum(-1) + 1e-5).all()
    assert (found >= (best - 2.0**-7 * best.abs()).sum(-1)).all()


# ---- what other libraries get wrong ----


@pytest.mark.parametrize("temperature", [None, 0.05])
def test_true_negatives_are_kept(temperature):
    """PyLate and colpali-engine multiply by the mask: a similarity of -1 becomes 0."""
    q = torch.tensor([[[1.0, 0.0]]])
    x = torch.tensor([[[-1.0, 0.0], [5.0, 5.0]]])
    mask = torch.tensor([[True, False]])
    assert maxsim(q, x, document_mask=mask, temperature=temperature).item() == pytest.approx(-1)


def test_a_document_without_tokens_scores_empty():
    """maxsim-cpu returns -inf for it."""
    q, x, qm, dm = draw()
    for empty, options in itertools.product((0.0, -7.5, float("-inf")), FORMS.values()):
        scores = maxsim(q, x, query_mask=qm, document_mask=dm, empty=empty, **options)
        assert (scores[:, 2] == empty).all()
        if "topk" not in options:
            assert scores[:, [0, 1, 3]].isfinite().all()
    assert (maxsim(q, x[:, :0], empty=-2.0) == -2).all()
    assert (maxsim(q[:, :0], x) == 0).all()
    assert (maxsim(q[:, :0], x, reduction="mean") == 0).all()


@forms
@pytest.mark.parametrize("filler", [0.0, 1e4, float("nan"), float("inf")])
def test_padding_changes_nothing(form, filler):
    """colpali-engine's smooth maximum moves from .9757 to 1.0066 when 20 pads are added."""
    q, x, qm, dm = draw()
    wide_q, wide_x = torch.full((3, 9, 6), filler).double(), torch.full((4, 27, 6), filler).double()
    wide_qm, wide_dm = torch.zeros(3, 9, dtype=torch.bool), torch.zeros(4, 27, dtype=torch.bool)
    places_q, places_x = torch.tensor([0, 2, 3, 6, 8]), torch.tensor([1, 4, 5, 9, 12, 20, 26])
    wide_q[:, places_q], wide_qm[:, places_q] = q, qm
    wide_x[:, places_x], wide_dm[:, places_x] = x, dm
    results = []
    for left, right, left_mask, right_mask in ((q, x, qm, dm), (wide_q, wide_x, wide_qm, wide_dm)):
        leaves = left.requires_grad_(), right.requires_grad_()
        options = {"query_mask": left_mask, "document_mask": right_mask, "reduction": "mean"}
        scores = maxsim(*leaves, **options, **FORMS[form])
        results.append((scores, *torch.autograd.grad(scores.sin().sum(), leaves)))
    (plain, plain_q, plain_x), (padded, padded_q, padded_x) = results
    torch.testing.assert_close(padded, plain, atol=1e-12, rtol=0)
    torch.testing.assert_close(padded_q[:, places_q], plain_q, atol=1e-12, rtol=0)
    torch.testing.assert_close(padded_x[:, places_x], plain_x, atol=1e-12, rtol=0)
    assert (padded_q[~wide_qm] == 0).all()
    assert (padded_x[~wide_dm] == 0).all()


def test_masks_with_holes_are_not_lengths():
    """PyLate with flash attention turns a mask into a length and scores the wrong tokens."""
    q = torch.eye(3).unsqueeze(0)
    x = torch.eye(3).unsqueeze(0)
    holes = torch.tensor([[True, False, True]])
    assert maxsim(q, x, document_mask=holes).item() == 2
    assert maxsim(q, x, query_mask=holes, document_mask=~holes).item() == 0


def test_a_float32_gradient_is_not_rounded_to_half():
    """late-interaction-kernels' low-memory backward rounds it."""
    q, x, _, _ = draw(dtype=torch.float32, masks=False)
    x.requires_grad_()
    (found,) = torch.autograd.grad(maxsim(q, x)[0, 0], x)
    assert not torch.equal(found, found.half().float())


# ---- layouts ----


@pytest.mark.parametrize("form", ["hard", "smooth"])  # with topk, documents are not independent
def test_layouts_agree_with_all_pairs(form):
    q, x, qm, dm = draw(nq=4, nd=4)
    options = FORMS[form]
    every = maxsim(q, x, query_mask=qm, document_mask=dm, **options)
    pairs = maxsim(q, x, query_mask=qm, document_mask=dm, layout="pairwise", **options)
    torch.testing.assert_close(pairs, every.diagonal())
    lists, list_masks = torch.stack([x, x.flip(0), x, x]), torch.stack([dm, dm.flip(0), dm, dm])
    found = maxsim(q, lists, query_mask=qm, document_mask=list_masks, layout="candidates", **options)
    every[1] = every[1].flip(0)
    torch.testing.assert_close(found, every)
    shared = maxsim(q, x, query_mask=qm, document_mask=dm, layout="candidates", **options)  # broadcast
    assert shared.shape == (4, 4)


def test_batch_dimensions_and_single_items():
    q, x, _, _ = draw(nq=6, nd=8)
    expected = torch.stack([maxsim(q[2 * b : 2 * b + 2], x[4 * (b % 2) : 4 * (b % 2) + 4]) for b in range(3)])
    documents = torch.stack([x[:4], x[4:], x[:4]])
    torch.testing.assert_close(maxsim(q.view(3, 2, 5, 6), documents), expected)
    broadcast = maxsim(q.view(3, 2, 5, 6), x)
    torch.testing.assert_close(broadcast.view(6, 8), maxsim(q, x))
    torch.testing.assert_close(maxsim(q[0], x[0], layout="pairwise"), maxsim(q, x)[0, 0])
    torch.testing.assert_close(maxsim(q[0], x, layout="candidates"), maxsim(q, x)[0])
    assert maxsim(q[:0], x).shape == (0, 8)
    assert maxsim(q, x[:0]).shape == (6, 0)
    assert (maxsim(q[..., :0], x[..., :0]) == 0).all()


@forms
@pytest.mark.parametrize(
    "sizes", [(0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 2, 0, 4, 5), (2, 2, 3, 0, 5), (2, 2, 3, 4, 0)]
)
def test_nothing_of_something_has_zero_gradients(form, sizes):
    nq, nd, lq, ld, d = sizes
    leaves = torch.randn(nq, lq, d, requires_grad=True), torch.randn(nd, ld, d, requires_grad=True)
    scores = maxsim(*leaves, **FORMS[form])
    assert scores.shape == (nq, nd)
    for grad, leaf in zip(torch.autograd.grad(scores.sum(), leaves), leaves, strict=True):
        assert grad.shape == leaf.shape
        assert (grad == 0).all()


def test_candidates_compete_within_their_list():
    q, x, qm, dm = draw(nq=2, nd=6)
    lists, masks = x.view(2, 3, 7, 6), dm.view(2, 3, 7)
    found = maxsim(q, lists, query_mask=qm, document_mask=masks, layout="candidates", topk=4)
    for i in range(2):
        expected = maxsim_by_pairs(q[i : i + 1], lists[i], qm[i : i + 1], masks[i], topk=4)
        torch.testing.assert_close(found[i : i + 1], expected)


def test_xtr_mean_divides_by_the_tokens_that_retrieved():
    q = torch.eye(2).unsqueeze(0)
    x = torch.tensor([[[3.0, 0.5]], [[1.0, 2.0]]])
    assert maxsim(q, x, topk=1).tolist() == [[3.0, 2.0]]
    assert maxsim(q, x, topk=1, reduction="mean").tolist() == [[3.0, 2.0]]
    assert maxsim(q, x, topk=2, reduction="mean").tolist() == [[1.75, 1.5]]
    assert maxsim(q[:, :1], x, topk=1, empty=-1.0).tolist() == [[3.0, -1.0]]


def test_cosine():
    q, x, _, _ = draw(masks=False)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(maxsim(q, x, normalize=True), maxsim(unit(q, dim=-1), unit(x, dim=-1)))
    for scale in (1e-200, 1e200):
        torch.testing.assert_close(maxsim(q, scale * x, normalize=True), maxsim(q, x, normalize=True))
    x[0] = 0
    x.requires_grad_()
    scores = maxsim(q, x, normalize=True)
    scores.sum().backward()
    assert (scores[:, 0] == 0).all()
    assert (x.grad[0] == 0).all()
    assert x.grad.isfinite().all()


def test_chamfer_is_symmetric_and_a_distance():
    q, x, qm, dm = draw(lq=7)
    there = chamfer(q, x, x_mask=qm, y_mask=dm, empty=-9.0)
    torch.testing.assert_close(there, chamfer(x, q, x_mask=dm, y_mask=qm, empty=-9.0).mT)
    assert (there[:, 2] == -9).all()
    assert (there[-1] == -9).all()
    unit = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(x, dim=-1)
    squared = (unit[0][:, None, :, None] - unit[1][None, :, None, :]).square().sum(-1)
    distance = squared.amin(-1).mean(-1) + squared.amin(-2).mean(-1)
    torch.testing.assert_close(4 - 4 * chamfer(*unit), distance)
    pairs = chamfer(q, x[:3], x_mask=qm, y_mask=dm[:3], layout="pairwise", empty=-9.0)
    torch.testing.assert_close(pairs, there[:, :3].diagonal())
    assert torch.autograd.gradcheck(
        lambda a, b: chamfer(a, b, y_mask=dm), (q.requires_grad_(), x.requires_grad_())
    )
