"""Values: against the oracle pair by pair, published figures, several positives, filters, extremes, blocks."""

from __future__ import annotations

import math

import contrastive_oracles as oracle
import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from couplings.losses.contrastive import (
    clip_loss,
    cosine_target_loss,
    info_nce_loss,
    n_pairs_loss,
    nt_xent_loss,
    scores,
    sigmoid_loss,
    triplet_loss,
)

N, D = 11, 6
BUDGET = {torch.float64: 1e-12, torch.float32: 1e-6}
dtypes = pytest.mark.parametrize("dtype", BUDGET, ids=str)
# cosines in [-1, 1] over the temperature: without a reference, with one for the block, with one for each row
temperatures = pytest.mark.parametrize("temperature", [1e3, 1.0, 0.07, 0.01, 1e-3])
IDS = torch.tensor([0, 1, 1, 2, 3, 3, 3, 4, 5, 1, 6])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks even for eleven rows."""
    monkeypatch.setattr(scores, "TILE_ROWS", 4)


def draw(dtype=torch.float64, n=N, m=N, noise=0.8):
    x2 = torch.randn(m, D, dtype=torch.float64)
    x1 = x2[:n] + noise * torch.randn(n, D, dtype=torch.float64)
    return x1.to(dtype), x2.to(dtype)


def agrees(found, expected, dtype, size=1.0):
    """Relative to the logits' size: a logit of 1000 is only known to 1e-4 in float32."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(
        found.double(), expected, rtol=BUDGET[dtype], atol=BUDGET[dtype] * max(1.0, size)
    )


def diagonal(i, j):
    return "+" if i == j else "-"


def same_group(i, j):
    return "+" if IDS[i] == IDS[j] else "-"


def own_of_group(i, j):
    return "+" if i == j else " " if IDS[i] == IDS[j] else "-"


RELATION = {"each": same_group, "mean": same_group, "own": own_of_group}


@dtypes
@temperatures
def test_one_direction(dtype, temperature):
    x1, x2 = draw(dtype, m=N + 3)
    logits = oracle.cosines(x1, x2) / temperature
    expected = oracle.softmax(logits, diagonal)
    found = info_nce_loss(x1, x2, temperature=temperature, reduction="none")
    agrees(found, expected, dtype, 1 / temperature)
    total = info_nce_loss(x1, x2, temperature=temperature, reduction="sum")
    agrees(total / N, np.mean(expected), dtype, 1 / temperature)


@dtypes
@temperatures
@pytest.mark.parametrize("loss", [clip_loss, n_pairs_loss])
def test_two_directions(loss, dtype, temperature):
    x1, x2 = draw(dtype)
    logits = oracle.cosines(x1, x2) / temperature
    there, back = oracle.softmax(logits, diagonal), oracle.softmax(logits.T, diagonal)
    found = loss(x1, x2, temperature=temperature, reduction="none")
    agrees(found, (np.array(there) + back) / 2, dtype, 1 / temperature)
    agrees(loss(x1, x2, temperature=temperature), np.mean(there + back), dtype, 1 / temperature)


