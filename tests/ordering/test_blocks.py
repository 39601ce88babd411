"""Sorted rows and sums over blocks: compiled and plain against loops, derivatives, threads; rounds and engines."""

import multiprocessing
import subprocess
import sys
from functools import partial

import pytest
import torch
from test_isotonic import inputs
from torch.autograd import gradcheck, gradgradcheck

import couplings as cp
from couplings.ordering import isotonic, isotonic_compiled, threads
from couplings.ordering.blocks import block_mean, block_sum, centred, softmax, sort_rows
from couplings.ordering.isotonic import Blocks, pool, pool_entropic


@pytest.fixture(params=["compiled", "plain"])
def way(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(isotonic_compiled, "compiled", lambda: None)
    else:
        assert isotonic_compiled.compiled() is not None, isotonic_compiled.status()


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(isotonic_compiled, "compiled", lambda: None)


def special(dtype):
    x = torch.randn(6, 300, dtype=dtype)
    x[1] = torch.randint(-2, 3, (300,)).to(dtype)
    x[2, ::3], x[2, 1::3], x[2, 2::3] = 0.0, -0.0, 1e-40  # denormal in float32
    x[3, 5], x[3, 9], x[3, 200] = float("nan"), float("inf"), -float("inf")
    x[4, 7] = -float("nan")
    x[5] *= torch.logspace(-30, 30, 300).to(dtype)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 300])
def test_sort_is_torch_sort(way, dtype, n):
    x = special(dtype)[:, :n]
    found, order = sort_rows(x)
    expected = torch.sort(x, dim=-1, stable=True)
    assert found.dtype == torch.float64
    assert torch.equal(order, expected.indices)
    torch.testing.assert_close(found, expected.values.double(), rtol=0, atol=0, equal_nan=True)


def test_sort_of_other_layouts_and_its_gradient(way):
    x = torch.randn(4, 30, 3, requires_grad=True)
    rows = x.movedim(1, -1)
    found, order = sort_rows(rows)
    assert torch.equal(order, rows.argsort(-1))
    cotangent = torch.randn(found.shape, dtype=torch.float64)
    (mine,) = torch.autograd.grad(found, x, cotangent)
    (theirs,) = torch.autograd.grad(rows.sort(-1).values, x, cotangent.float())
    assert torch.equal(mine, theirs)
    mapped = torch.vmap(lambda row: sort_rows(row)[0])(rows)
    assert torch.equal(mapped, found)


