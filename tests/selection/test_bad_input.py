"""Every bad argument: a ValueError or TypeError that names it, before any compute."""

import pytest
import torch

import couplings as cp
from couplings.transport import solve_points

X = torch.randn(3, 5)
MASK = [
    ("x", {"x": [1.0, 2.0]}, TypeError),
    ("x", {"x": torch.arange(5)}, TypeError),
    ("x", {"x": torch.randn(5, dtype=torch.complex64)}, TypeError),
    ("x", {"x": torch.tensor(1.0)}, ValueError),
    ("x", {"x": torch.randn(3, 0)}, ValueError),
    ("dim", {"dim": 2}, ValueError),
    ("dim", {"dim": -3}, ValueError),
    ("dim", {"dim": 1.0}, TypeError),
    ("dim", {"dim": True}, TypeError),
    ("epsilon", {"epsilon": -0.1}, ValueError),
    ("epsilon", {"epsilon": float("nan")}, ValueError),
    ("epsilon", {"epsilon": float("inf")}, ValueError),
    ("epsilon", {"epsilon": "small"}, TypeError),
    ("epsilon", {"epsilon": torch.tensor(-1.0)}, ValueError),
    ("epsilon", {"epsilon": torch.tensor(0.0)}, ValueError),
    ("epsilon", {"epsilon": torch.ones(4)}, ValueError),
    ("epsilon", {"epsilon": torch.tensor(1)}, TypeError),
    ("method", {"method": "sinkhorn"}, ValueError),
    ("mask", {"mask": torch.ones(3, 4, dtype=torch.bool)}, ValueError),
    ("mask", {"mask": torch.ones(2, 3, 5, dtype=torch.bool)}, ValueError),
    ("mask", {"mask": torch.ones(3, 5)}, TypeError),
    ("mask", {"mask": [True] * 5}, TypeError),
    ("mask", {"mask": torch.ones(5, dtype=torch.bool, device="meta")}, ValueError),
    ("generator", {"generator": torch.Generator()}, ValueError),
    ("k", {"k": 6}, ValueError),
    ("k", {"k": -1}, ValueError),
    ("k", {"k": True}, TypeError),
    ("k", {"k": "2"}, TypeError),
]
ONLY_MASK = [
    ("k", {"k": torch.ones(2)}, ValueError),
    ("k", {"k": torch.ones(3, 5)}, ValueError),
    ("k", {"k": torch.tensor([1.0, 6.0, 2.0])}, ValueError),
    ("k", {"k": torch.tensor([1.0, float("nan"), 2.0])}, ValueError),
    ("k", {"k": torch.tensor([True, False, True])}, TypeError),
    ("k", {"k": float("nan")}, ValueError),
    ("k", {"k": 2.5, "method": "softmax"}, ValueError),
    ("weights", {"weights": torch.ones(4)}, ValueError),
    ("weights", {"weights": torch.ones(3, 5, dtype=torch.float64)}, TypeError),
    ("weights", {"weights": torch.ones(3, 5, dtype=torch.int64)}, TypeError),
    ("weights", {"weights": -torch.ones(3, 5)}, ValueError),
    ("weights", {"weights": torch.full((3, 5), float("nan"))}, ValueError),
    ("weights", {"weights": torch.ones(3, 5), "method": "neuralsort"}, ValueError),
    ("p", {"method": "sparse", "p": 1.0}, ValueError),
    ("p", {"method": "sparse", "p": 3}, ValueError),
]
ONLY_SORTED = [
    ("k", {"k": 0}, ValueError),
    ("k", {"k": 2.0}, TypeError),
    ("k", {"k": torch.tensor([1, 2, 3])}, TypeError),
    ("method", {"method": "laplace"}, ValueError),
]


def check(function, argument, options, error):
    arguments = {"x": X, "k": 2, **options}
    with pytest.raises(error, match=f"^{argument}: expected .+, got ") as caught:
        function(arguments.pop("x"), arguments.pop("k"), **arguments)
    assert type(caught.value) is error


@pytest.mark.parametrize(("argument", "options", "error"), MASK + ONLY_MASK)
def test_mask(argument, options, error):
    check(cp.soft_topk_mask, argument, options, error)


@pytest.mark.parametrize(("argument", "options", "error"), MASK + ONLY_SORTED)
def test_sorted(argument, options, error):
    check(cp.soft_topk, argument, options, error)


@pytest.mark.parametrize(
    ("argument", "options", "error"),
    [
        ("x", {"x": torch.arange(5)}, TypeError),
        ("x", {"x": torch.randn(0)}, ValueError),
        ("y", {"y": torch.tensor([1.0, 0.0])}, ValueError),
        ("y", {"y": torch.zeros(2, dtype=torch.float64)}, TypeError),
        ("y", {"y": torch.zeros(0)}, ValueError),
        ("y", {"y": torch.zeros(7, 2)}, ValueError),
        ("a", {"a": -torch.ones(5)}, ValueError),
        ("b", {"b": torch.tensor([0.0, 1.0])}, ValueError),
        ("b", {"b": torch.tensor([1.0, 1.0])}, ValueError),
        ("epsilon", {"epsilon": 0.0}, ValueError),
        ("epsilon", {"epsilon": -1.0}, ValueError),
        ("mask", {"mask": torch.ones(5)}, TypeError),
        ("mask", {"mask": torch.ones(4, dtype=torch.bool)}, ValueError),
        ("tolerance", {"tolerance": 0.0}, ValueError),
        ("on_fail", {"on_fail": "shout"}, ValueError),
    ],
)
def test_points(argument, options, error):
    arguments = {"x": torch.randn(5), "y": torch.tensor([0.0, 1.0]), "epsilon": 0.1, **options}
    with pytest.raises(error, match=rf"^{argument}: expected .+, got ") as caught:
        solve_points(**arguments)
    assert type(caught.value) is error


def test_requires_grad_on_a_bool_is_torchs_own_error():
    with pytest.raises(RuntimeError, match="floating point"):
        torch.ones(3, dtype=torch.bool, requires_grad=True)


def test_values_out_of_sight_give_nan_rows():
    """Under vmap nothing may look at values: k out of range and negative weights make NaN rows instead of errors."""
    x = torch.randn(3, 5)
    out = torch.func.vmap(lambda row, k: cp.soft_topk_mask(row, k))(x, torch.tensor([1.0, 9.0, 2.0]))
    assert out.isnan().any(-1).tolist() == [False, True, False]
    weights = torch.ones(3, 5)
    weights[0, 2] = -1
    out = torch.func.vmap(lambda row, w: cp.soft_topk_mask(row, 2, weights=w))(x, weights)
    assert out.isnan().any(-1).tolist() == [True, False, False]
