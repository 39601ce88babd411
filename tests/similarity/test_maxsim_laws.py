"""Laws of MaxSim as property tests; transforms and compilation."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from couplings.similarity import chamfer, maxsim
from couplings.testing.similarity import maxsim_by_pairs

FORMS = {"hard": {}, "smooth": {"temperature": 0.3}, "xtr": {"topk": 5}}
forms = pytest.mark.parametrize("form", FORMS)
independent = pytest.mark.parametrize("form", ["hard", "smooth"])
seeds = st.integers(0, 2**31 - 1)


def draw(seed, dtype=torch.float64):
    """Random sizes; inner products with ties for a third of the seeds; masks with holes."""
    g = torch.Generator().manual_seed(seed)
    nq, nd, lq, ld, d = (int(torch.randint(1, 7, (), generator=g)) for _ in range(5))
    q, x = torch.randn(nq, lq, d, generator=g), torch.randn(nd, ld, d, generator=g)
    if seed % 3 == 0:
        q, x = q.round(), x.round()
    qm, dm = torch.rand(nq, lq, generator=g) > 0.25, torch.rand(nd, ld, generator=g) > 0.25
    return q.to(dtype), x.to(dtype), qm, dm, g


@forms
@given(seed=seeds, chunk=st.sampled_from([None, 1, 64, 500, 4000]))
def test_any_tile_size_gives_the_definition(form, seed, chunk):
    q, x, qm, dm, _ = draw(seed)
    found = maxsim(q, x, query_mask=qm, document_mask=dm, chunk_bytes=chunk, empty=-1.0, **FORMS[form])
    expected = maxsim_by_pairs(q, x, qm, dm, empty=-1.0, **FORMS[form])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@forms
@given(seed=seeds)
def test_permutations_of_documents_queries_and_tokens(form, seed):
    q, x, qm, dm, g = draw(seed)
    rows, columns = torch.randperm(len(q), generator=g), torch.randperm(len(x), generator=g)
    query_tokens = torch.randperm(q.shape[1], generator=g)
    document_tokens = torch.randperm(x.shape[1], generator=g)
    expected = maxsim(q, x, query_mask=qm, document_mask=dm, **FORMS[form])[rows][:, columns]
    found = maxsim(
        q[rows][:, query_tokens],
        x[columns][:, document_tokens],
        query_mask=qm[rows][:, query_tokens],
        document_mask=dm[columns][:, document_tokens],
        **FORMS[form],
    )
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@forms
@given(seed=seeds, scale=st.sampled_from([1e-3, 0.5, 7.0, 1e4]))
def test_scores_scale_with_their_inputs(form, seed, scale):
    q, x, qm, dm, _ = draw(seed)
    options = dict(FORMS[form])
    expected = maxsim(q, x, query_mask=qm, document_mask=dm, **options)
    if "temperature" in options:
        options["temperature"] *= scale
    found = maxsim(scale * q, x, query_mask=qm, document_mask=dm, **options)
    torch.testing.assert_close(found, scale * expected, atol=1e-11 * scale, rtol=1e-11)


@independent
@given(seed=seeds, dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_documents_are_independent_bitwise(form, seed, dtype):
    q, x, qm, dm, g = draw(seed, dtype)
    other = x.clone()
    other[1:] = 1e3 * torch.randn(other[1:].shape, generator=g).to(dtype)
    other[-1:] = [float("nan"), 0.0, float("inf")][seed % 3] if len(x) > 1 else other[-1:]
    options = {"query_mask": qm, "document_mask": dm, **FORMS[form]}
    first, second = maxsim(q, x, **options), maxsim(q, other, **options)
    assert torch.equal(first[:, 0], second[:, 0])


@forms
def test_nan_touches_its_document_only(form):
    q, x = torch.randn(3, 4, 5), torch.randn(4, 6, 5)
    x[2, 3, 1] = torch.nan
    out = maxsim(q, x, **FORMS[form])
    assert out[:, 2].isnan().all()
    assert out[:, [0, 1, 3]].isfinite().all()
    q[1, 0] = torch.nan
    out = maxsim(q, x, **FORMS[form])
    assert out[1].isnan().all()
    assert out[[0, 2]][:, [0, 1, 3]].isfinite().all()


@forms
def test_inputs_are_not_modified_and_results_repeat(form):
    q, x, qm, dm, _ = draw(7)
    kept = [t.clone() for t in (q, x, qm, dm)]
    q.requires_grad_()
    x.requires_grad_()
    runs = []
    for _ in range(2):
        score = maxsim(q, x, query_mask=qm, document_mask=dm, **FORMS[form])
        runs.append((score, *torch.autograd.grad(score.square().sum(), (q, x))))
    assert all(map(torch.equal, *runs))
    assert all(map(torch.equal, (q, x, qm, dm), kept))


@forms
@given(seed=seeds)
def test_gradients_are_finite(form, seed):
    q, x, qm, dm, g = draw(seed, torch.float32)
    leaves = (1e3 * q).requires_grad_(), x.requires_grad_()
    out = maxsim(
        *leaves, query_mask=qm, document_mask=dm, reduction="mean", normalize=seed % 2 == 0, **FORMS[form]
    )
    for grad in torch.autograd.grad(out, leaves, torch.randn(out.shape, generator=g)):
        assert grad.isfinite().all()


@forms
def test_any_memory_layout(form):
    q, x = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(5, 6, 2, dtype=torch.float64)
    expected = maxsim(q.permute(1, 2, 0).contiguous(), x.permute(2, 1, 0).contiguous(), **FORMS[form])
    leaves = q.requires_grad_(), x.requires_grad_()
    found = maxsim(leaves[0].permute(1, 2, 0), leaves[1].permute(2, 1, 0), **FORMS[form])
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(
        lambda a, b: maxsim(a.permute(1, 2, 0), b.permute(2, 1, 0), **FORMS[form]), leaves
    )


@forms
@pytest.mark.parametrize("masks", [False, True])
def test_func_transforms(form, masks):
    q, x = torch.randn(3, 2, 4, 5, dtype=torch.float64), torch.randn(3, 6, 5, dtype=torch.float64)
    mask = torch.rand(3, 6) > 0.3 if masks else None

    def score(q):
        return maxsim(q, x, document_mask=mask, **FORMS[form])

    def loss(q):
        return score(q).square().sum()

    torch.testing.assert_close(torch.func.vmap(score)(q), score(q))
    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(q), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(q), expected)
    torch.testing.assert_close(
        torch.func.grad(lambda q: torch.func.vmap(score)(q).square().sum())(q), expected
    )
    part = q[0]
    jacobian = torch.func.jacrev(score)(part)
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(score, part))
    hessian = torch.func.jacrev(torch.func.jacrev(loss))(part)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, part))
    both = torch.func.vmap(lambda q, x: maxsim(q, x.unsqueeze(0), **FORMS[form]).squeeze(-1))
    torch.testing.assert_close(both(q, x), maxsim(q, x.unsqueeze(1), **FORMS[form]).squeeze(-1))
    # documents alone are mapped over
    swapped = torch.func.vmap(lambda x: maxsim(q[0], x.unsqueeze(0), **FORMS[form]))(x)
    assert swapped.shape == (3, 2, 1)


@forms
def test_forward_mode_raises(form):
    q, x = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda q: maxsim(q, x, **FORMS[form]), (q,), (q,))


@forms
@pytest.mark.parametrize("masks", [False, True])
def test_compile_fullgraph(form, masks):
    q, x, qm, dm, _ = draw(11)
    options = {**({"query_mask": qm, "document_mask": dm} if masks else {}), **FORMS[form]}

    def function(q, x):
        return maxsim(q, x, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = q.requires_grad_(), x.requires_grad_()
    torch.testing.assert_close(compiled(*leaves), function(*leaves))
    expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    actual = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    torch.testing.assert_close(actual, expected)
    torch._dynamo.reset()


@forms
def test_autocast_changes_nothing(form):
    q, x, qm, dm, _ = draw(5, torch.float32)
    leaves = q.requires_grad_(), x.requires_grad_()
    options = {"query_mask": qm, "document_mask": dm, "normalize": True, **FORMS[form]}
    plain = maxsim(*leaves, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = maxsim(*leaves, **options)
        assert torch.equal(cast, plain)
        inside = torch.autograd.grad(cast.sum(), leaves)
    assert all(map(torch.equal, inside, torch.autograd.grad(plain.sum(), leaves)))


@forms
@pytest.mark.parametrize("ragged", [False, True])
def test_autocast_brings_mixed_dtypes_together(form, ragged):
    """A network's output in bfloat16 meets stored float32 vectors in float32; outside autocast that stays an error."""
    q, x = torch.randn(3, 4, 5), torch.randn(4, 6, 5)
    layer = torch.nn.Linear(5, 5)

    def score(function):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = layer(q)
            return tokens, function(tokens, list(x) if ragged else x)

    tokens, found = score(lambda a, b: maxsim(a, b, **FORMS[form]))
    assert tokens.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, maxsim(tokens.float(), list(x) if ragged else x, **FORMS[form]))
    swapped = score(lambda a, b: maxsim(b, a, **FORMS[form]))[1]
    torch.testing.assert_close(swapped, maxsim(list(x) if ragged else x, tokens.float(), **FORMS[form]))
    if form != "xtr":
        both = score(lambda a, b: chamfer(a, b, **FORMS[form]))[1]
        torch.testing.assert_close(both, chamfer(tokens.float(), list(x) if ragged else x, **FORMS[form]))
    found.sum().backward()
    assert layer.weight.grad.isfinite().all()
    with pytest.raises(TypeError, match="documents: expected dtype bfloat16"):
        maxsim(tokens, list(x) if ragged else x, **FORMS[form])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smooth_scores_of_short_vectors_have_the_same_bits_beside_long_ones(dtype):
    """A tile of short vectors alone skips the passes that long ones need."""
    q, x = torch.randn(6, 8, 5).to(dtype), torch.randn(7, 9, 5).to(dtype)
    mask = torch.rand(7, 9) > 0.3
    alone = maxsim(q, x, document_mask=mask, temperature=0.5, dtype=torch.float32)
    x = torch.cat([x, 1e3 * x[:1]])
    mask = torch.cat([mask, mask[:1]])
    beside = maxsim(q, x, document_mask=mask, temperature=0.5, dtype=torch.float32)
    assert torch.equal(beside[:, :7], alone)


