"""Ranking losses: against scipy and scikit-learn at epsilon = 0, limits, gradients, masks, ties, training, messages."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys

import pytest
import scipy.stats
import sklearn.metrics
import torch

import couplings as cp
from couplings.losses import (
    average_precision_loss,
    kendall_loss,
    least_quantile_loss,
    ndcg_loss,
    recall_at_k_loss,
    spearman_loss,
    topk_loss,
    trimmed_loss,
)

BATCH, N = (3,), 9


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0, ties=False, dtype=torch.float64):
    """Normal numbers, rounded to halves where ties are wanted."""
    x = torch.randn(*shape, generator=generator(seed), dtype=dtype)
    return (2 * x).round() / 2 if ties else x


def flags(*shape, seed=1, part=0.4):
    """Random flags with at least one True and one False in each list."""
    out = torch.rand(*shape, generator=generator(seed)) < part
    out[..., 0], out[..., 1] = True, False
    return out


# Each case: the loss of a (*batch, n) tensor of scores with a target made for it, and how to make that target.
CASES = {
    "topk": (topk_loss, lambda b, n: (torch.randint(n, b, generator=generator(5)),), {}),
    "topk-3": (topk_loss, lambda b, n: (torch.randint(n, b, generator=generator(5)), 3), {}),
    "topk-several": (topk_loss, lambda b, n: (flags(*b, n), 2), {}),
    "spearman": (spearman_loss, lambda b, n: (draw(*b, n, seed=7),), {}),
    "kendall": (kendall_loss, lambda b, n: (draw(*b, n, seed=7),), {}),
    "ndcg": (ndcg_loss, lambda b, n: (torch.randint(4, (*b, n), generator=generator(5)),), {}),
    "ndcg-3": (ndcg_loss, lambda b, n: (torch.randint(4, (*b, n), generator=generator(5)),), {"k": 3}),
    "ap": (average_precision_loss, lambda b, n: (flags(*b, n),), {}),
    "recall": (recall_at_k_loss, lambda b, n: (flags(*b, n), 3), {}),
    "recall-several": (recall_at_k_loss, lambda b, n: (flags(*b, n), [1, 4]), {}),
    "quantile": (least_quantile_loss, lambda b, n: (0.3,), {}),
    "trimmed": (trimmed_loss, lambda b, n: (0.7,), {}),
    "trimmed-sum": (trimmed_loss, lambda b, n: (4,), {"average": False}),
}
cases = pytest.mark.parametrize("name", CASES)


def case(name, batch=BATCH, n=N):
    """loss(x, **options) with its target bound, and the target."""
    function, target, options = CASES[name]
    bound = target(batch, n)
    return (lambda x, **more: function(x, *bound, **options | more)), bound


# ------------------------------------------------------------------------------------------- the metrics themselves


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_spearman_is_scipys(seed, ties):
    x, y = draw(4, 20, seed=seed, ties=ties), draw(4, 20, seed=seed + 50, ties=ties)
    want = [1 - scipy.stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    torch.testing.assert_close(
        spearman_loss(x, y, epsilon=0, reduction="none"), torch.tensor(want, dtype=x.dtype)
    )
    # nearly so for a small epsilon: soft ranks share ties, too
    torch.testing.assert_close(
        spearman_loss(x, y, epsilon=1e-6, reduction="none"),
        torch.tensor(want, dtype=x.dtype),
        atol=1e-3,
        rtol=0,
    )


def test_spearman_weights_are_multiplicities():
    x, y = draw(12, ties=True), draw(12, seed=3, ties=True)
    times = torch.randint(4, (12,), generator=generator(2))
    repeated = scipy.stats.spearmanr(x.repeat_interleave(times), y.repeat_interleave(times)).statistic
    got = spearman_loss(x, y, weights=times.double(), epsilon=0)
    torch.testing.assert_close(got, torch.tensor(1 - repeated, dtype=torch.float64))
    # weights 1 are no weights; weight 0 is a mask; only ratios matter
    torch.testing.assert_close(
        spearman_loss(x, y, weights=torch.ones_like(x), epsilon=0.1), spearman_loss(x, y, epsilon=0.1)
    )
    torch.testing.assert_close(
        spearman_loss(x, y, weights=(times > 0).double(), epsilon=0.1),
        spearman_loss(x, y, mask=times > 0, epsilon=0.1),
    )


def test_spearman_with_a_soft_target_is_symmetric():
    x, y = draw(3, 8), draw(3, 8, seed=4)
    y.requires_grad_()
    one = spearman_loss(x, y, soft_target=True, epsilon=0.3)
    torch.testing.assert_close(one, spearman_loss(y, x, soft_target=True, epsilon=0.3))
    assert torch.autograd.grad(one, y)[0].abs().sum() > 0
    assert not spearman_loss(x, y, epsilon=0.3).requires_grad
    torch.testing.assert_close(
        spearman_loss(x, y, soft_target=True, epsilon=0), spearman_loss(x, y.detach(), epsilon=0)
    )


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_kendall_is_scipys(seed, ties):
    x, y = draw(4, 20, seed=seed, ties=ties), draw(4, 20, seed=seed + 50, ties=ties)
    want = torch.tensor(
        [1 - scipy.stats.kendalltau(a, b).statistic for a, b in zip(x, y, strict=True)], dtype=x.dtype
    )
    torch.testing.assert_close(kendall_loss(x, y, epsilon=0, reduction="none"), want)
    torch.testing.assert_close(kendall_loss(x, y, epsilon=1e-6, reduction="none"), want, atol=1e-3, rtol=0)
    torch.testing.assert_close(kendall_loss(x.float(), y, epsilon=0, reduction="none"), want.float())


def test_kendall_in_tiles_is_kendall_in_one(monkeypatch):
    """Rows in blocks, and strips of one list: value, gradient and curvature."""
    x, y = draw(5, 13).requires_grad_(), draw(5, 13, seed=2, ties=True)
    mask = flags(5, 13, part=0.7)

    def results():
        loss = kendall_loss(x, y, mask=mask, epsilon=0.3, reduction="none")
        (first,) = torch.autograd.grad(loss.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return loss, first, second

    whole = results()
    for most in (2 * 13 * 13, 4 * 13, 1):
        monkeypatch.setattr("couplings.losses.ranking.pairs.TILE", most)
        torch.testing.assert_close(results(), whole)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [None, 1, 4, 30])
def test_ndcg_with_linear_gains_is_scikit_learns(ties, k):
    scores = draw(6, 12, ties=ties)
    relevance = torch.randint(4, (6, 12), generator=generator(1))
    want = [
        1 - sklearn.metrics.ndcg_score(r[None], s[None], k=k)
        for r, s in zip(relevance.numpy(), scores.numpy(), strict=True)
    ]
    got = ndcg_loss(scores, relevance, k=k, gains="linear", epsilon=0, reduction="none")
    torch.testing.assert_close(got, torch.tensor(want, dtype=scores.dtype))
    exponential = sklearn.metrics.ndcg_score(2.0 ** relevance.numpy() - 1, scores.numpy(), k=k)
    torch.testing.assert_close(
        ndcg_loss(scores, relevance, k=k, epsilon=0).item(), 1 - exponential, atol=1e-12, rtol=0
    )


def test_ndcg_takes_a_gain_function():
    scores, relevance = draw(6, 12), torch.randint(4, (6, 12), generator=generator(1))
    got = ndcg_loss(scores, relevance, gains=lambda r: torch.exp2(r) - 1, epsilon=0.3)
    torch.testing.assert_close(got, ndcg_loss(scores, relevance, epsilon=0.3))


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_is_scikit_learns(ties):
    scores, relevance = draw(8, 15, ties=ties), flags(8, 15)
    want = [
        1 - sklearn.metrics.average_precision_score(r, s)
        for r, s in zip(relevance.numpy(), scores.numpy(), strict=True)
    ]
    got = average_precision_loss(scores, relevance, epsilon=0, reduction="none")
    torch.testing.assert_close(got, torch.tensor(want, dtype=scores.dtype))


def test_average_precision_with_sigmoid_ranks_is_smooth_ap():
    """Qin et al. 2010, pair by pair: sigmoids over the relevant partners over sigmoids over all of them."""
    scores, relevance = draw(4, 10), flags(4, 10)
    z = (scores - scores.mean(-1, keepdim=True)) / scores.std(-1, correction=0, keepdim=True)
    above = torch.sigmoid((z.unsqueeze(-2) - z.unsqueeze(-1)) / 0.2)
    precision = ((above * relevance.unsqueeze(-2)).sum(-1) + 0.5) / (above.sum(-1) + 0.5)
    want = 1 - (precision * relevance).sum(-1) / relevance.sum(-1)
    got = average_precision_loss(scores, relevance, epsilon=0.2, method="sigmoid", reduction="none")
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_recall_is_counted(k):
    scores, relevance = draw(8, 10), flags(8, 10)
    chosen = scores.topk(k).indices
    want = 1 - relevance.gather(-1, chosen).sum(-1) / relevance.sum(-1)
    got = recall_at_k_loss(scores, relevance, k, epsilon=0, reduction="none")
    torch.testing.assert_close(got, want.double())
    # of equal scores, the first come first
    tied = recall_at_k_loss(torch.zeros(10), torch.arange(10) < 1, k, epsilon=0)
    assert tied == 0
    several = recall_at_k_loss(scores, relevance, [k, 2], epsilon=0.1, reduction="none")
    apart = [recall_at_k_loss(scores, relevance, one, epsilon=0.1, reduction="none") for one in (k, 2)]
    torch.testing.assert_close(several, sum(apart) / 2)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_topk_counts_the_classes_that_score_higher(k):
    scores, labels = draw(8, 10), torch.arange(8)
    higher = (scores > scores.gather(-1, labels[:, None])).sum(-1)
    got = topk_loss(scores, labels, k, epsilon=0, reduction="none")
    torch.testing.assert_close(got, (higher - k + 1).clamp_min(0).double())
    error = topk_loss(scores, labels, transform=lambda u: (u >= k).to(u.dtype), epsilon=0, reduction="none")
    want = 1 - sklearn.metrics.top_k_accuracy_score(labels, scores, k=k, labels=range(10))
    assert error.mean().item() == pytest.approx(want)


def test_topk_with_several_labels_is_the_mean_over_them():
    scores, labels = draw(4, 7), flags(4, 7)
    got = topk_loss(scores, labels, 2, epsilon=0.2, reduction="none")
    for row in range(4):
        each = [
            topk_loss(scores[row], torch.tensor(label), 2, epsilon=0.2)
            for label in labels[row].nonzero()[:, 0].tolist()
        ]
        torch.testing.assert_close(got[row], torch.stack(each).mean())
    for same in (labels.int(), labels.double()):
        assert torch.equal(topk_loss(scores, same, 2, epsilon=0.2, reduction="none"), got)
    one = torch.nn.functional.one_hot(torch.tensor([3, 0, 6, 2]), 7)
    torch.testing.assert_close(topk_loss(scores, one), topk_loss(scores, torch.tensor([3, 0, 6, 2])))


@pytest.mark.parametrize("q", [0, 0.25, 0.5, 0.9, 1])
def test_least_quantile_is_torchs(q):
    losses = draw(3, 11).square()
    got = least_quantile_loss(losses, q, epsilon=0, reduction="none")
    torch.testing.assert_close(got, losses.quantile(q, dim=-1))


def test_trimmed_is_a_sum_over_the_smallest():
    losses = draw(3, 11).square()
    ordered = losses.sort(-1).values
    for keep in (1, 4, 11):
        got = trimmed_loss(losses, keep, epsilon=0, reduction="none")
        torch.testing.assert_close(got, ordered[:, :keep].mean(-1))
        got = trimmed_loss(losses, keep, average=False, epsilon=0, reduction="none")
        torch.testing.assert_close(got, ordered[:, :keep].sum(-1))
    torch.testing.assert_close(trimmed_loss(losses, 1.0), losses.mean())
    half = (ordered[:, :5].sum(-1) + 0.5 * ordered[:, 5]) / 5.5
    torch.testing.assert_close(trimmed_loss(losses, 0.5, epsilon=0, reduction="none"), half)


def test_trimmed_leaves_infinite_losses_out():
    losses = torch.tensor([1.0, torch.inf, 3.0, 2.0], requires_grad=True)
    loss = trimmed_loss(losses, 3, epsilon=0.1)
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(2.0))
    assert losses.grad.isfinite().all()
    assert losses.grad[1] == 0
    torch.testing.assert_close(trimmed_loss(losses.detach(), 0.75, epsilon=0), torch.tensor(2.0))


def test_trimmed_weights_may_be_constants_in_the_gradient():
    losses = draw(3, 9).square().requires_grad_()
    loss = trimmed_loss(losses, 6, epsilon=0.3, average=False, detach_weights=True)
    weights = cp.soft_topk_mask(losses, 6, largest=False, epsilon=0.3)
    torch.testing.assert_close(torch.autograd.grad(loss, losses)[0], weights.detach() / 3)


# ------------------------------------------------------------------------------------------------------- conventions


@cases
def test_the_limit_is_the_metric(name):
    loss, _ = case(name)
    x = draw(*BATCH, N, seed=3)
    exact = loss(x, epsilon=0, reduction="none")
    error = [
        (loss(x, epsilon=epsilon, reduction="none") - exact).abs().max().item()
        for epsilon in (1e-1, 1e-3, 1e-5, 1e-7)
    ]
    assert error[-1] < 1e-6
    assert error[2] < 1e-3
    assert error[2] <= error[1] + 1e-9 < 0.5


@cases
@pytest.mark.parametrize("epsilon", [1e-1, 1e-2])
def test_gradients_of_first_and_second_order(name, epsilon):
    loss, _ = case(name, (2,), 6)
    # evenly spread scores: no pair is so near or so far that a finite difference of 1e-6 would step over a kink
    x = torch.stack([torch.randperm(6, generator=generator(seed)) for seed in range(2)]).double()
    x = (0.2 * x + 0.05 * draw(2, 6)).requires_grad_()
    function = functools.partial(loss, epsilon=epsilon, reduction="none")
    assert torch.autograd.gradcheck(function, (x,), atol=1e-5)
    assert torch.autograd.gradgradcheck(function, (x,), atol=1e-4)


@pytest.mark.parametrize("method", ["sigmoid", "softsort", "neuralsort", "projection"])
@pytest.mark.parametrize("name", ["topk", "spearman", "ndcg", "ap"])
def test_every_method_of_soft_rank_serves(name, method):
    loss, _ = case(name)
    x = draw(*BATCH, N, seed=3).requires_grad_()
    soft = loss(x, method=method)
    assert torch.autograd.grad(soft, x)[0].isfinite().all()
    torch.testing.assert_close(
        loss(x, method=method, epsilon=1e-6), loss(x, method=method, epsilon=0), atol=1e-4, rtol=0
    )


@cases
def test_the_exact_loss_has_a_zero_gradient_rather_than_none(name):
    loss, _ = case(name)
    x = draw(*BATCH, N).requires_grad_()
    value = loss(x, epsilon=0)
    (gradient,) = torch.autograd.grad(value, x)
    if name.startswith(("quantile", "trimmed")):
        assert gradient.abs().sum() > 0  # that of the entries it is made of
    else:
        assert (gradient == 0).all()


@cases
@pytest.mark.parametrize("epsilon", [0, None])
def test_padding_changes_nothing(name, epsilon):
    """Masked entries, NaN in scores, anything in targets, with holes between the valid ones."""
    function, _, options = CASES[name]
    loss, bound = case(name)
    x = draw(*BATCH, N).requires_grad_()
    places = torch.randperm(N + 5, generator=generator(8))[:N].sort().values
    mask = torch.zeros(*BATCH, N + 5, dtype=torch.bool)
    mask[:, places] = True
    padded = torch.full((*BATCH, N + 5), torch.nan, dtype=torch.float64)
    padded[:, places] = x.detach()
    padded.requires_grad_()
    spread = []
    for value in bound:
        if not isinstance(value, torch.Tensor):
            spread.append(value)
        elif value.dim() == 1:
            spread.append(places[value])
        else:
            filler = {torch.bool: False, torch.int64: 3}.get(value.dtype, torch.nan)
            wide = torch.full((*BATCH, N + 5), filler, dtype=value.dtype)
            if name in ("ap", "recall"):
                wide[:] = True
            wide[:, places] = value
            spread.append(wide)
    plain = loss(x, epsilon=epsilon, reduction="none")
    masked = function(padded, *spread, **options, mask=mask, epsilon=epsilon, reduction="none")
    torch.testing.assert_close(masked, plain, atol=1e-9, rtol=1e-9)
    cotangent = torch.randn(BATCH, generator=generator(4), dtype=torch.float64)
    (want,) = torch.autograd.grad(plain, x, cotangent)
    (got,) = torch.autograd.grad(masked, padded, cotangent)
    torch.testing.assert_close(got[:, places], want, atol=1e-8, rtol=1e-8)
    assert (got[~mask] == 0).all()


@cases
@pytest.mark.parametrize("epsilon", [0, None])
def test_a_nan_stays_in_its_list(name, epsilon):
    loss, _ = case(name)
    x = draw(*BATCH, N)
    spoilt = x.clone()
    spoilt[1, 4] = torch.nan
    spoilt.requires_grad_()
    want, got = loss(x, epsilon=epsilon, reduction="none"), loss(spoilt, epsilon=epsilon, reduction="none")
    assert got.isnan().tolist() == [False, True, False]
    assert torch.equal(got[::2], want[::2])
    (gradient,) = torch.autograd.grad(got[0] + got[2], spoilt)
    assert gradient[::2].isfinite().all()


@cases
@pytest.mark.parametrize("epsilon", [0, None])
def test_lists_without_valid_entries_have_loss_zero(name, epsilon):
    loss, bound = case(name)
    if name == "topk-several":
        bound[0][1] = False
    x = draw(*BATCH, N).requires_grad_()
    mask = torch.ones(*BATCH, N, dtype=torch.bool)
    mask[1] = False
    if name in ("topk", "topk-3"):  # a list without its true class is an error
        with pytest.raises(ValueError, match=r"^labels: expected classes"):
            loss(x, epsilon=epsilon, mask=mask)
        return
    value = loss(x, epsilon=epsilon, mask=mask, reduction="none")
    assert value[1] == 0
    assert value.isfinite().all()
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    assert first.isfinite().all()
    assert (first[1] == 0).all()


@pytest.mark.parametrize("epsilon", [0, 0.3])
def test_nothing_relevant_is_nothing_lost(epsilon):
    x = draw(2, 5).requires_grad_()
    none = torch.zeros(2, 5, dtype=torch.bool)
    none[0, 2] = True
    for loss in (
        ndcg_loss(x, none.int(), epsilon=epsilon, reduction="none"),
        average_precision_loss(x, none, epsilon=epsilon, reduction="none"),
        recall_at_k_loss(x, none, 2, epsilon=epsilon, reduction="none"),
        topk_loss(x, none, epsilon=epsilon, reduction="none"),
        spearman_loss(x, none.int(), epsilon=epsilon, reduction="none"),
        kendall_loss(x, none.int(), epsilon=epsilon, reduction="none"),
    ):
        assert loss[1] == 0
        assert loss[0] > 0
        gradient = torch.autograd.grad(loss.sum(), x)[0]
        assert gradient.isfinite().all()
        assert (gradient[1] == 0).all()


@pytest.mark.parametrize("epsilon", [0, 1e-3, 0.3, 1e9])
@pytest.mark.parametrize("loss", [spearman_loss, kendall_loss])
def test_constant_scores_are_uncorrelated(loss, epsilon):
    x = torch.full((2, 6), 0.1, requires_grad=True)
    value = loss(x, torch.arange(6), epsilon=epsilon, reduction="none")
    assert value.tolist() == [1.0, 1.0]
    assert (torch.autograd.grad(value.sum(), x)[0] == 0).all()


@cases
def test_constant_scores_have_finite_gradients(name):
    loss, _ = case(name)
    x = torch.full((*BATCH, N), 0.1, dtype=torch.float64, requires_grad=True)
    value = loss(x)
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    assert value.isfinite()
    assert first.isfinite().all()


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision(name, dtype):
    loss, _ = case(name)
    x = draw(*BATCH, N).to(dtype).requires_grad_()
    got = loss(x, reduction="none")
    assert got.dtype == dtype
    want = loss(x.double(), reduction="none")
    tolerance = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)
    (gradient,) = torch.autograd.grad(got.sum(), x)
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()


@cases
@pytest.mark.parametrize("batch", [(), (0,), (2, 1, 3)])
def test_batch_shapes_and_reductions(name, batch):
    loss, bound = case(name, batch)
    x = draw(*batch, N)
    each = loss(x, reduction="none")
    assert each.shape == batch
    torch.testing.assert_close(loss(x, reduction="sum"), each.sum())
    if each.numel():
        torch.testing.assert_close(loss(x), each.mean())
    if len(batch) == 3:
        function, _, options = CASES[name]
        one = [b[1, 0, 2] if isinstance(b, torch.Tensor) else b for b in bound]
        torch.testing.assert_close(each[1, 0, 2], function(x[1, 0, 2], *one, **options))


@cases
def test_single_entries(name):
    loss, _ = case(name, (2,), 2)
    x = draw(2, 2).requires_grad_()
    if name in ("topk-3", "recall", "recall-several", "trimmed-sum"):  # two entries cannot name three
        with pytest.raises(ValueError, match=r"^(k|keep): expected between 1 and 2"):
            loss(x)
        return
    value = loss(x, mask=torch.tensor([[True, True], [True, False]]) if "topk" not in name else None)
    assert torch.autograd.grad(value, x)[0].isfinite().all()


@cases
def test_order_is_all_that_counts(name):
    """Shifting and scaling a list changes no metric; the robust losses scale along."""
    loss, _ = case(name)
    x = draw(*BATCH, N)
    if name.startswith(("quantile", "trimmed-sum")) or name == "trimmed":
        torch.testing.assert_close(loss(4 * x), 4 * loss(x))
    else:
        torch.testing.assert_close(loss(4 * x - 3), loss(x), atol=1e-8, rtol=0)


@cases
def test_epsilon_as_a_tensor(name):
    loss, _ = case(name)
    x = draw(*BATCH, N)
    epsilon = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    each = loss(x, epsilon=epsilon, reduction="none")
    for row in range(3):
        alone = loss(x, epsilon=epsilon[row].item(), reduction="none")[row]
        torch.testing.assert_close(each[row], alone, atol=1e-9, rtol=1e-9)
    assert torch.autograd.grad(each.sum(), epsilon)[0].isfinite().all()


@cases
def test_vmap_and_functional_gradients(name):
    loss, _ = case(name, ())
    x = draw(4, N)
    function = torch.func.grad(lambda row: loss(row, epsilon=0.3))
    together = torch.func.vmap(function)(x)
    torch.testing.assert_close(together, torch.stack([function(row) for row in x]), atol=1e-9, rtol=1e-9)


@cases
def test_inputs_stay_as_they_are(name):
    loss, bound = case(name)
    x = draw(*BATCH, N)
    before = x.clone(), [b.clone() for b in bound if isinstance(b, torch.Tensor)]
    loss(x)
    loss(x, epsilon=0, mask=torch.ones_like(x, dtype=torch.bool))
    assert torch.equal(x, before[0])
    assert all(
        torch.equal(a, b) for a, b in zip([b for b in bound if isinstance(b, torch.Tensor)], before[1])
    )


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("quantile", "trimmed"))])
def test_training_reaches_the_best_metric(name):
    """At its default epsilon, or at one that reaches scores far from the cut."""
    loss, bound = case(name, (4,), 12)
    options = {"epsilon": 0.3} if name.startswith("recall") else {}
    x = draw(4, 12, seed=11, dtype=torch.float32).requires_grad_()
    best = {
        "topk-several": lambda: loss(bound[0].float(), epsilon=0).item(),
        "recall": lambda: loss(bound[0].float(), epsilon=0).item(),
        "recall-several": lambda: loss(bound[0].float(), epsilon=0).item(),
    }.get(name, lambda: 0.0)()
    optimiser = torch.optim.Adam([x], 0.2)
    for _ in range(75):
        optimiser.zero_grad()
        loss(x, **options).backward()
        optimiser.step()
    assert loss(x.detach(), epsilon=0).item() == pytest.approx(best, abs=2e-2)


@pytest.mark.parametrize("loss", [least_quantile_loss, functools.partial(trimmed_loss, keep=0.6)])
def test_outliers_do_not_bend_the_line(loss):
    inputs = torch.linspace(-1, 1, 60)
    targets = 2 * inputs - 1 + 0.05 * torch.randn(60, generator=generator(1))
    targets[::4] += 30.0
    line = torch.zeros(2, requires_grad=True)
    optimiser = torch.optim.Adam([line], 0.1)
    for _ in range(150):
        optimiser.zero_grad()
        loss((line[0] * inputs + line[1] - targets).abs()).backward()
        optimiser.step()
    torch.testing.assert_close(line.detach(), torch.tensor([2.0, -1.0]), atol=0.15, rtol=0)


# ------------------------------------------------------------------------------------------------------------ memory

MEMORY = """
import re, torch
import couplings as cp
from pathlib import Path

