"""Every bad argument: a ValueError or TypeError that names it, before any compute."""

import pytest
import torch

from couplings.similarity import chamfer, maxsim, maxsim_topk

Q, X = torch.randn(3, 4, 5), torch.randn(2, 6, 5)
LIST = [torch.randn(2, 5), torch.randn(3, 5)]
ENDS = torch.tensor([0, 2, 6])
BOTH = [
    ("queries", {"queries": 3.0}, TypeError),
    ("queries", {"queries": Q.long()}, TypeError),
    ("queries", {"queries": Q[0]}, ValueError),
    ("documents", {"documents": X.to(torch.complex64)}, TypeError),
    ("documents", {"documents": X.double()}, TypeError),
    ("documents", {"documents": X[0]}, ValueError),
    ("documents", {"documents": X[..., :4]}, ValueError),
    ("documents", {"documents": X.to("meta")}, ValueError),
    ("query_mask", {"query_mask": torch.ones(3, 4)}, TypeError),
    ("query_mask", {"query_mask": [True]}, TypeError),
    ("query_mask", {"query_mask": torch.ones(3, 5, dtype=torch.bool)}, ValueError),
    ("document_mask", {"document_mask": torch.ones(3, 6, dtype=torch.bool)}, ValueError),
    ("document_mask", {"document_mask": torch.ones(2, 6, dtype=torch.bool, device="meta")}, ValueError),
    ("reduction", {"reduction": "max"}, ValueError),
    ("normalize", {"normalize": 1}, TypeError),
    ("temperature", {"temperature": -1.0}, ValueError),
    ("temperature", {"temperature": float("inf")}, ValueError),
    ("temperature", {"temperature": float("nan")}, ValueError),
    ("temperature", {"temperature": "warm"}, TypeError),
    ("temperature", {"temperature": True}, TypeError),
    ("empty", {"empty": float("nan")}, ValueError),
    ("empty", {"empty": None}, TypeError),
    ("chunk_bytes", {"chunk_bytes": 0}, ValueError),
    ("chunk_bytes", {"chunk_bytes": 1e6}, TypeError),
]
ONLY_SCORES = [
    ("queries", {"layout": "pairwise", "queries": Q[0, 0]}, ValueError),
    ("documents", {"layout": "pairwise"}, ValueError),
    ("documents", {"layout": "candidates", "documents": X.unsqueeze(0).expand(4, 2, 6, 5)}, ValueError),
    ("documents", {"layout": "candidates", "documents": X[0]}, ValueError),
    ("layout", {"layout": "pairs"}, ValueError),
    ("temperature", {"temperature": torch.tensor(0.0)}, ValueError),
    ("temperature", {"temperature": torch.ones(3)}, ValueError),
    ("temperature", {"temperature": torch.tensor(1)}, TypeError),
    ("topk", {"topk": 0}, ValueError),
    ("topk", {"topk": 2.0}, TypeError),
    ("topk", {"topk": True}, TypeError),
    ("topk", {"topk": 2, "temperature": 0.1}, ValueError),
    ("topk", {"topk": 2, "layout": "pairwise", "documents": torch.randn(3, 6, 5)}, ValueError),
    ("dtype", {"dtype": torch.int32}, ValueError),
    ("dtype", {"dtype": "float32"}, TypeError),
    # ragged
    ("queries", {"queries": []}, ValueError),
    (r"queries\[1\]", {"queries": [Q[0], Q]}, ValueError),
    (r"queries\[1\]", {"queries": [Q[0], 3]}, TypeError),
    (r"queries\[1\]", {"queries": [Q[0], Q[0].double()]}, TypeError),
    ("documents", {"documents": LIST, "layout": "candidates"}, ValueError),
    ("documents", {"documents": LIST, "layout": "pairwise"}, ValueError),
    ("documents", {"documents": [one.double() for one in LIST]}, TypeError),
    ("documents", {"documents": [one[:, :4] for one in LIST]}, ValueError),
    ("documents", {"documents": (X, ENDS)}, ValueError),
    ("documents", {"documents": (X[0], ENDS + 1)}, ValueError),
    ("documents", {"documents": (X[0], ENDS[:2])}, ValueError),
    ("documents", {"documents": (X[0], torch.tensor([0, 4, 2, 6]))}, ValueError),
    ("documents", {"documents": (X[0], ENDS.float())}, TypeError),
    ("documents", {"documents": (X[0], ENDS[:0])}, ValueError),
    ("document_mask", {"documents": LIST, "document_mask": torch.ones(2, 3, dtype=torch.bool)}, TypeError),
    ("document_mask", {"documents": LIST, "document_mask": [torch.ones(2, dtype=torch.bool)]}, ValueError),
    (r"document_mask\[0\]", {"documents": LIST, "document_mask": [torch.ones(3).bool()] * 2}, ValueError),
    ("document_mask", {"documents": (X[0], ENDS), "document_mask": torch.ones(5).bool()}, ValueError),
]
ONLY_TOPK = [
    ("queries", {"queries": Q.unsqueeze(0)}, ValueError),
    ("k", {"k": 0}, ValueError),
    ("k", {"k": 3}, ValueError),
    ("k", {"k": 1.0}, TypeError),
    ("block_bytes", {"block_bytes": 0}, ValueError),
    ("block_bytes", {"block_bytes": None}, TypeError),
    ("progress", {"progress": 3}, TypeError),
    ("documents", {"documents": iter(())}, ValueError),
    ("documents", {"documents": 3}, TypeError),
    ("documents", {"documents": (X[0], torch.tensor([0, 7]))}, ValueError),
    ("document_mask", {"documents": iter([X]), "document_mask": torch.ones(2, 6).bool()}, ValueError),
    ("document_mask", {"document_mask": torch.ones(2, 5).bool()}, ValueError),
]
# where retrieval's forms differ: mixed dtypes meet in the wider one, blocks may lie elsewhere
STRICT = ("documents", "query_mask", "document_mask")


def check(function, argument, arguments, error):
    with pytest.raises(error, match=f"^{argument}: expected .+, got ") as caught:
        function(**arguments)
    assert type(caught.value) is error


@pytest.mark.parametrize(("argument", "options", "error"), BOTH + ONLY_SCORES)
def test_maxsim(argument, options, error):
    check(maxsim, argument, {"queries": Q, "documents": X, **options}, error)


@pytest.mark.parametrize(
    ("argument", "options", "error"), [case for case in BOTH if case[0] not in STRICT] + ONLY_TOPK
)
def test_maxsim_topk(argument, options, error):
    check(maxsim_topk, argument, {"queries": Q, "documents": X, "k": 1, **options}, error)


@pytest.mark.parametrize(("argument", "options", "error"), BOTH)
def test_chamfer(argument, options, error):
    names = {"queries": "x", "documents": "y", "query_mask": "x_mask", "document_mask": "y_mask"}
    options = {names.get(name, name): value for name, value in options.items()}
    check(chamfer, names.get(argument, argument), {"x": Q, "y": X, **options}, error)


def test_chamfer_has_two_layouts():
    check(chamfer, "layout", {"x": Q, "y": X, "layout": "candidates"}, ValueError)
