"""Laws of the losses: who comes where, lengths, rotations, bounds; and what is refused, with which words."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from couplings.losses import heatmap
from couplings.losses.contrastive import (
    clip_loss,
    collapse_guard,
    cosine_target_loss,
    diagnostics,
    info_nce_loss,
    n_pairs_loss,
    nt_xent_loss,
    sigmoid_loss,
    triplet_loss,
)
from couplings.losses.heatmap import similarity_heatmap

LOSSES = {
    "n_pairs": lambda a, b, **k: n_pairs_loss(a, b, temperature=0.2, **k),
    "info_nce": info_nce_loss,
    "clip": clip_loss,
    "nt_xent": nt_xent_loss,
    "sigmoid": sigmoid_loss,
    "cosine target": cosine_target_loss,
    "triplet": triplet_loss,
}
names = st.sampled_from(sorted(LOSSES))
sizes = st.tuples(st.integers(2, 12), st.integers(1, 8))


def draw(size):
    return torch.randn(size, dtype=torch.float64), torch.randn(size, dtype=torch.float64)


@given(name=names, size=sizes)
def test_order_does_not_matter(name, size):
    x1, x2 = draw(size)
    order = torch.randperm(size[0])
    each = LOSSES[name](x1, x2, reduction="none")
    moved = LOSSES[name](x1[order], x2[order], reduction="none")
    torch.testing.assert_close(moved.view(-1, size[0]), each.view(-1, size[0])[:, order])


@given(name=names, size=sizes)
def test_cosines_know_no_length_and_no_direction(name, size):
    x1, x2 = draw(size)
    loss = LOSSES[name]
    length = torch.rand(size[0], 1, dtype=torch.float64) + 0.1
    rotation = torch.linalg.qr(torch.randn(size[1], size[1], dtype=torch.float64)).Q
    torch.testing.assert_close(loss(x1 * length, x2 * 3), loss(x1, x2))
    torch.testing.assert_close(loss(x1 @ rotation, x2 @ rotation), loss(x1, x2))


@given(name=names, size=sizes, extra=st.integers(1, 5))
def test_padding(name, size, extra):
    x1, x2 = draw(size)
    mask = torch.arange(size[0] + extra) < size[0]
    garbage = torch.full((extra, size[1]), math.inf, dtype=torch.float64)
    padded = [torch.cat((x, garbage)) for x in (x1, x2)]
    torch.testing.assert_close(LOSSES[name](*padded, mask=mask), LOSSES[name](x1, x2))


@given(name=names, size=sizes)
def test_loss_is_never_negative(name, size):
    x1, x2 = draw(size)
    assert LOSSES[name](x1, x2) >= -1e-12


@given(size=sizes)
def test_symmetric_losses_are_symmetric(size):
    x1, x2 = draw(size)
    for loss in (clip_loss, nt_xent_loss, sigmoid_loss, cosine_target_loss):
        torch.testing.assert_close(loss(x1, x2), loss(x2, x1))
    both = (info_nce_loss(x1, x2) + info_nce_loss(x2, x1)) / 2
    torch.testing.assert_close(clip_loss(x1, x2), both)
    torch.testing.assert_close(n_pairs_loss(x1, x2, temperature=0.07), both)
    one = n_pairs_loss(x1, x2, temperature=0.07, symmetric=False)
    torch.testing.assert_close(one, info_nce_loss(x1, x2))


@given(size=sizes, name=names)
def test_nan_is_not_hidden(size, name):
    x1, x2 = draw(size)
    x1[0, 0] = torch.nan
    assert LOSSES[name](x1, x2).isnan()


@pytest.mark.parametrize("loss", [info_nce_loss, sigmoid_loss, triplet_loss])
def test_a_query_with_nan_spoils_no_other(loss):
    x1, x2 = draw((6, 4))
    clean = loss(x1, x2, reduction="none")
    x1[2] = torch.nan
    found = loss(x1, x2, reduction="none")
    others = torch.arange(6) != 2
    torch.testing.assert_close(found[others], clean[others])
    assert found[2].isnan()


def test_one_pair_has_nobody_to_be_told_from():
    x = torch.randn(1, 4, requires_grad=True)
    for name, loss in LOSSES.items():
        if name not in ("sigmoid", "cosine target"):
            found = loss(x, x.detach())
            found.backward()
            assert found.item() == 0, name
            assert torch.isfinite(x.grad).all()


# ---------------------------------------------------------------------------------------------------------- bad input

X = torch.randn(4, 3)
BAD = {
    "x1: expected a floating-point torch.Tensor, got list": lambda: clip_loss([[1.0]], X),
    "x2: expected a floating-point torch.Tensor, got list": lambda: clip_loss(X, [[1.0]]),
    "x1: expected dtype float64, float32": lambda: clip_loss(X.long(), X.long()),
    "x1: expected two dimensions": lambda: clip_loss(X[0], X[0]),
    "x1: expected at least one row": lambda: info_nce_loss(X[:0], X[:0]),
    "x2: expected dtype float32, as x1 has": lambda: clip_loss(X, X.double()),
    "x2: expected 3 features per row": lambda: sigmoid_loss(X, X[:, :2]),
    r"x2: expected at least offset \+ 4 = 4 columns": lambda: clip_loss(X, X[:3]),
    r"x2: expected at least offset \+ 4 = 5 columns": lambda: info_nce_loss(X, X, offset=1),
    "offset: expected an int": lambda: info_nce_loss(X, X, offset=1.0),
    "offset: expected at least 0": lambda: info_nce_loss(X, X, offset=-1),
    "temperature: expected a positive number, got 0": lambda: clip_loss(X, X, temperature=0),
    "temperature: expected a finite number": lambda: clip_loss(X, X, temperature=math.inf),
    "temperature: expected a number, got str": lambda: clip_loss(X, X, temperature="warm"),
    "temperature: expected a positive number, got -1": lambda: clip_loss(
        X, X, temperature=torch.tensor(-1.0)
    ),
    "temperature: expected a tensor with one element": lambda: clip_loss(X, X, temperature=torch.ones(2)),
    "bias: expected a finite number": lambda: sigmoid_loss(X, X, bias=math.nan),
    "bias: expected a tensor with one element": lambda: sigmoid_loss(X, X, bias=torch.ones(2)),
    "reduction: expected one of 'mean', 'sum', 'none', got 'max'": lambda: clip_loss(X, X, reduction="max"),
    "positives: expected one of 'each', 'mean', 'own', got 'all'": lambda: clip_loss(X, X, positives="all"),
    "positives: expected one of 'each', 'own', got 'mean'": lambda: sigmoid_loss(X, X, positives="mean"),
    "groups: expected an integer tensor": lambda: clip_loss(X, X, groups=torch.ones(4)),
    r"groups: expected shape \(4,\), one for each row of x1": lambda: clip_loss(X, X, groups=torch.arange(3)),
    r"groups: expected shape \(6,\), one for each row of x2": lambda: info_nce_loss(
        X, torch.cat((X, X[:2])), groups=torch.arange(4)
    ),
    r"groups: expected a tensor of shape \(4,\)": lambda: nt_xent_loss(X, X, groups=torch.arange(8)),
    "mask: expected a bool tensor": lambda: clip_loss(X, X, mask=torch.ones(4)),
    r"mask: expected shape \(4,\)": lambda: clip_loss(X, X, mask=torch.ones(3).bool()),
    "mask: expected one tensor, or a tensor for rows": lambda: clip_loss(X, X, mask=(torch.ones(4).bool(),)),
    r"negatives: expected shape \(k, 3\)": lambda: clip_loss(X, X, negatives=torch.ones(2, 4)),
    r"negatives: expected shape \(4, k, d\)": lambda: clip_loss(X, X, negatives=torch.ones(3, 2, 3)),
    "negatives: expected at least one for each row": lambda: clip_loss(X, X, negatives=torch.ones(4, 0, 3)),
    r"negatives: expected shape \(k, d\)": lambda: sigmoid_loss(X, X, negatives=torch.ones(4, 2, 3)),
    "negatives: expected dtype float32": lambda: clip_loss(X, X, negatives=torch.ones(2, 3).double()),
    r"guide: expected scores of shape \(4, 4\)": lambda: clip_loss(X, X, guide=torch.ones(4, 3)),
    "guide: expected 4 rows": lambda: clip_loss(X, X, guide=(torch.ones(4, 2), torch.ones(5, 2))),
    "guide: expected two matrices": lambda: clip_loss(X, X, guide=(torch.ones(4, 2), torch.ones(4, 3))),
    "guide_margin: expected a number": lambda: clip_loss(X, X, guide_margin=None),
    "similarity: expected a function": lambda: clip_loss(X, X, similarity="dot"),
    r"similarity: expected scores of shape \(4, 4\)": lambda: clip_loss(X, X, similarity=lambda a, b: a),
    "normalize: expected False": lambda: clip_loss(torch.eye(4), None),
    "negatives: expected None where x2 is None": lambda: clip_loss(
        torch.eye(4), None, normalize=False, negatives=X
    ),
    "x1: expected at least offset": lambda: clip_loss(torch.ones(4, 3), None, normalize=False),
    "x2: expected shape": lambda: nt_xent_loss(X, X[:3]),
    "margin: expected a number >= 0": lambda: triplet_loss(X, X, margin=-0.1),
    "mining: expected one of 'semi-hard', 'hard'": lambda: triplet_loss(X, X, mining="soft"),
    "positives: expected one of 'hardest', 'own'": lambda: triplet_loss(X, X, positives="each"),
    "symmetric: expected as many rows of x2": lambda: triplet_loss(X, torch.cat((X, X)), symmetric=True),
    r"target: expected a number in \[-1, 1\]": lambda: cosine_target_loss(X, X, target=2.0),
    "balance: expected a number between 0 and 1": lambda: cosine_target_loss(X, X, balance=1.0),
    r"x1: expected shape \(n, d\) with n >= 2": lambda: collapse_guard(X[:1]),
    "threshold: expected a number in": lambda: collapse_guard(X, threshold=1.0),
    "threshold: expected a positive number": lambda: collapse_guard(X, threshold=0.0, normalize=False),
    "seed: expected an int": lambda: collapse_guard(X, seed=0.5),
    r"x2: expected shape \(4, 3\)": lambda: diagnostics(X, X[:3]),
    r"x1: expected shape \(n, d\) with n >= 2 and": lambda: diagnostics(X[:1], X[:1]),
    "rows: expected at least 2": lambda: diagnostics(X, X, rows=1),
    "rows: expected an int": lambda: diagnostics(X, X, rows=2.5),
    r"x1: expected shape \(rows, features\)": lambda: similarity_heatmap(X[0]),
    "x2: expected 3 features": lambda: similarity_heatmap(X, X[:, :2]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises((ValueError, TypeError), match=message):
        BAD[message]()


def test_a_similarity_with_parameters_of_its_own_is_refused():
    """Their gradient would silently be missing."""
    weight = torch.randn(3, 3, requires_grad=True)
    x1 = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(ValueError, match="similarity: expected a function whose only learned inputs"):
        clip_loss(x1, X, similarity=lambda a, b: a @ weight @ b.T)


def test_a_temperature_that_nobody_may_look_at():
    """Under vmap a negative temperature becomes NaN, not a wrong number."""
    loss = torch.vmap(lambda t: clip_loss(X, X.flip(0), temperature=t))
    found = loss(torch.tensor([0.5, -0.5]))
    assert torch.isfinite(found[0])
    assert found[1].isnan()


# ------------------------------------------------------------------------------------------------------------ picture


def test_heatmap_shows_the_matrix():
    x1, x2 = torch.randn(5, 3), torch.randn(6, 3)
    figure = similarity_heatmap(x1, x2, title="cosines")
    (image,) = figure.axes[0].images
    expected = torch.nn.functional.normalize(x1, dim=1) @ torch.nn.functional.normalize(x2, dim=1).T
    torch.testing.assert_close(torch.as_tensor(image.get_array().data), expected)
    assert image.get_clim() == (-1, 1)
    assert len(figure.axes[0].texts) == 30
    dots = similarity_heatmap(x1, normalize=False, annotate=False, axes=figure.add_subplot())
    assert dots is figure
    assert not figure.axes[-2].texts or not figure.axes[-1].texts
    large = similarity_heatmap(torch.randn(2 * heatmap.MOST, 2))
    assert large.axes[0].images[0].get_array().shape == (heatmap.MOST, heatmap.MOST)


def test_heatmap_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        similarity_heatmap(X)