def memory(which):
    return int(re.search(which + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
x = torch.randn({rows}, 24_000, requires_grad=True)
y = torch.randn({rows}, 24_000)
cp.losses.{loss}(x[:, :9], y[:, :9]).backward()
x.grad = None
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = memory("VmRSS")
loss = cp.losses.{loss}(x, y)
loss.backward()
assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
print((memory("VmHWM") - before) / 1024)
"""


def allocated(loss, rows):
    """MiB that torch's allocator holds at its peak in one forward and backward pass, above what it held before."""
    x = torch.randn(rows, 24_000, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = torch.randn(rows, 24_000, generator=torch.Generator().manual_seed(1))
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        getattr(cp.losses, loss)(x, y).backward()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes)) / 2**20


def resident(loss, rows):
    """MiB by which the memory of a process grows at its peak, read from Linux's /proc."""
    script = MEMORY.format(loss=loss, rows=rows)
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return float(done.stdout)


@pytest.mark.parametrize(
    ("loss", "rows", "most"),
    [
        ("spearman_loss", 1, 50),
        pytest.param("spearman_loss", 64, 400, marks=pytest.mark.slow),
        pytest.param("kendall_loss", 1, 50, marks=pytest.mark.slow),
    ],
)
def test_long_lists_need_little_memory(loss, rows, most):
    """One n x n float32 matrix would be 2197 MiB for one list of 24,000, and 64 times that for the batch."""
    assert allocated(loss, rows) < most
    if sys.platform == "linux":
        assert resident(loss, rows) < most


# --------------------------------------------------------------------------------------------------------- bad input

X = draw(3, 5)
Y = draw(3, 5, seed=1)
RELEVANT = flags(3, 5)
GOOD = {
    "topk_loss": {"scores": X, "labels": torch.tensor([0, 1, 4])},
    "spearman_loss": {"x": X, "y": Y},
    "kendall_loss": {"x": X, "y": Y},
    "ndcg_loss": {"scores": X, "relevance": RELEVANT.int()},
    "average_precision_loss": {"scores": X, "relevance": RELEVANT},
    "recall_at_k_loss": {"scores": X, "relevance": RELEVANT, "k": 2},
    "least_quantile_loss": {"losses": X},
    "trimmed_loss": {"losses": X, "keep": 0.5},
}
LISTS = {name: next(iter(arguments)) for name, arguments in GOOD.items()}
WITH_METHOD = [name for name in GOOD if name not in ("kendall_loss", "least_quantile_loss")]
BAD = [
    *((name, {LISTS[name]: X.long()}, TypeError, LISTS[name]) for name in GOOD),
    *((name, {LISTS[name]: X.tolist()}, TypeError, LISTS[name]) for name in GOOD),
    *((name, {LISTS[name]: X[0, 0]}, ValueError, LISTS[name]) for name in GOOD),
    *((name, {LISTS[name]: X[:, :0]}, ValueError, LISTS[name]) for name in GOOD),
    *((name, {"mask": torch.ones(3, 5)}, TypeError, "mask") for name in GOOD),
    *((name, {"mask": torch.ones(4, dtype=torch.bool)}, ValueError, "mask") for name in GOOD),
    *((name, {"epsilon": -1.0}, ValueError, "epsilon") for name in GOOD),
    *((name, {"epsilon": "small"}, TypeError, "epsilon") for name in GOOD),
    *((name, {"epsilon": torch.ones(7)}, ValueError, "epsilon") for name in GOOD),
    *((name, {"epsilon": torch.zeros(())}, ValueError, "epsilon") for name in GOOD),
    *((name, {"reduction": "average"}, ValueError, "reduction") for name in GOOD),
    *((name, {"method": "magic"}, ValueError, "method") for name in WITH_METHOD),
    *((name, {"method": "magic", "epsilon": 0}, ValueError, "method") for name in WITH_METHOD),
    ("topk_loss", {"labels": [0, 1, 4]}, TypeError, "labels"),
    ("topk_loss", {"labels": torch.zeros(3)}, TypeError, "labels"),
    ("topk_loss", {"labels": torch.zeros(3, dtype=torch.bool)}, TypeError, "labels"),
    ("topk_loss", {"labels": torch.tensor([0, 1])}, ValueError, "labels"),
    ("topk_loss", {"labels": torch.tensor([0, 1, 5])}, ValueError, "labels"),
    ("topk_loss", {"labels": torch.full((3, 5), 2)}, ValueError, "labels"),
    ("topk_loss", {"mask": torch.arange(5) < 3}, ValueError, "labels"),
    ("topk_loss", {"k": 0}, ValueError, "k"),
    ("topk_loss", {"k": 6}, ValueError, "k"),
    ("topk_loss", {"k": 1.0}, TypeError, "k"),
    ("topk_loss", {"transform": 3}, TypeError, "transform"),
    ("topk_loss", {"transform": torch.sum}, ValueError, "transform"),
    ("spearman_loss", {"y": Y.tolist()}, TypeError, "y"),
    ("spearman_loss", {"y": Y[:, :4]}, ValueError, "y"),
    ("spearman_loss", {"y": Y.expand(2, 3, 5)}, ValueError, "y"),
    ("spearman_loss", {"y": Y.long(), "soft_target": True}, TypeError, "y"),
    ("spearman_loss", {"y": Y.float(), "soft_target": True}, TypeError, "y"),
    ("spearman_loss", {"weights": Y.float().abs()}, TypeError, "weights"),
    ("spearman_loss", {"weights": -torch.ones_like(Y)}, ValueError, "weights"),
    ("spearman_loss", {"weights": torch.ones(4, dtype=Y.dtype)}, ValueError, "weights"),
    ("kendall_loss", {"y": Y.to(torch.complex128)}, TypeError, "y"),
    ("kendall_loss", {"y": Y[:2]}, ValueError, "y"),
    ("ndcg_loss", {"relevance": RELEVANT.tolist()}, TypeError, "relevance"),
    ("ndcg_loss", {"relevance": RELEVANT[:, :3].int()}, ValueError, "relevance"),
    ("ndcg_loss", {"relevance": Y}, ValueError, "relevance"),
    ("ndcg_loss", {"k": 0}, ValueError, "k"),
    ("ndcg_loss", {"k": 2.0}, TypeError, "k"),
    ("ndcg_loss", {"gains": "squared"}, ValueError, "gains"),
    ("ndcg_loss", {"gains": torch.sum}, ValueError, "gains"),
    ("average_precision_loss", {"relevance": RELEVANT.int()}, TypeError, "relevance"),
    ("average_precision_loss", {"relevance": RELEVANT[:, :3]}, ValueError, "relevance"),
    ("recall_at_k_loss", {"relevance": RELEVANT.double()}, TypeError, "relevance"),
    ("recall_at_k_loss", {"k": 6}, ValueError, "k"),
    ("recall_at_k_loss", {"k": [1, 0]}, ValueError, "k"),
    ("recall_at_k_loss", {"k": []}, ValueError, "k"),
    ("recall_at_k_loss", {"k": "12"}, TypeError, "k"),
    ("recall_at_k_loss", {"k": [1.5]}, TypeError, "k"),
    ("recall_at_k_loss", {"method": "gumbel"}, ValueError, "method"),
    ("least_quantile_loss", {"q": 1.5}, ValueError, "q"),
    ("least_quantile_loss", {"q": "half"}, TypeError, "q"),
    ("least_quantile_loss", {"q": True}, TypeError, "q"),
    ("trimmed_loss", {"keep": 0.0}, ValueError, "keep"),
    ("trimmed_loss", {"keep": 0}, ValueError, "keep"),
    ("trimmed_loss", {"keep": 1.2}, ValueError, "keep"),
    ("trimmed_loss", {"keep": 6}, ValueError, "keep"),
    ("trimmed_loss", {"keep": True}, TypeError, "keep"),
    ("trimmed_loss", {"keep": float("nan")}, ValueError, "keep"),
]


@pytest.mark.parametrize(("name", "change", "error", "named"), BAD)
def test_bad_input_is_named(name, change, error, named):
    with pytest.raises(error, match=rf"^{named}: expected .*, got .*\. [A-Z0]"):
        getattr(cp.losses, name)(**GOOD[name] | change)


def test_bad_values_that_nobody_may_look_at_become_nan():
    def first(x, labels):
        return topk_loss(x, labels, reduction="none")

    got = torch.func.vmap(first)(X, torch.tensor([0, 1, 5]))
    assert got.isnan().tolist() == [False, False, True]
    got = torch.func.vmap(functools.partial(ndcg_loss, reduction="none"))(X, RELEVANT.int() - 1)
    assert got.isnan().all()


# ----------------------------------------------------------------------------------------------------------- modules

MODULES = {
    "topk_loss": lambda: cp.nn.TopKLoss(2),
    "spearman_loss": lambda: cp.nn.SpearmanLoss(),
    "kendall_loss": lambda: cp.nn.KendallLoss(),
    "ndcg_loss": lambda: cp.nn.NDCGLoss(k=3),
    "average_precision_loss": lambda: cp.nn.AveragePrecisionLoss(),
    "recall_at_k_loss": lambda: cp.nn.RecallAtKLoss([1, 2]),
    "least_quantile_loss": lambda: cp.nn.LeastQuantileLoss(0.25),
    "trimmed_loss": lambda: cp.nn.TrimmedLoss(0.75, average=False),
}
SETTINGS = {
    "topk_loss": {"k": 2},
    "ndcg_loss": {"k": 3},
    "recall_at_k_loss": {"k": [1, 2]},
    "least_quantile_loss": {"q": 0.25},
    "trimmed_loss": {"keep": 0.75, "average": False},
}


@pytest.mark.parametrize("name", MODULES)
def test_module_forms(name):
    module = MODULES[name]()
    settings = SETTINGS.get(name, {})
    tensors = [value for key, value in GOOD[name].items() if key not in settings]
    mask = torch.arange(5) < 5
    got = module(*tensors, mask=mask)
    torch.testing.assert_close(got, getattr(cp.losses, name)(*tensors, mask=mask, **settings))
    assert "epsilon=None" in repr(module)
    assert not list(module.parameters())
    assert not module.state_dict()
