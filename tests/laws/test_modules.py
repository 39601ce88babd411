"""Module forms: equal to their function bit for bit; pickled, copied, saved and loaded they stay so."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch

import couplings as cp

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
SETS = X.reshape(2, 4, 4), Y.reshape(2, 4, 4)
PLAN = torch.log_softmax(X.reshape(2, 4, 4), -1)
RELEVANT = Y > 0.3
L = cp.losses

MODULES: dict[
    str, tuple[Callable[[], torch.nn.Module], tuple[torch.Tensor, ...], Callable[..., object] | None]
] = {
    # constructor, inputs, the function with the same settings
    "AveragePrecisionLoss": (cp.nn.AveragePrecisionLoss, (X, RELEVANT), L.average_precision_loss),
    "CLIPLoss": (cp.nn.CLIPLoss, (X, Y), L.clip_loss),
    "CosineTargetLoss": (cp.nn.CosineTargetLoss, (X, Y), L.cosine_target_loss),
    "DustbinMatching": (
        lambda: cp.nn.DustbinMatching(0.5),
        SETS[:1],
        lambda x: cp.log_optimal_transport(x, torch.tensor(0.5), None),
    ),
    "GumbelSinkhorn": (
        lambda: cp.nn.GumbelSinkhorn(0.5, noise=0.0),
        SETS[:1],
        lambda x: cp.gumbel_sinkhorn(x, epsilon=0.5, noise=0.0),
    ),
    "InfoNCELoss": (cp.nn.InfoNCELoss, (X, Y), L.info_nce_loss),
    "KendallLoss": (cp.nn.KendallLoss, (X, Y), L.kendall_loss),
    "LeastQuantileLoss": (cp.nn.LeastQuantileLoss, (X,), L.least_quantile_loss),
    "MatchingLoss": (cp.nn.MatchingLoss, (PLAN, torch.tensor([[0, 1, -1], [2, -1, 0]])), L.matching_loss),
    "MaxSim": (cp.nn.MaxSim, SETS, cp.maxsim),
    "NDCGLoss": (cp.nn.NDCGLoss, (X, RELEVANT), L.ndcg_loss),
    "NPairsLoss": (
        lambda: cp.nn.NPairsLoss(0.2),
        (X, Y),
        lambda x, y: L.n_pairs_loss(x, y, temperature=0.2),
    ),
    "NTXentLoss": (cp.nn.NTXentLoss, (X, Y), L.nt_xent_loss),
    "RecallAtKLoss": (
        lambda: cp.nn.RecallAtKLoss(2),
        (X, RELEVANT),
        lambda x, y: L.recall_at_k_loss(x, y, 2),
    ),
    "SigmoidLoss": (lambda: cp.nn.SigmoidLoss(learn_temperature=False), (X, Y), L.sigmoid_loss),
    "SinkhornNormalize": (cp.nn.SinkhornNormalize, SETS[:1], cp.sinkhorn_normalize),
    "SoftPermutation": (cp.nn.SoftPermutation, (X,), cp.soft_permutation),
    "SoftQuantile": (lambda: cp.nn.SoftQuantile(0.3), (X,), lambda x: cp.soft_quantile(x, 0.3)),
    "SoftRank": (cp.nn.SoftRank, (X,), cp.soft_rank),
    "SoftSort": (cp.nn.SoftSort, (X,), cp.soft_sort),
    "SoftTopK": (lambda: cp.nn.SoftTopK(3), (X,), lambda x: cp.soft_topk(x, 3)),
    "SoftTopKMask": (lambda: cp.nn.SoftTopKMask(3), (X,), lambda x: cp.soft_topk_mask(x, 3)),
    "SpearmanLoss": (cp.nn.SpearmanLoss, (X, Y), L.spearman_loss),
    "TopKAttention": (lambda: cp.nn.TopKAttention(4, 2, 2), (SETS[0],) * 3, None),
    "TopKLoss": (cp.nn.TopKLoss, (X, torch.tensor([0, 3, 7, 2])), L.topk_loss),
    "TrimmedLoss": (lambda: cp.nn.TrimmedLoss(0.5), (X,), lambda x: L.trimmed_loss(x, 0.5)),
    "TripletLoss": (cp.nn.TripletLoss, (X, Y), L.triplet_loss),
}


def tensors(result: object) -> list[torch.Tensor]:
    if isinstance(result, cp.Coupling):
        return [result.plan(), result.residual, result.status]
    return [result] if isinstance(result, torch.Tensor) else list(result)


def through_file(thing: object, weights_only: bool) -> object:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def same(actual: object, expected: object) -> None:
    for one, other in zip(tensors(actual), tensors(expected), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", MODULES)
def test_module_is_its_function_and_survives_copies(name: str) -> None:
    make, inputs, function = MODULES[name]
    module = make()
    expected = module(*inputs)
    if function is not None:
        same(expected, function(*inputs))
    for twin in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        through_file(module, weights_only=False),
    ):
        same(twin(*inputs), expected)
        assert repr(twin) == repr(module)
    # the state, as checkpoints keep it: into a module made anew
    fresh = make()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(1)
    fresh.load_state_dict(through_file(module.state_dict(), weights_only=True))
    same(fresh(*inputs), expected)


RESULTS: dict[str, Callable[[], object]] = {
    "Coupling": lambda: cp.solve(SETS[0].clone().requires_grad_(), epsilon=0.5),
    "Coupling of dustbins": lambda: cp.match_with_dustbin(SETS[0], 0.5),
    "Coupling, unbalanced": lambda: cp.solve(SETS[0], epsilon=0.5, tau_a=1.0),
    "EmbeddingDiagnostics": lambda: cp.diagnostics(X, Y),
    "MaxSimTopK": lambda: cp.maxsim_topk(*SETS, 2),
    "OrderCertificate": lambda: cp.order_certificate(X),
    "Matches": lambda: cp.mutual_matches(PLAN),
    "Potentials": lambda: cp.solve(SETS[0], epsilon=0.5).potentials,
    "Beams": lambda: _search(cp.beam.beam_search, max_length=3),
    "SoftBeams": lambda: _search(cp.beam.soft_beam_search, steps=3),
    "Status": lambda: cp.Status.STALLED,
    "ChebyshevBoxes": lambda: cp.transport.ChebyshevBoxes(0.0, 1.0, 3),
}


def _search(function: Callable[..., object], **options: object) -> object:
    def step(embedding: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = torch.tanh(state + embedding)
        return (state @ Y[:, :8].mT).log_softmax(-1), state

    return function(step, Y, X[:2], start=0, beam=2, **options)


@pytest.mark.parametrize("name", RESULTS)
def test_results_survive_copies(name: str) -> None:
    result = RESULTS[name]()
    for twin in (
        copy.deepcopy(result) if name not in ("Potentials", "SoftBeams") else result,
        pickle.loads(pickle.dumps(result)),
        through_file(result, weights_only=False),
    ):
        assert type(twin) is type(result)
        if isinstance(result, (cp.Status, cp.EmbeddingDiagnostics, cp.transport.ChebyshevBoxes)):
            assert twin == result
        else:
            same([t for t in tensors(twin) if t is not None], [t for t in tensors(result) if t is not None])


def test_a_coupling_keeps_its_certificate() -> None:
    coupling = cp.solve(SETS[0], epsilon=0.5)
    twin = pickle.loads(pickle.dumps(coupling)).check()
    assert torch.equal(twin.gap, coupling.gap)
    assert torch.equal(twin.value, coupling.value)
    assert torch.equal(twin.apply(Y[:2, :4]), coupling.apply(Y[:2, :4]))