@dtypes
@temperatures
def test_nt_xent(dtype, temperature):
    x1, x2 = draw(dtype)
    views = torch.cat((x1, x2))
    logits = oracle.cosines(views, views) / temperature

    def relation(i, j):
        return " " if i == j else "+" if (i - j) % N == 0 else "-"

    found = nt_xent_loss(x1, x2, temperature=temperature, reduction="none")
    agrees(found, oracle.softmax(logits, relation), dtype, 1 / temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nt_xent_where_it_is_large(dtype):
    """A published implementation stops at 87 here: it adds the smallest normal number inside a logarithm."""
    direction = torch.nn.functional.one_hot(torch.arange(8), 8).to(dtype)
    x1, x2 = direction, -direction  # the positive has cosine -1, all negatives 0
    found = nt_xent_loss(x1, x2, temperature=1 / 400)
    assert abs(found.item() - (400 + math.log(14))) < (1e-9 if dtype == torch.float64 else 1e-4)
    found = clip_loss(x1, x2, temperature=1 / 4000)
    assert abs(found.item() - (4000 + math.log(7))) < (1e-9 if dtype == torch.float64 else 1e-3)


@dtypes
@pytest.mark.parametrize(("temperature", "bias"), [(1.0, 0.0), (0.1, -10.0), (1e-3, 5.0), (1e3, -1.0)])
def test_sigmoid(dtype, temperature, bias):
    x1, x2 = draw(dtype, m=N + 2)
    expected = oracle.sigmoid(oracle.cosines(x1, x2) / temperature + bias, diagonal)
    found = sigmoid_loss(x1, x2, temperature=temperature, bias=bias, reduction="none")
    agrees(found, expected, dtype, 3 * max(expected))
    agrees(
        sigmoid_loss(x1, x2, temperature=temperature, bias=bias), np.mean(expected), dtype, 3 * max(expected)
    )


@dtypes
@pytest.mark.parametrize("target", [None, 0.2])
@pytest.mark.parametrize("balance", [0.5, 0.9])
def test_cosine_target(dtype, target, balance):
    x1, x2 = draw(dtype)
    aim = -1 / (N - 1) if target is None else target
    expected = oracle.squares(oracle.cosines(x1, x2), diagonal, aim, balance)
    agrees(cosine_target_loss(x1, x2, target=target, balance=balance), expected, dtype)
    each = cosine_target_loss(x1, x2, target=target, balance=balance, reduction="none")
    agrees(each.mean(), expected, dtype)


@pytest.mark.parametrize("n", [2, 3, 5, 8])
@pytest.mark.parametrize(("target", "balance"), [(-1.0, 0.5), (-0.7, 0.5), (-1.0, 0.8)])
def test_the_floor_of_an_unreachable_target_is_attained(n, target, balance):
    """The loss never goes below 0, and descent with room enough (d > n) comes down to it."""
    x1, x2 = (torch.randn(n, n + 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimiser = torch.optim.LBFGS([x1, x2], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure():
        optimiser.zero_grad()
        loss = cosine_target_loss(x1, x2, target=target, balance=balance)
        loss.backward()
        return loss

    optimiser.step(closure)
    assert abs(closure().item()) < 1e-9


@pytest.mark.parametrize("mining", ["hard", "semi-hard"])
@pytest.mark.parametrize("ids", [None, IDS])
def test_triplet(mining, ids):
    x1, x2 = draw()
    relation = diagonal if ids is None else same_group
    expected = oracle.triplet(oracle.cosines(x1, x2), relation, 0.3, mining)
    found = triplet_loss(x1, x2, margin=0.3, mining=mining, groups=ids, reduction="none")
    agrees(found, expected, torch.float64)
    back = oracle.triplet(oracle.cosines(x2, x1), relation, 0.3, mining)
    both = triplet_loss(x1, x2, margin=0.3, mining=mining, groups=ids, symmetric=True)
    agrees(both, np.mean(expected + back), torch.float64)
    own = triplet_loss(x1, x2, margin=0.3, mining="hard", groups=ids, positives="own", reduction="none")
    if ids is not None:
        agrees(
            own,
            oracle.triplet(oracle.cosines(x1, x2), own_of_group, 0.3, "hard"),
            torch.float64,
        )


# ------------------------------------------------------------------------------------ groups, filters, more negatives


@pytest.mark.parametrize("mode", RELATION)
@pytest.mark.parametrize("temperature", [0.3, 0.002])
def test_groups(mode, temperature):
    x1, x2 = draw()
    logits = oracle.cosines(x1, x2) / temperature
    there = oracle.softmax(logits, RELATION[mode], mode)
    back = oracle.softmax(logits.T, RELATION[mode], mode)
    options = {"temperature": temperature, "groups": IDS, "positives": mode}
    agrees(info_nce_loss(x1, x2, **options, reduction="none"), there, torch.float64)
    agrees(clip_loss(x1, x2, **options), np.mean(there + back), torch.float64)
    views = torch.cat((x1, x2))
    logits = oracle.cosines(views, views) / temperature

    def relation(i, j):
        if i == j:
            return " "
        if mode == "own" and (i - j) % N == 0:
            return "+"
        return RELATION[mode](i % N, j % N)

    agrees(
        nt_xent_loss(x1, x2, **options, reduction="none"),
        oracle.softmax(logits, relation, mode),
        torch.float64,
    )


@pytest.mark.parametrize("mode", ["each", "own"])
def test_groups_of_sums_over_pairs(mode):
    x1, x2 = draw()
    cosines = oracle.cosines(x1, x2)
    expected = oracle.sigmoid(cosines / 0.5 - 1, RELATION[mode])
    found = sigmoid_loss(x1, x2, temperature=0.5, bias=-1.0, groups=IDS, positives=mode, reduction="none")
    agrees(found, expected, torch.float64)
    expected = oracle.squares(cosines, RELATION[mode], -0.1, 0.5)
    agrees(cosine_target_loss(x1, x2, target=-0.1, groups=IDS, positives=mode), expected, torch.float64)


def test_groups_of_different_sides():
    x1, x2 = draw(n=4, m=N)
    left, right = torch.tensor([0, 1, 9, 3]), IDS

    def relation(i, j):
        return "+" if left[i] == right[j] else "-"

    expected = oracle.softmax(oracle.cosines(x1, x2) / 0.2, relation)
    found = info_nce_loss(x1, x2, temperature=0.2, groups=(left, right), reduction="none")
    agrees(found, expected, torch.float64)
    assert found[2] == 0  # nobody of its group: no positive, no loss, and not counted in the mean
    agrees(info_nce_loss(x1, x2, temperature=0.2, groups=(left, right)), np.sum(expected) / 3, torch.float64)


def test_unique_groups_change_nothing():
    x1, x2 = draw()
    unique = torch.randperm(N) - 5
    for loss in (info_nce_loss, clip_loss, nt_xent_loss):
        plain = loss(x1, x2)
        for mode in RELATION:
            torch.testing.assert_close(loss(x1, x2, groups=unique, positives=mode), plain)


def test_a_duplicate_is_no_negative():
    x1, x2 = draw()
    twice = torch.cat((x1, x1[:3])), torch.cat((x2, x2[:3]))
    ids = torch.arange(N + 3) % N
    plain = info_nce_loss(x1, x2, reduction="none")
    found = info_nce_loss(*twice, groups=ids, positives="own", reduction="none")
    # row 5 sees the three duplicates as negatives, as it must; rows 0 .. 2 and their copies see neither each other
    copies = info_nce_loss(*twice, reduction="none")
    torch.testing.assert_close(found[:3], found[N:])
    assert (copies[:3] > found[:3]).all()
    assert (found[3:N] >= plain[3:]).all()


def test_further_negatives_for_all_rows():
    x1, x2 = draw()
    more = torch.randn(5, D, dtype=torch.float64)
    expected = oracle.softmax(oracle.cosines(x1, torch.cat((x2, more))) / 0.2, diagonal)
    agrees(info_nce_loss(x1, x2, temperature=0.2, negatives=more, reduction="none"), expected, torch.float64)
    back = oracle.softmax(oracle.cosines(x2, x1) / 0.2, diagonal)  # the negatives have no loss of their own
    agrees(clip_loss(x1, x2, temperature=0.2, negatives=more), np.mean(expected + back), torch.float64)
    # with groups they belong to none
    grouped = info_nce_loss(x1, x2, temperature=0.2, negatives=more, groups=torch.arange(N), reduction="none")
    agrees(grouped, expected, torch.float64)
    expected = oracle.sigmoid(oracle.cosines(x1, torch.cat((x2, more))) / 0.2, diagonal)
    found = sigmoid_loss(x1, x2, temperature=0.2, bias=0.0, negatives=more, reduction="none")
    agrees(found, expected, torch.float64)


def test_further_negatives_for_each_row():
    x1, x2 = draw()
    more = torch.randn(N, 3, D, dtype=torch.float64)
    extra = [oracle.cosines(x1[i : i + 1], more[i])[0] / 0.2 for i in range(N)]
    expected = oracle.softmax(oracle.cosines(x1, x2) / 0.2, diagonal, extra=extra)
    agrees(info_nce_loss(x1, x2, temperature=0.2, negatives=more, reduction="none"), expected, torch.float64)


@pytest.mark.parametrize("as_scores", [True, False])
def test_guide(as_scores):
    x1, x2 = draw()
    embeddings = torch.randn(N, 4, dtype=torch.float64), torch.randn(N, 4, dtype=torch.float64)
    guide = oracle.cosines(*embeddings)
    given = torch.from_numpy(guide) if as_scores else embeddings
    for margin in (0.0, 0.3):

        def by_row(i, j, margin=margin):
            return "+" if i == j else " " if guide[i, j] > guide[i, i] - margin else "-"

        def by_column(i, j, margin=margin):
            return "+" if i == j else " " if guide[j, i] > guide[i, i] - margin else "-"

        logits = oracle.cosines(x1, x2) / 0.2
        there, back = oracle.softmax(logits, by_row), oracle.softmax(logits.T, by_column)
        options = {"temperature": 0.2, "guide": given, "guide_margin": margin}
        agrees(info_nce_loss(x1, x2, **options, reduction="none"), there, torch.float64)
        agrees(clip_loss(x1, x2, **options, reduction="none"), (np.array(there) + back) / 2, torch.float64)

        def either(i, j, margin=margin):
            return " " if " " in (by_row(i, j, margin), by_column(j, i, margin)) else diagonal(i, j)

        agrees(
            sigmoid_loss(x1, x2, **options, bias=-1.0, reduction="none"),
            oracle.sigmoid(logits - 1, either),
            torch.float64,
        )


@pytest.mark.parametrize(
    "loss", [clip_loss, info_nce_loss, nt_xent_loss, sigmoid_loss, cosine_target_loss, triplet_loss]
)
def test_masked_entries_are_as_if_absent(loss):
    x1, x2 = draw()
    mask = torch.rand(N) > 0.4
    poisoned = [x.clone() for x in (x1, x2)]
    for x in poisoned:
        x[~mask] = torch.nan
    leaves = [x.requires_grad_() for x in poisoned]
    found = loss(*leaves, mask=mask)
    torch.testing.assert_close(found, loss(x1[mask], x2[mask]))
    grads = torch.autograd.grad(found, leaves)
    for grad in grads:
        assert (grad[~mask] == 0).all()
        assert torch.isfinite(grad).all()
    nothing = loss(*leaves, mask=torch.zeros(N, dtype=torch.bool))
    assert nothing == 0
    each = loss(x1, x2, mask=mask, reduction="none")
    assert (each.view(-1, N)[:, ~mask] == 0).all()


# --------------------------------------------------------------------------------------------- other sources of scores


def negative_distance(x, y):
    return -(x.unsqueeze(1) - y).square().sum(-1)


def test_a_function_as_similarity():
    x1, x2 = draw()
    matrix = negative_distance(x1, x2)
    expected = oracle.softmax(matrix.numpy() / 0.5, diagonal)
    options = {"temperature": 0.5, "normalize": False, "reduction": "none"}
    agrees(info_nce_loss(x1, x2, similarity=negative_distance, **options), expected, torch.float64)
    agrees(info_nce_loss(matrix, None, **options), expected, torch.float64)


def late_interaction(queries, documents):
    """MaxSim, written out: the sum over a query's tokens of their best match."""
    return torch.einsum("iqd,jkd->ijqk", queries, documents).amax(-1).sum(-1)


def test_late_interaction_scores():
    queries = torch.randn(5, 3, D, dtype=torch.float64, requires_grad=True)
    documents = torch.randn(5, 4, D, dtype=torch.float64, requires_grad=True)
    found = clip_loss(queries, documents, similarity=late_interaction, temperature=0.5)
    units = normalize(queries, dim=-1), normalize(documents, dim=-1)
    logits = late_interaction(*units) / 0.5
    own = torch.arange(5)
    expected = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(found, expected)
    for got, want in zip(
        torch.autograd.grad(found, (queries, documents)),
        torch.autograd.grad(expected, (queries, documents)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_rows_of_one_process_against_the_columns_of_all():
    """What distributed training computes: the parts add up to the whole, values and gradients."""
    x1, x2 = (x.requires_grad_() for x in draw(n=12, m=12))
    for loss in (info_nce_loss, sigmoid_loss, triplet_loss):
        whole = loss(x1, x2)
        parts = [loss(x1[i : i + 4], x2, offset=i) for i in range(0, 12, 4)]
        torch.testing.assert_close(torch.stack(parts).mean(), whole)
        for got, want in zip(
            torch.autograd.grad(torch.stack(parts).mean(), (x1, x2)),
            torch.autograd.grad(whole, (x1, x2)),
            strict=True,
        ):
            torch.testing.assert_close(got, want)


# ----------------------------------------------------------------------------------------------------------- extremes


def pairs_losses():
    return {
        "clip": clip_loss,
        "info_nce": info_nce_loss,
        "nt_xent": nt_xent_loss,
        "sigmoid": sigmoid_loss,
        "cosine": cosine_target_loss,
        "triplet": triplet_loss,
    }


@pytest.mark.parametrize("name", pairs_losses())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1e30, 1e-30])
def test_lengths_do_not_matter(name, dtype, factor):
    loss = pairs_losses()[name]
    x1, x2 = draw(dtype)
    big = (x1 * factor).requires_grad_()
    found = loss(big, x2 * factor)
    torch.testing.assert_close(found, loss(x1, x2), rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(found, big)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("name", pairs_losses())
def test_rows_of_zeros(name):
    """Cosine 0 with everything, and gradient 0 for the row itself; the others are not disturbed."""
    x1, x2 = draw()
    x1[2] = 0
    x2[4] = 0
    x1.requires_grad_()
    x2.requires_grad_()
    found = pairs_losses()[name](x1, x2)
    grads = torch.autograd.grad(found, (x1, x2))
    assert torch.isfinite(found)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert (grads[0][2] == 0).all()
    assert (grads[1][4] == 0).all()


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
@pytest.mark.parametrize("loss", [clip_loss, info_nce_loss, nt_xent_loss, sigmoid_loss])
@pytest.mark.parametrize("mode", [None, "each"])
def test_gradients_at_extreme_temperatures(loss, temperature, mode):
    """float32 against the float64 oracle's derivative by autograd through the dense losses."""
    x1, x2 = draw(torch.float32)
    options = {} if mode is None else {"groups": IDS, "positives": mode}
    for x in (x1, x2):
        x.requires_grad_()
    t = torch.tensor(temperature, requires_grad=True)
    grads = torch.autograd.grad(loss(x1, x2, temperature=t, **options), (x1, x2, t))
    wide = [x.detach().double().requires_grad_() for x in (x1, x2, t)]
    exact = torch.autograd.grad(loss(*wide[:2], temperature=wide[2], **options), wide)
    for got, want in zip(grads, exact, strict=True):
        assert torch.isfinite(got).all()
        error = (got - want).norm() / want.norm()
        assert error < 1e-6 * max(10.0, 4 / temperature)


def test_a_perfect_batch_keeps_its_tiny_loss():
    """The positive is kept out of the sum, so a loss of 1e-18 is not rounded to 0."""
    x = torch.eye(8)
    found = info_nce_loss(x, x, temperature=1 / 42)
    assert abs(found.item() / (7 * math.exp(-42)) - 1) < 1e-5
    found = clip_loss(x, x, temperature=1 / 60)
    assert abs(found.item() / (7 * math.exp(-60)) - 1) < 1e-5


def test_widely_different_rows():
    """Scores whose rows live hundreds of units apart: one reference for all underflows."""
    matrix = torch.randn(N, N) + 300 * torch.arange(N)[:, None]
    for scores_ in (matrix, matrix.T.contiguous()):
        exact = clip_loss(scores_.double(), None, normalize=False, temperature=1.0)
        leaf, wide = scores_.clone().requires_grad_(), scores_.double().requires_grad_()
        found = clip_loss(leaf, None, normalize=False, temperature=1.0)
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
        own = torch.arange(N)
        expected = (cross_entropy(wide, own) + cross_entropy(wide.T, own)) / 2
        torch.testing.assert_close(exact, expected.detach())
        (got,) = torch.autograd.grad(found, leaf)
        (want,) = torch.autograd.grad(expected, wide)
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", pairs_losses())
def test_half_precision_is_computed_in_float32(name, dtype):
    loss = pairs_losses()[name]
    x1, x2 = draw(dtype)
    x1.requires_grad_()
    found = loss(x1, x2)
    (grad,) = torch.autograd.grad(found, x1)
    wide = x1.detach().float().requires_grad_()
    exact = loss(wide, x2.float())
    assert found.dtype == grad.dtype == dtype
    torch.testing.assert_close(found, exact.to(dtype))
    torch.testing.assert_close(grad, torch.autograd.grad(exact, wide)[0].to(dtype))


def test_autocast_does_not_cast():
    x1, x2 = draw(torch.float32)
    plain = clip_loss(x1, x2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(clip_loss(x1, x2), plain)


def test_many_rows_match_the_dense_loss(monkeypatch):
    """Real block sizes, float32."""
    monkeypatch.undo()
    x2 = normalize(torch.randn(700, 32), dim=1)
    x1 = normalize(x2 + 0.2 * torch.randn(700, 32), dim=1)
    own = torch.arange(700)
    wide = [x.double().requires_grad_() for x in (x1, x2)]
    logits = wide[0] @ wide[1].T / 0.07
    exact = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
    leaves = [x.requires_grad_() for x in (x1, x2)]
    found = clip_loss(*leaves, normalize=False)
    assert abs(found.item() / exact.item() - 1) < 1e-6
    for got, want in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(exact, wide), strict=True):
        assert (got - want).norm() < 1e-6 * want.norm()