def partition(rows=3, n=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ends = torch.rand(rows, n, generator=generator) < 0.4
    ends[:, -1] = True
    place = torch.arange(n)
    last = torch.where(ends, place, n).flip(-1).cummin(-1).values.flip(-1)
    starts = torch.nn.functional.pad(ends[:, :-1], (1, 0), value=True)
    return Blocks(torch.where(starts, place, 0).cummax(-1).values, last)


def same(blocks):
    """(rows, n, n), whether two entries share a block."""
    return (blocks.first.unsqueeze(-1) == blocks.first.unsqueeze(-2)).double()


def dense(name, x, rate, weights, blocks):
    a, together = torch.ones_like(x) if weights is None else weights, same(blocks)
    if name == "centred":
        mean = (together @ (a * x).unsqueeze(-1) / (together @ a.unsqueeze(-1))).squeeze(-1)
        return rate * (x - mean)
    power = (rate * x).exp()
    return power / (together @ (a * power).unsqueeze(-1)).squeeze(-1)


FUNCTIONS = {"centred": centred, "softmax": softmax}
each = pytest.mark.parametrize("name", FUNCTIONS)
weighted = pytest.mark.parametrize("heavy", [False, True])


def arguments(heavy, n=12):
    x = torch.randn(3, n, dtype=torch.float64).sort(-1).values.requires_grad_()
    rate = torch.rand(3, 1, dtype=torch.float64).add(0.5).requires_grad_()
    weights = torch.rand(3, n, dtype=torch.float64).add(0.1).requires_grad_() if heavy else None
    return x, rate, weights


def test_sums_and_means(way):
    blocks = partition()
    value = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    together = same(blocks)
    total = (together @ value.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(block_sum(value, blocks), total)
    torch.testing.assert_close(block_mean(value, blocks), total / together.sum(-1))
    for function in (block_sum, block_mean):
        assert gradcheck(lambda v, f=function: f(v, blocks), (value,))
        assert gradgradcheck(lambda v, f=function: f(v, blocks), (value,))
        torch.testing.assert_close(
            torch.vmap(lambda v, *b, f=function: f(v, Blocks(*b)))(value, *blocks), function(value, blocks)
        )


@each
@weighted
def test_values_and_derivatives(name, heavy, way):
    blocks, given = partition(), arguments(heavy)
    found, expected = FUNCTIONS[name](*given, blocks), dense(name, *given, blocks)
    torch.testing.assert_close(found, expected)
    inputs = [t for t in given if t is not None]

    def function(x, rate, weights=None):
        return FUNCTIONS[name](x, rate, weights, blocks)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@each
@weighted
def test_third_derivatives(name, heavy, way):
    blocks, given = partition(), arguments(heavy)
    inputs = [t for t in given if t is not None]
    third = []
    for function in (lambda *g: FUNCTIONS[name](*g, blocks), lambda *g: dense(name, *g, blocks)):
        total = (function(*given) ** 2 * torch.arange(12)).sum()
        for _ in range(3):
            grads = torch.autograd.grad(total, inputs, create_graph=True)
            total = sum((grad * torch.arange(grad.numel()).reshape(grad.shape)).sum() for grad in grads)
        third.append(grads)
    for mine, theirs in zip(*third, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-7 * float(theirs.detach().abs().max()))


@each
def test_where_scores_lie_costs_no_digits(name, way):
    x, rate, _ = arguments(False)
    blocks = partition()
    shifted = (x.detach() * 2**20).round() / 2**20 + 2.0**20  # exact
    expected = FUNCTIONS[name](shifted - 2.0**20, rate, None, blocks)
    torch.testing.assert_close(FUNCTIONS[name](shifted, rate, None, blocks), expected, rtol=1e-14, atol=1e-14)


def test_threads_change_nothing(monkeypatch):
    """Each works on rows of its own, and records nothing."""
    assert isotonic_compiled.compiled() is not None, isotonic_compiled.status()
    x = torch.randn(7, 90, requires_grad=True)

    def everything():
        ordered, order = sort_rows(x)
        blocks = pool(-ordered + torch.randn(7, 90, generator=torch.Generator().manual_seed(1)))
        found = centred(ordered, torch.ones(7, 1, dtype=torch.float64), None, blocks)
        return found, order, *blocks, *torch.autograd.grad(found.square().sum(), x)

    expected = everything()
    monkeypatch.setattr(threads, "PARALLEL", 1)
    before = torch.get_num_threads()
    try:
        for count in (2, 3, 16):
            torch.set_num_threads(count)
            for mine, theirs in zip(everything(), expected, strict=True):
                assert torch.equal(mine, theirs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("team", ["torch's", "python's"])
@pytest.mark.parametrize("variant", ["l2", "kl"])
@pytest.mark.parametrize("function", [cp.soft_rank, cp.soft_sort])
def test_threads_give_the_operators_the_same_bits(function, variant, team, monkeypatch):
    if team == "python's":
        monkeypatch.setattr(threads, "_team", lambda: None)
    x = torch.randn(7, 90, requires_grad=True)
    cotangent = torch.randn(7, 90)

    def everything():
        found = function(x, method="projection", variant=variant)
        return found, *torch.autograd.grad(found, x, cotangent)

    expected = everything()
    monkeypatch.setattr(threads, "PARALLEL", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for mine, theirs in zip(everything(), expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_a_started_process_finishes(method, tmp_path):
    """A forked one has none of the threads that were there before."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import multiprocessing, sys, torch
from couplings.ordering import threads
def count():
    torch.set_num_threads(2)
    done = []
    threads.shared(lambda part: lambda: done.append(part), 2, threads.PARALLEL)
    return len(done)
def answer():
    sys.exit(count())
if __name__ == "__main__":
    assert count() == 2
    child = multiprocessing.get_context("{method}").Process(target=answer)
    child.start()
    child.join()
    sys.exit(child.exitcode - 2)
""")
    subprocess.run([sys.executable, script], check=True, timeout=100)


def test_an_error_in_a_thread_is_raised(monkeypatch):
    monkeypatch.setattr(threads, "PARALLEL", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)

    def work(start):
        if start:
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        threads.shared(lambda part: partial(work, part.start), 5, 10)


@pytest.mark.parametrize("parts", [2, 5])
def test_no_part_is_left_undone(monkeypatch, parts):
    """Whatever becomes of the threads that were to help: a signal may end the way into a callback."""
    monkeypatch.setattr(threads, "PARALLEL", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: parts)
    monkeypatch.setattr(threads, "_team", lambda: lambda *_: None)
    done = []
    threads.shared(lambda part: lambda: done.extend(range(10)[part]), 10, 10)
    assert sorted(done) == list(range(10))


@pytest.mark.parametrize("kl", [False, True])
def test_either_way_of_a_round_gives_the_same_bits(kl, plain, monkeypatch):
    monkeypatch.setattr(isotonic, "SMALL", 0)
    for y in inputs(400).values():
        scale = (
            1 if not kl else 900 / (y.amax() - y.amin()).clamp_min(1)
        )  # beyond the range of least squares, too
        s = (y * scale).sort(-1).values
        w = torch.arange(1, 401, dtype=torch.float64).log().expand_as(s)
        weights = torch.rand(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
        found = []
        for many in (0.0, 0.8, 2.0):
            monkeypatch.setattr(isotonic, "MANY", many)
            found.append(pool_entropic(s, w, weights) if kl else pool(y, weights))
        for other in found[1:]:
            assert torch.equal(other.first, found[0].first)
            assert torch.equal(other.last, found[0].last)


def test_both_engines_of_the_entropic_loss(way, monkeypatch):
    """The same values by least squares of exponentials and by logarithms; each row by its own range alone."""
    n = 200
    w = torch.arange(1, n + 1, dtype=torch.float64).log()
    s = (
        torch.stack([torch.randn(n, dtype=torch.float64) * scale for scale in (0.1, 3, 50, 1e3, 1e5)])
        .sort(-1)
        .values
    )
    w = w.expand_as(s)

    def values(blocks):
        together = same(blocks).bool()
        mass = [torch.where(together, t.unsqueeze(-2), -torch.inf).logsumexp(-1) for t in (s, w)]
        return mass[0] - mass[1]

    found = pool_entropic(s, w)
    for row in range(len(s)):
        alone = pool_entropic(s[row : row + 1], w[row : row + 1])
        assert torch.equal(alone.first[0], found.first[row])
        assert torch.equal(alone.last[0], found.last[row])
    monkeypatch.setattr(isotonic, "RANGE", 0.0)
    torch.testing.assert_close(values(found), values(pool_entropic(s, w)), rtol=1e-12, atol=1e-12)
    assert (values(found).diff(dim=-1) >= -1e-12 * s.abs().amax(-1, keepdim=True)).all()