def test_autocast_does_not_hide_a_list_of_two_dtypes():
    documents = [torch.randn(3, 4), torch.randn(3, 4).double()]
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="documents"):
        maxsim(torch.randn(2, 3, 4).bfloat16(), documents)


@given(seed=seeds, dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_smooth_maximum_at_any_temperature(seed, dtype):
    """Logits from near 0, which are exponentiated as they are, to thousands; a tile holds both kinds."""
    q, x, qm, dm, g = draw(seed, dtype)
    x = x * torch.tensor([1e-2, 1.0, 30.0])[torch.randint(3, (len(x), 1, 1), generator=g)].to(dtype)
    leaves = q.requires_grad_(), x.requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in leaves]
    options = {"query_mask": qm, "document_mask": dm}
    t = [1.0, 0.1, 0.01, 1e-3][seed % 4]
    found = maxsim(*leaves, temperature=t, dtype=torch.promote_types(dtype, torch.float32), **options)
    expected = maxsim_by_pairs(*wide, qm, dm, temperature=t)
    tight = {"atol": 1e-11, "rtol": 1e-11} if dtype == torch.float64 else {"atol": 2e-5, "rtol": 2e-6}
    torch.testing.assert_close(found.double(), expected, **tight)
    for one, alone in enumerate(x.detach().unsqueeze(1)):
        mask = dm[one : one + 1]
        single = maxsim(q, alone, query_mask=qm, document_mask=mask, temperature=t, dtype=found.dtype)
        torch.testing.assert_close(single, found[:, one : one + 1], **tight)
    for grad in torch.autograd.grad(found.sum(), leaves):
        assert grad.isfinite().all()


