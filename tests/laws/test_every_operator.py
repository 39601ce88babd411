"""The laws that CONTRIBUTING.md lists, for every operator of the table."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from hypothesis import given, settings
from law_entry import LAWS, Operator, Outputs, Settings, Source, Tensors, cast, sizes
from law_table import BY_NAME

EXAMPLES = 3


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of a law runs for the operators that it applies to."""
    law = getattr(metafunc.function, "law", None)
    if law:
        names = [name for name, operator in BY_NAME.items() if law not in operator.without]
        metafunc.parametrize("operator", [BY_NAME[name] for name in names], ids=names)


def law(name: str, examples: int = EXAMPLES):
    assert name in LAWS
    explore = os.environ.get("HYPOTHESIS_PROFILE") == "explore"

    def mark(test):
        test = given(drawn=sizes)(test)
        if not explore:
            test = settings(max_examples=examples)(test)
        test.law = name
        return test

    return mark


def close(actual: Outputs, expected: Outputs, tolerance: float) -> None:
    """Equal up to ``tolerance`` times the size of what is expected."""
    for one, other in zip(actual, expected, strict=True):
        size = float(other.detach().abs().nan_to_num(0, 0, 0).amax()) if other.numel() else 0.0
        torch.testing.assert_close(
            one, other, atol=tolerance * max(1e-300, size, 1.0 if size < 1e6 else 0.0), rtol=0
        )


def index(axes: str, axis: str, places: object) -> tuple[object, ...]:
    """What selects ``places`` along ``axis``."""
    return tuple(places if letter == axis else slice(None) for letter in axes)


def moved(operator: Operator, tensors: Tensors, axis: str, order: torch.Tensor) -> Tensors:
    return {
        name: t[index(operator.inputs[name], axis, order)] if axis in operator.inputs[name] else t
        for name, t in tensors.items()
    }


def size_of(operator: Operator, tensors: Tensors, axis: str) -> int:
    name = next(name for name, axes in operator.inputs.items() if axis in axes)
    return tensors[name].shape[operator.inputs[name].index(axis)]


def gradients(operator: Operator, tensors: Tensors, epsilon: float, options: Settings, cotangent):
    """Outputs, and the gradients of <outputs, cotangent(outputs)> in the learned inputs."""
    leaves = {name: t.clone().requires_grad_(name in operator.learned) for name, t in tensors.items()}
    out = operator.call(leaves, epsilon, options)
    total = sum((o * c).sum() for o, c in zip(out, cotangent(out), strict=True) if o.requires_grad)
    found = torch.autograd.grad(total, [leaves[name] for name in operator.learned])
    return tuple(o.detach() for o in out), dict(zip(operator.learned, found, strict=True))


@law("permutation")
def test_permutation(operator: Operator, drawn) -> None:
    source = Source(drawn)
    tensors, options = operator.draw(source)
    plain = operator.call(tensors, drawn.epsilon, options)
    for axis in operator.free:
        order = source.permutation(size_of(operator, tensors, axis))
        found = operator.call(moved(operator, tensors, axis, order), drawn.epsilon, options)
        expected = tuple(
            o[index(axes, axis, order)] if axis in axes else o
            for o, axes in zip(plain, operator.outputs, strict=True)
        )
        close(found, expected, operator.tolerance)


