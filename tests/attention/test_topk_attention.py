"""topk_attention and nn.TopKAttention: ordinary attention as a limit, masks, exact sparse evaluation, gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import couplings as cp
from couplings import topk_attention

INF = float("inf")


def qkv(*batch, length=4, sources=6, d=3, e=5, dtype=torch.float64):
    return (
        torch.randn(*batch, length, d, dtype=dtype),
        torch.randn(*batch, sources, d, dtype=dtype),
        torch.randn(*batch, sources, e, dtype=dtype),
    )


def by_hand(q, k, v, topk, epsilon, mask=None):
    """softmax(scores + log A) with the mask of soft_topk_mask, query by query."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    out = torch.zeros(*scores.shape[:-1], v.shape[-1], dtype=v.dtype)
    for index in torch.cartesian_prod(*map(torch.arange, scores.shape[:-1])).reshape(-1, scores.dim() - 1):
        at = tuple(index.tolist())
        keep = torch.ones(scores.shape[-1]) > 0 if mask is None else mask[at]
        if keep.any():
            s = scores[at][keep]
            a = cp.soft_topk_mask(s, min(topk, len(s)), epsilon=epsilon)
            out[at] = (s + a.log()).softmax(-1) @ v[at[:-1]][keep]
    return out


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("topk", [1, 2, 4])
def test_is_the_formula(topk, epsilon):
    q, k, v = qkv(2, 3)
    expected = by_hand(q, k, v, topk, epsilon)
    torch.testing.assert_close(topk_attention(q, k, v, topk, epsilon=epsilon), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("topk", [6, 100])
def test_all_sources_is_ordinary_attention(topk, dtype):
    q, k, v = qkv(2, 3, dtype=dtype)
    torch.testing.assert_close(
        topk_attention(q, k, v, topk), scaled_dot_product_attention(q, k, v), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("topk", [1, 3])
def test_masks_with_holes_and_queries_that_see_nothing(topk):
    q, k, v = qkv(2, 3)
    mask = torch.rand(2, 3, 4, 6) < 0.6
    mask[0, 0, 0] = False
    q.requires_grad_()
    out = topk_attention(q, k, v, topk, mask=mask)
    torch.testing.assert_close(out, by_hand(q.detach(), k, v, topk, 0.1, mask), check_dtype=True)
    assert (out[0, 0, 0] == 0).all()
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert gradient.isfinite().all()
    assert (gradient[0, 0, 0] == 0).all()
    bias = torch.where(mask, 0.0, -INF).double()
    torch.testing.assert_close(topk_attention(q, k, v, topk, bias=bias), out)


def test_causal_sees_no_future():
    q, k, v = qkv(2, length=5, sources=5)
    out = topk_attention(q, k, v, 2, causal=True)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, 3:], changed_v[:, 3:] = 100.0, 7.0
    again = topk_attention(q, changed_k, changed_v, 2, causal=True)
    torch.testing.assert_close(again[:, :3], out[:, :3], rtol=0, atol=0)
    torch.testing.assert_close(out[:, 0], v[:, 0])


def test_one_number_per_head_and_per_query():
    q, k, v = qkv(2, 3)
    counts = torch.tensor([[1], [2], [6]])
    out = topk_attention(q, k, v, counts)
    for head, topk in enumerate((1, 2, 6)):
        alone = topk_attention(q[:, head], k[:, head], v[:, head], topk)
        torch.testing.assert_close(out[:, head], alone)
    assert (topk_attention(q, k, v, 0) == 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_hard_without_a_gradient_reads_only_what_it_selects(masked):
    q, k, v = qkv(2, 3)
    mask = torch.rand(2, 3, 4, 6) < 0.5 if masked else None
    few = topk_attention(q, k, v, 2, hard=True, mask=mask)
    full, weights = topk_attention(q, k, v, 2, hard=True, mask=mask, return_weights=True)
    torch.testing.assert_close(few, full)
    assert ((weights > 0).sum(-1) <= 2).all()
    torch.testing.assert_close(few, topk_attention(q, k, v, 2, epsilon=0, mask=mask))


@pytest.mark.parametrize("epsilon", [0.5, 0.1])
def test_gradients(epsilon):
    tensors = [t.requires_grad_() for t in qkv(2, length=2, sources=4, d=2, e=2)]
    counts = torch.tensor([[1.5, 2.0]], dtype=torch.float64, requires_grad=True)

    def attend(q, k, v, counts):
        return topk_attention(q, k, v, counts, epsilon=epsilon)

    assert torch.autograd.gradcheck(attend, (*tensors, counts), atol=1e-6)
    assert torch.autograd.gradgradcheck(lambda q, k, v: attend(q, k, v, 2), tensors, atol=1e-5)


def test_straight_through_gradient_is_the_soft_masks():
    q, k, v = (t.requires_grad_() for t in qkv(2))
    (hard,) = torch.autograd.grad(topk_attention(q, k, v, 2, hard=True).sum(), q)
    assert hard.abs().sum() > 0


@pytest.mark.parametrize("epsilon", [1e-1, 1e-4, 1e-6])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_masks_that_underflow_give_no_nan(size, epsilon):
    q, k, v = (size * t for t in qkv(4, sources=50, dtype=torch.float32))
    q.requires_grad_()
    out, weights = topk_attention(q, k, v, 3, epsilon=epsilon, return_weights=True)
    out.sum().backward()
    assert q.grad.isfinite().all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 4))