def peak_bytes(function):
    """Most bytes that were allocated at a time in a call, less those that were there before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = function()
    level = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    del kept
    return peak


@forms
def test_memory_stays_within_outputs_winners_and_tiles(form):
    q, x = torch.randn(16, 32, 16, requires_grad=True), torch.randn(32, 200, 16, requires_grad=True)
    grid, tile = 16 * 32 * 32 * 200 * 4, 2**18
    held = 16 * 32 * 32 * 4  # winners
    peak = peak_bytes(lambda: maxsim(q, x, chunk_bytes=tile, **FORMS[form]).sum().backward())
    outputs = 4 * (16 * 32 * 16 + 32 * 200 * 16)
    blocks = {"hard": 6, "smooth": 2, "xtr": 8}[form]
    assert peak <= 2 * held + 2 * outputs + blocks * tile
    assert peak < grid / 3


@independent
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_holds_scores_winners_and_one_tile(form, masked, dtype):
    q, x = torch.randn(16, 32, 16, dtype=dtype), torch.randn(64, 200, 16, dtype=dtype)
    mask = torch.rand(64, 200) > 0.2 if masked else None
    tile, grid = 2**20, 16 * 32 * 64 * 200 * 4
    scores, winners = 16 * 64 * 4, 16 * 32 * 64 * 4  # of the smooth maximum: a value for each query token
    operands = 16 * 32 * 16 * 4  # the queries in the dtype of the sums
    peak = peak_bytes(
        lambda: maxsim(q.requires_grad_(), x, document_mask=mask, chunk_bytes=tile, **FORMS[form])
    )
    # bfloat16's winners are scored again: their vectors lie beside the tile, which is half as wide
    tiles = 1.5 if form == "hard" and dtype == torch.bfloat16 else 1.1
    assert tile / 2 < peak <= 3 * scores + winners + 2 * operands + tiles * tile
    assert peak < grid / 10


@given(seed=seeds)
def test_smooth_gradients_at_any_temperature(seed):
    """Shares of every size, down to those that are cut off, against autograd through the definition."""
    q, x, qm, dm, g = draw(seed)
    x = x * torch.tensor([1e-2, 1.0, 30.0])[torch.randint(3, (len(x), 1, 1), generator=g)]
    options = {"query_mask": qm, "document_mask": dm, "temperature": [1.0, 0.1, 0.01, 1e-3][seed % 4]}
    grads = []
    for function in (maxsim, maxsim_by_pairs):
        leaves = [t.clone().requires_grad_() for t in (q, x)]
        grads.append(torch.autograd.grad(function(*leaves, **options).sum(), leaves))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)
