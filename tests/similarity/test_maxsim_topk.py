"""Streamed exact retrieval: equal to scoring everything at once, whatever form the documents come in."""

import numpy
import pytest
import torch

from couplings.similarity import maxsim, maxsim_topk
from couplings.testing.similarity import maxsim_by_pairs

K = 7


def problem(dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    q, x = torch.randn(3, 5, 8, generator=g).to(dtype), torch.randn(50, 9, 8, generator=g).to(dtype)
    mask = torch.rand(50, 9, generator=g) > 0.3
    mask[17] = False
    return q, x, mask


def expected(q, x, mask=None, k=K):
    scores = maxsim_by_pairs(q, x, None, mask, empty=float("-inf"))
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k], scores


@pytest.mark.parametrize("block_bytes", [1, 1000, 10**9])
def test_tensor_and_array(block_bytes):
    q, x, mask = problem()
    places, scores = expected(q, x, mask)
    for documents, flags in ((x, mask), (x.numpy(), mask.numpy())):
        found = maxsim_topk(q, documents, K, document_mask=flags, block_bytes=block_bytes)
        assert torch.equal(found.indices, places)
        torch.testing.assert_close(found.values.double(), scores.gather(1, places), atol=1e-5, rtol=1e-5)


def test_memory_map(tmp_path):
    q, x, _ = problem()
    path = tmp_path / "documents.bin"
    x.half().numpy().tofile(path)
    stored = numpy.memmap(path, dtype="float16", mode="r", shape=tuple(x.shape))
    found = maxsim_topk(q, stored, K, block_bytes=2000)
    assert found.values.dtype == torch.float32
    assert torch.equal(found.indices, expected(q, x.half())[0])


def test_tokens_with_offsets_and_iterables():
    q, x, mask = problem()
    places, _ = expected(q, x, mask)
    sets = [one[flags] for one, flags in zip(x, mask, strict=True)]
    ends = torch.tensor([0] + [len(one) for one in sets]).cumsum(0)
    tokens = torch.cat(sets)
    blocks = [slice(0, 20), slice(20, 21), slice(21, 50)]
    forms = {
        "offsets": (tokens, ends),
        "arrays with offsets": (tokens.numpy(), ends.numpy()),
        "padded blocks": ((x[at], mask[at]) for at in blocks),
        "lists": (sets[at] for at in blocks),
        "arrays": [(x[at].numpy(), mask[at].numpy()) for at in blocks],
        "offsets in blocks": (
            (tokens[ends[at.start] : ends[at.stop]], ends[at.start : at.stop + 1] - ends[at.start])
            for at in blocks
        ),
    }
    for name, documents in forms.items():
        assert torch.equal(maxsim_topk(q, documents, K, block_bytes=3000).indices, places), name
    assert maxsim_topk(q, iter([x[:3]]), K).indices.shape == (3, 3)


def test_ties_keep_the_order_of_the_documents():
    q, x = torch.ones(2, 1, 3), torch.ones(40, 2, 3)
    x[25] = 2
    found = maxsim_topk(q, x, 4, block_bytes=x[0].nbytes * 7)
    assert found.indices.tolist() == [[25, 0, 1, 2]] * 2


def test_options_reach_maxsim_and_queries_may_be_ragged():
    q, x, mask = problem()
    sets = [q[0], q[1, :3], q[2, :0]]
    options = {"normalize": True, "temperature": 0.1, "reduction": "mean"}
    scores = maxsim(sets, x, document_mask=mask, empty=-1.0, **options)
    found = maxsim_topk(sets, x, K, document_mask=mask, empty=-1.0, block_bytes=3000, **options)
    torch.testing.assert_close(found.values, scores.sort(dim=1, descending=True).values[:, :K])


def test_progress_and_no_gradient():
    q, x, _ = problem()
    seen = []
    found = maxsim_topk(
        q.requires_grad_(), x, 2, block_bytes=x[0].nbytes * 20, progress=lambda *state: seen.append(state)
    )
    assert seen == [(20, 50), (40, 50), (50, 50)]
    assert not found.values.requires_grad
    seen.clear()
    maxsim_topk(q, iter([x]), 2, progress=lambda *state: seen.append(state))
    assert seen == [(50, None)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    q, x, _ = problem(dtype)
    found = maxsim_topk(q, x, K)
    assert found.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    _, scores = expected(q, x)
    torch.testing.assert_close(
        found.values.double(), scores.sort(dim=1, descending=True).values[:, :K], atol=2e-2, rtol=2e-3
    )


def test_nan_comes_first():
    q, x, _ = problem()
    x[30, 2, 1] = torch.nan
    assert (maxsim_topk(q, x, 3, block_bytes=1000).indices[:, 0] == 30).all()