@law("invariance")
def test_invariance(operator: Operator, drawn) -> None:
    source = Source(drawn)
    tensors, options = operator.draw(source)
    for change in operator.invariances:
        before, after, like = change(tensors, source)
        plain = operator.call(before, drawn.epsilon, options)
        found = operator.call(after, drawn.epsilon, options)
        for one, other, unchanged in zip(found, like(plain), plain, strict=True):
            for row in range(one.shape[0] if one.dim() else 1):
                got, expected, base = (
                    t.reshape(-1)[0] if not t.dim() else t[row] for t in (one, other, unchanged)
                )
                size, unit = (float(t.abs().amax()) if t.numel() else 1.0 for t in (expected, base))
                bar = 10 * operator.tolerance * (max(1.0, unit) * size / unit if unit else 1.0)
                torch.testing.assert_close(got, expected, atol=bar, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@law("rows")
def test_rows_never_meet(operator: Operator, dtype, drawn) -> None:
    """Bitwise: what stands in the other rows, NaN included, changes nothing."""
    source = Source(drawn)
    tensors, options = operator.draw(source)
    other, _ = operator.draw(Source(dataclasses.replace(drawn, seed=drawn.seed ^ 1)))
    tensors, other = cast(tensors, dtype), cast(other, dtype)
    plain = operator.call(tensors, drawn.epsilon, options)
    for axis in operator.rows:
        count = size_of(operator, tensors, axis)
        kept = int(source.integers(0, count - 1))
        changed = {}
        for name, t in tensors.items():
            axes = operator.inputs[name]
            if axis in axes and other[name].shape == t.shape:
                place = index(axes, axis, [i for i in range(count) if i != kept])
                t = t.clone()
                t[place] = other[name][place]
                if name in operator.scaled and t.is_floating_point():
                    t[index(axes, axis, [i for i in range(count) if i != kept][:1])] *= 1e20
            changed[name] = t
        found = operator.call(changed, drawn.epsilon, options)
        for one, expected, axes in zip(found, plain, operator.outputs, strict=True):
            if axis in axes:
                place = index(axes, axis, kept)
                assert torch.equal(one[place], expected[place])


@law("alone")
def test_a_row_alone(operator: Operator, drawn) -> None:
    source = Source(drawn)
    tensors, options = operator.draw(source)
    plain = operator.call(tensors, drawn.epsilon, options)
    for axis in operator.rows:
        row = source.integers(0, size_of(operator, tensors, axis) - 1, 1)
        if operator.name == "maxsim_topk" and axis != "b":
            continue
        found = operator.call(moved(operator, tensors, axis, row), drawn.epsilon, options)
        expected = tuple(
            o[index(axes, axis, row)] if axis in axes else o
            for o, axes in zip(plain, operator.outputs, strict=True)
        )
        for one, other, axes in zip(found, expected, operator.outputs, strict=True):
            if axis in axes:
                close((one,), (other,), operator.tolerance)


def padded(operator: Operator, tensors: Tensors, source: Source):
    """The same problem with masked entries, full of garbage, and where the true ones now stand on each axis."""
    out, places = dict(tensors), {}
    for axis, mask in operator.masks.items():
        count = size_of(operator, tensors, axis)
        more = int(source.integers(1, 4))
        places[axis] = source.permutation(count + more)[:count].sort().values
        for name, axes in operator.inputs.items():
            if axis not in axes:
                continue
            t = out[name]
            shape = list(t.shape)
            shape[axes.index(axis)] += more
            garbage = t.new_zeros(shape)
            if t.is_floating_point():
                garbage = torch.full_like(garbage, float("nan"))
            elif t.dtype != torch.bool:
                garbage += 1
            garbage[index(axes, axis, places[axis])] = t
            if name == mask:
                hidden = torch.ones(count + more, dtype=torch.bool)
                hidden[places[axis]] = False
                garbage[index(axes, axis, hidden)] = False
            out[name] = garbage
    return out, places


@law("padding", 6)
def test_padding(operator: Operator, drawn) -> None:
    source = Source(drawn)
    tensors, options = operator.draw(source)
    wide, places = padded(operator, tensors, source)
    kept: list[torch.Tensor] = []

    def narrow(out: torch.Tensor, axes: str) -> torch.Tensor:
        for axis, where in places.items():
            if axis in axes:
                out = out[index(axes, axis, where)]
        return out[index(axes, "s", slice(tensors["x"].shape[-1]))] if out.shape != axes else out

    def random(outputs: Outputs) -> list[torch.Tensor]:
        kept.extend(source.randn(*o.shape) for o in outputs)
        return kept

    def spread(outputs: Outputs) -> list[torch.Tensor]:
        wider = []
        for o, axes, small in zip(outputs, operator.outputs, kept, strict=True):
            large = source.randn(*o.shape)
            where = [slice(None)] * o.dim()
            grid = torch.ones(o.shape, dtype=torch.bool)
            for place, axis in enumerate(axes):
                true = places.get(axis, slice(small.shape[place]) if axis == "s" else None)
                if true is None:
                    continue
                flags = torch.zeros(o.shape[place], dtype=torch.bool)
                flags[true] = True
                where[place] = flags
                grid &= flags.reshape(*(-1 if i == place else 1 for i in range(o.dim())))
            large[grid] = small.reshape(-1)
            wider.append(large)
        return wider

    if operator.learned:
        plain, small = gradients(operator, tensors, drawn.epsilon, options, random)
        found, large = gradients(operator, wide, drawn.epsilon, options, spread)
    else:
        plain = operator.call(tensors, drawn.epsilon, options)
        found, small, large = operator.call(wide, drawn.epsilon, options), {}, {}
    for one, expected, axes in zip(found, plain, operator.outputs, strict=True):
        close((narrow(one, axes),), (expected,), operator.tolerance)
        if set(axes) & ({*places} | {"s"}):
            assert float(one.abs().sum()) == pytest.approx(float(narrow(one, axes).abs().sum()), rel=1e-12)
    for name in operator.learned:
        axes = operator.inputs[name]
        close((narrow(large[name], axes),), (small[name],), 1e3 * operator.tolerance)
        rest = large[name].clone()
        if set(axes) & {*places}:
            zeros = torch.zeros_like(small[name])
            chosen = tuple(
                places.get(axis, torch.arange(n)) for axis, n in zip(axes, rest.shape, strict=True)
            )
            rest[torch.meshgrid(*chosen, indexing="ij")] = zeros
            assert not rest.any(), name


@law("order")
def test_order_is_kept(operator: Operator, drawn) -> None:
    tensors, options = operator.draw(Source(drawn))
    name, place = operator.ordered
    for epsilon in (drawn.epsilon, 1e-4):
        out = operator.call(tensors, epsilon, options)[place]
        mask = tensors[operator.masks["n"]]
        for x, y, valid in zip(tensors[name], out, mask, strict=True):
            rising = y[valid][x[valid].argsort(stable=True)]
            assert (rising.diff() >= -1e-9 * (1 + float(y[valid].abs().max()))).all()


@law("sums")
def test_sums(operator: Operator, drawn) -> None:
    tensors, options = operator.draw(Source(drawn))
    for epsilon in (drawn.epsilon, 1e-3):
        out = operator.call(tensors, epsilon, options)
        for actual, expected in operator.sums(tensors, options, out):
            close((actual,), (expected.to(actual.dtype),), operator.tolerance)


@law("hard limit")
def test_limit_of_small_epsilon(operator: Operator, drawn) -> None:
    tensors, options = operator.draw(Source(dataclasses.replace(drawn, ties=False)))
    exact, epsilon = operator.hard
    close(operator.call(tensors, epsilon, options), exact(tensors, options), 1e-4)


@law("flat limit")
def test_limit_of_large_epsilon(operator: Operator, drawn) -> None:
    tensors, options = operator.draw(Source(drawn))
    flat, epsilon = operator.flat
    expected = flat(tensors, options)
    close(operator.call(tensors, epsilon, options)[: len(expected)], expected, 1e-4)


@law("repeat")
def test_inputs_stay_and_bits_repeat(operator: Operator, drawn) -> None:
    tensors, options = operator.draw(Source(drawn))
    kept = {name: t.clone() for name, t in tensors.items()}
    first = operator.call(tensors, drawn.epsilon, options)
    second = operator.call(tensors, drawn.epsilon, options)
    assert all(map(torch.equal, first, second))
    for name, t in tensors.items():
        assert torch.equal(t, kept[name]), name
    if operator.learned:

        def ones(out: Outputs) -> list[torch.Tensor]:
            return [torch.ones_like(o) for o in out]

        first = gradients(operator, tensors, drawn.epsilon, options, ones)[1]
        second = gradients(operator, tensors, drawn.epsilon, options, ones)[1]
        for name in first:
            assert torch.equal(first[name], second[name]), name


@pytest.mark.filterwarnings("ignore:.*did not converge")
@law("nan")
def test_nan_stays_in_its_row(operator: Operator, drawn) -> None:
    source = Source(drawn)
    tensors, options = operator.draw(source)
    name = operator.poison
    axes = operator.inputs[name]
    axis = axes[0]
    last = tensors[name].shape[0] - 1
    for mask, letters in operator.inputs.items():
        if "mask" in mask or mask in ("rows", "columns"):
            if letters[0] == axis:
                tensors[mask] = tensors[mask].clone()
                tensors[mask][last] = True
                if "a" in tensors:  # masses belong to the mask
                    weights = {"rows": "a", "columns": "b", "mask": "a", "x_mask": "a", "y_mask": "b"}[mask]
                    tensors[weights] = tensors[weights].clone()
                    tensors[weights][last] = 1 / tensors[weights].shape[-1]
    clean = operator.call(tensors, drawn.epsilon, options)
    sick = tensors[name].clone()
    sick[last].select(-1, 0)[... if axes[-1] in "dew" or len(axes) == 2 else 0] = torch.nan
    found = operator.call({**tensors, name: sick}, drawn.epsilon, options)
    for one, expected, letters in zip(found, clean, operator.outputs, strict=True):
        place = letters.index(axis)
        assert one.select(place, last).isnan().all()
        assert torch.equal(one.narrow(place, 0, last), expected.narrow(place, 0, last))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@law("gradients", 8)
def test_gradients_have_no_nan(operator: Operator, dtype, drawn) -> None:
    source = Source(drawn)
    tensors, options = operator.draw(source)
    if operator.scaled:
        limit = 30 // len(operator.scaled)
        for name in operator.scaled:
            power = 0 if source.drawn.seed % 3 == 0 else int(source.integers(-limit, limit))
            tensors[name] = tensors[name] * 10.0**power
    tensors = cast(tensors, dtype)

    def random(out: Outputs) -> list[torch.Tensor]:
        return [source.randn(*o.shape).to(o.dtype) for o in out]

    out, found = gradients(operator, tensors, drawn.epsilon, options, random)
    for one in out:
        assert not one.isnan().any()
    for name, grad in found.items():
        assert not grad.isnan().any(), name
        assert grad.dtype == tensors[name].dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@law("half", 2)
def test_half_precision_is_rounded_once(operator: Operator, dtype, drawn) -> None:
    tensors, options = operator.draw(Source(drawn))
    tensors = cast(tensors, dtype)
    found = operator.call(tensors, drawn.epsilon, options)
    single = cast(tensors, torch.float32)
    if "a" in single:  # rounded masses differ in sum: the second ones are rescaled to the first
        single["b"] = single["b"] * (single["a"].sum(-1) / single["b"].sum(-1))[:, None]
    exact = operator.call(single, drawn.epsilon, options)
    for one, expected in zip(found, exact, strict=True):
        assert one.dtype == dtype
        info = torch.finfo(dtype)
        torch.testing.assert_close(
            one.float(), expected.to(dtype).float(), atol=2 * info.smallest_normal, rtol=info.eps
        )


@law("batch", 2)
def test_batch_shapes(operator: Operator, drawn) -> None:
    source = Source(drawn)
    tensors, options = operator.draw(source)
    batched = [name for name, axes in operator.inputs.items() if axes[0] == "b"]
    plain = operator.call(tensors, drawn.epsilon, options)
    more = {name: t.unsqueeze(0).unsqueeze(2) if name in batched else t for name, t in tensors.items()}
    if all(axes[0] == "b" for axes in operator.outputs) and len(batched) == len(tensors):
        found = operator.call(more, drawn.epsilon, options)
        for one, expected in zip(found, plain, strict=True):
            close((one.squeeze(2).squeeze(0),), (expected,), operator.tolerance)
    none = {name: t[:0] if name in batched else t for name, t in tensors.items()}
    found = operator.call(none, drawn.epsilon, options)
    for one, expected, axes in zip(found, plain, operator.outputs, strict=True):
        assert one.shape == tuple(0 if a == "b" else n for a, n in zip(axes, expected.shape, strict=True))