def test_vmap_and_grad():
    q, k, v = qkv(3)
    alone = torch.stack([topk_attention(*t, 2) for t in zip(q, k, v, strict=True)])
    torch.testing.assert_close(torch.func.vmap(lambda *t: topk_attention(*t, 2))(q, k, v), alone)
    gradient = torch.func.grad(lambda q: topk_attention(q, k, v, 2).square().sum())(q)
    assert gradient.isfinite().all()


def test_compile():
    q, k, v = qkv(2)
    compiled = torch.compile(lambda *t: topk_attention(*t, 2), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), topk_attention(q, k, v, 2))


def test_half_precision_empty_and_broadcast_batches():
    q, k, v = qkv(2)
    half = topk_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), 2)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), topk_attention(q, k, v, 2), rtol=0.1, atol=0.1)
    assert topk_attention(q[:, :0], k, v, 2).shape == (2, 0, 5)
    assert (topk_attention(q, k[:, :0], v[:, :0], 2) == 0).all()
    shared = topk_attention(q, k[:1], v[0], 2)
    torch.testing.assert_close(shared[1], topk_attention(q[1], k[0], v[0], 2))


# ---- the module


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 7}, {"bias": False}])
def test_module_with_all_sources_is_multihead_attention(options, batch_first):
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
    ours = cp.nn.TopKAttention(8, 2, 10, batch_first=batch_first, **options)
    ours.load_state_dict(theirs.state_dict())
    query, key = torch.randn(3, 4, 8), torch.randn(3, 6, options.get("kdim", 8))
    value = torch.randn(3, 6, options.get("vdim", 8))
    padding = torch.rand(3, 6) < 0.3
    padding[:, 0] = False
    attention = torch.rand(4, 6) < 0.2
    attention[:, 0] = False
    if not batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    for extra in (
        {},
        {"key_padding_mask": padding},
        {"attn_mask": attention},
        {"attn_mask": torch.randn(6, 4, 6), "key_padding_mask": padding.float().masked_fill(padding, -INF)},
        {"need_weights": False},
        {"average_attn_weights": False},
    ):
        expected, got = theirs(query, key, value, **extra), ours(query, key, value, **extra)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
        if expected[1] is None:
            assert got[1] is None
        else:
            torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-6)
    one = ours(
        query[:, 0] if not batch_first else query[0],
        *(t[:, 0] if not batch_first else t[0] for t in (key, value)),
    )
    assert one[0].shape == (4, 8)


def test_module_selects_per_head_and_is_saved():
    layer = cp.nn.TopKAttention(8, 2, torch.tensor([[1], [3]]), epsilon=1e-4, batch_first=True)
    x = torch.randn(2, 5, 8)
    _, weights = layer(x, x, x, average_attn_weights=False)
    assert ((weights > 1e-3).sum(-1)[:, 0] == 1).all()
    assert ((weights > 1e-3).sum(-1)[:, 1] <= 3).all()
    torch.nn.MultiheadAttention(8, 2).load_state_dict(layer.state_dict())
    assert "topk=" in repr(layer)
    with pytest.raises(ValueError, match="add_bias_kv"):
        cp.nn.TopKAttention(8, 2, 1, add_bias_kv=True)


def test_module_causal_mask_and_dropout():
    layer = cp.nn.TopKAttention(8, 2, 3, dropout=0.5, batch_first=True)
    x = torch.randn(2, 5, 8)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(5)
    layer.eval()
    torch.testing.assert_close(layer(x, x, x, attn_mask=causal)[0], layer(x, x, x, is_causal=True)[0])
    layer.train()
    assert not torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])


Q, K, V = qkv(2, dtype=torch.float32)
BAD = {
    "q": (lambda: topk_attention([1.0], K, V, 2), TypeError, "q: expected"),
    "q dim": (lambda: topk_attention(Q[0, 0], K, V, 2), ValueError, "q: expected shape"),
    "dtype": (lambda: topk_attention(Q, K.double(), V, 2), TypeError, "k: expected dtype"),
    "device": (lambda: topk_attention(Q, K.to("meta"), V, 2), ValueError, "k"),
    "width": (lambda: topk_attention(Q, K[..., :2], V, 2), ValueError, "d = 3"),
    "sources": (lambda: topk_attention(Q, K, V[:, :3], 2), ValueError, "6 sources"),
    "batch": (
        lambda: topk_attention(Q, K.expand(3, 2, 6, 3)[:, :1].expand(3, 3, 6, 3), V, 2),
        ValueError,
        "broadcast",
    ),
    "topk": (lambda: topk_attention(Q, K, V, -1), ValueError, "topk"),
    "topk type": (lambda: topk_attention(Q, K, V, "2"), TypeError, "topk"),
    "topk shape": (lambda: topk_attention(Q, K, V, torch.ones(7)), ValueError, "k: expected"),
    "mask": (lambda: topk_attention(Q, K, V, 2, mask=torch.ones(4, 6)), TypeError, "mask"),
    "mask shape": (lambda: topk_attention(Q, K, V, 2, mask=torch.ones(3, 6) > 0), ValueError, "mask"),
    "bias": (lambda: topk_attention(Q, K, V, 2, bias=torch.ones(3, 6)), ValueError, "bias"),
    "scale": (lambda: topk_attention(Q, K, V, 2, scale="1"), TypeError, "scale"),
    "dropout": (lambda: topk_attention(Q, K, V, 2, dropout_p=1.0), ValueError, "dropout_p"),
    "dropout type": (lambda: topk_attention(Q, K, V, 2, dropout_p="1"), TypeError, "dropout_p"),
    "epsilon": (lambda: topk_attention(Q, K, V, 2, epsilon=-1.0), ValueError, "epsilon"),
    "method": (lambda: topk_attention(Q, K, V, 2, method="entmax"), ValueError, "method"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
