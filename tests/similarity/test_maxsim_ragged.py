"""Ragged MaxSim: lists and offsets give what padding gives."""

import pytest
import torch

from couplings.similarity import chamfer, maxsim
from couplings.testing.similarity import maxsim_by_pairs

LENGTHS = [3, 40, 1, 0, 12, 13, 3]
QUERY_LENGTHS = [4, 2, 0, 5]


def sets(lengths, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(length, 6, generator=g).to(dtype) for length in lengths]


def offsets(tokens, dtype=torch.int32):
    ends = torch.tensor([0] + [len(one) for one in tokens]).cumsum(0)
    return torch.cat(tokens), ends.to(dtype)


def padded(tokens):
    longest = max(map(len, tokens))
    out = torch.zeros(len(tokens), longest, 6, dtype=tokens[0].dtype)
    mask = torch.zeros(len(tokens), longest, dtype=torch.bool)
    for place, one in enumerate(tokens):
        out[place, : len(one)], mask[place, : len(one)] = one, True
    return out, mask


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.2}, {"topk": 9}, {"reduction": "mean", "normalize": True}]
)
@pytest.mark.parametrize("form", [list, tuple, offsets])
def test_equal_to_padding(options, form):
    queries, documents = sets(QUERY_LENGTHS, seed=1), sets(LENGTHS)
    (q, qm), (x, xm) = padded(queries), padded(documents)
    expected = maxsim(q, x, query_mask=qm, document_mask=xm, empty=-2.0, **options)
    for left, left_mask in ((form(queries), None), (q, qm)):
        found = maxsim(left, form(documents), query_mask=left_mask, empty=-2.0, **options)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    found = maxsim(form(queries), x, document_mask=xm, empty=-2.0, **options)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_pairwise():
    queries, documents = sets([4, 2, 0, 5, 1, 1, 7], seed=1), sets(LENGTHS)
    expected = maxsim(queries, documents).diagonal()
    torch.testing.assert_close(maxsim(queries, documents, layout="pairwise"), expected)
    torch.testing.assert_close(maxsim(offsets(queries), offsets(documents), layout="pairwise"), expected)


def test_chamfer():
    queries, documents = sets(QUERY_LENGTHS, seed=1), sets(LENGTHS)
    (q, qm), (x, xm) = padded(queries), padded(documents)
    expected = chamfer(q, x, x_mask=qm, y_mask=xm, empty=-2.0)
    torch.testing.assert_close(chamfer(queries, documents, empty=-2.0), expected)


def test_holes_in_ragged_sets():
    queries, documents = sets(QUERY_LENGTHS, seed=1), sets(LENGTHS)
    masks = [torch.rand(len(one)) > 0.4 for one in documents]
    kept = [one[mask] for one, mask in zip(documents, masks, strict=True)]
    expected = maxsim(queries, kept)
    torch.testing.assert_close(maxsim(queries, documents, document_mask=masks), expected)
    found = maxsim(queries, offsets(documents), document_mask=torch.cat(masks))
    torch.testing.assert_close(found, expected)


def test_gradients_and_isolation():
    queries, documents = sets(QUERY_LENGTHS, seed=1), sets(LENGTHS)
    for one in (*queries, *documents):
        one.requires_grad_()
    scores = maxsim(queries, documents)
    grads = torch.autograd.grad(scores.sin().sum(), (*queries, *documents))
    oracle = torch.stack(
        [
            torch.stack(
                [maxsim_by_pairs(q[None], x[None])[0, 0] if len(x) else torch.zeros(()) for x in documents]
            )
            for q in queries
        ]
    )
    expected = torch.autograd.grad(oracle.sin().sum(), (*queries, *documents), allow_unused=True)
    for mine, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs)
    with torch.no_grad():
        documents[1][5] = torch.nan
    assert maxsim(queries, documents).isnan().any(0).tolist() == [False, True] + [False] * 5


def test_half_precision_lists():
    queries, documents = sets(QUERY_LENGTHS, torch.float16), sets(LENGTHS, torch.float16)
    assert maxsim(queries, documents).dtype == torch.float16
    exact = maxsim(queries, documents, dtype=torch.float32)
    (q, qm), (x, xm) = padded(queries), padded(documents)
    torch.testing.assert_close(exact.double(), maxsim_by_pairs(q, x, qm, xm), atol=1e-5, rtol=1e-5)


def test_compiled_lists():
    queries, documents = sets(QUERY_LENGTHS, seed=1), sets(LENGTHS)
    compiled = torch.compile(lambda q, x: maxsim(q, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(queries, documents), maxsim(queries, documents))
    torch._dynamo.reset()
