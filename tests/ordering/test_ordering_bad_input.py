"""Every bad argument of the ordering operators: a ValueError or TypeError that names it, before any compute."""

import math

import pytest
import torch

import couplings as cp

X = torch.randn(3, 5)
ROW = torch.ones(5)

# what every operator refuses
COMMON = [
    ("x", {"x": [1.0, 2.0]}, TypeError),
    ("x", {"x": torch.arange(5)}, TypeError),
    ("x", {"x": torch.ones(5, dtype=torch.bool)}, TypeError),
    ("x", {"x": torch.randn(5, dtype=torch.complex64)}, TypeError),
    ("x", {"x": torch.tensor(1.0)}, ValueError),
    ("x", {"x": torch.randn(3, 0)}, ValueError),
    ("x", {"x": torch.randn(0, 3), "dim": 0}, ValueError),
    ("dim", {"dim": 2}, ValueError),
    ("dim", {"dim": -3}, ValueError),
    ("dim", {"dim": 1.0}, TypeError),
    ("dim", {"dim": True}, TypeError),
    ("dim", {"dim": None}, TypeError),
    ("epsilon", {"epsilon": -0.1}, ValueError),
    ("epsilon", {"epsilon": math.nan}, ValueError),
    ("epsilon", {"epsilon": math.inf}, ValueError),
    ("epsilon", {"epsilon": "small"}, TypeError),
    ("epsilon", {"epsilon": True}, TypeError),
    ("epsilon", {"epsilon": torch.tensor(-1.0)}, ValueError),
    ("epsilon", {"epsilon": torch.tensor(0.0)}, ValueError),
    ("epsilon", {"epsilon": torch.tensor(math.nan)}, ValueError),
    ("epsilon", {"epsilon": torch.tensor(math.inf)}, ValueError),
    ("epsilon", {"epsilon": torch.ones(4)}, ValueError),
    ("epsilon", {"epsilon": torch.ones(3, 1)}, ValueError),
    ("epsilon", {"epsilon": torch.tensor(1)}, TypeError),
    ("epsilon", {"epsilon": torch.ones(3, device="meta")}, ValueError),
    ("mask", {"mask": torch.ones(3, 4, dtype=torch.bool)}, ValueError),
    ("mask", {"mask": torch.ones(2, 3, 5, dtype=torch.bool)}, ValueError),
    ("mask", {"mask": torch.ones(3, 5)}, TypeError),
    ("mask", {"mask": [True] * 5}, TypeError),
    ("mask", {"mask": torch.ones(5, dtype=torch.bool, device="meta")}, ValueError),
    ("weights", {"weights": torch.ones(4)}, ValueError),
    ("weights", {"weights": [1.0] * 5}, TypeError),
    ("weights", {"weights": torch.ones(3, 5, dtype=torch.float64)}, TypeError),
    ("weights", {"weights": torch.ones(3, 5, dtype=torch.int64)}, TypeError),
    ("weights", {"weights": -ROW}, ValueError),
    ("weights", {"weights": torch.full((5,), math.nan)}, ValueError),
    ("weights", {"weights": torch.full((5,), math.inf)}, ValueError),
    ("weights", {"weights": torch.ones(5, device="meta")}, ValueError),
    ("squash", {"squash": "tanh"}, ValueError),
    ("squash", {"squash": 1}, ValueError),
    ("p", {"p": 0.5}, ValueError),
    ("p", {"p": math.nan}, ValueError),
    ("p", {"p": math.inf}, ValueError),
    ("p", {"p": "2"}, TypeError),
    ("p", {"p": None}, TypeError),
]
# of sort, rank, permutation and sort_by
TARGETS = [
    ("num_targets", {"num_targets": 0}, ValueError),
    ("num_targets", {"num_targets": -2}, ValueError),
    ("num_targets", {"num_targets": 2.0}, TypeError),
    ("num_targets", {"num_targets": True}, TypeError),
    ("targets", {"targets": [0.0, 1.0]}, TypeError),
    ("targets", {"targets": torch.tensor(0.5)}, ValueError),
    ("targets", {"targets": torch.zeros(0)}, ValueError),
    ("targets", {"targets": torch.tensor([0, 1])}, TypeError),
    ("targets", {"targets": torch.tensor([1.0, 0.0])}, ValueError),
    ("targets", {"targets": torch.tensor([0.0, math.nan])}, ValueError),
    ("targets", {"targets": torch.tensor([0.0, math.inf])}, ValueError),
    ("targets", {"targets": torch.zeros(4, 2)}, ValueError),
    ("targets", {"targets": torch.zeros(2, 3, 2)}, ValueError),
    ("targets", {"targets": torch.zeros(2, device="meta")}, ValueError),
    ("targets", {"targets": torch.tensor([0.0, 1.0]), "num_targets": 3}, ValueError),
    ("targets", {"targets": torch.tensor([0.0, 1.0]), "target_weights": torch.ones(3)}, ValueError),
    ("target_weights", {"target_weights": torch.ones(3), "num_targets": 2}, ValueError),
    ("target_weights", {"target_weights": torch.tensor([1.0, 0.0])}, ValueError),
    ("target_weights", {"target_weights": torch.tensor([1.0, -1.0])}, ValueError),
    ("target_weights", {"target_weights": torch.tensor([1.0, math.nan])}, ValueError),
    ("target_weights", {"target_weights": torch.tensor([1.0, math.inf])}, ValueError),
    ("target_weights", {"target_weights": torch.tensor(1.0)}, ValueError),
    ("target_weights", {"target_weights": torch.ones(4, 2)}, ValueError),
    ("target_weights", {"target_weights": torch.ones(2, device="meta")}, ValueError),
]
# of sort, rank and permutation
METHOD = [
    ("method", {"method": "sinkhorn"}, ValueError),
    ("method", {"method": None}, ValueError),
    ("variant", {"variant": "l2"}, ValueError),
    ("variant", {"method": "projection", "variant": "l3"}, ValueError),
    ("variant", {"method": "softsort", "variant": "kl"}, ValueError),
    ("variant", {"method": "network", "variant": "bitonic"}, ValueError),
    ("generator", {"generator": torch.Generator()}, ValueError),
    ("generator", {"method": "neuralsort", "generator": torch.Generator()}, ValueError),
    ("targets", {"method": "softsort", "targets": torch.tensor([0.0, 1.0])}, ValueError),
    ("num_targets", {"method": "neuralsort", "num_targets": 3}, ValueError),
    ("target_weights", {"method": "network", "target_weights": torch.ones(5)}, ValueError),
]

OPERATORS = {
    "soft_sort": cp.soft_sort,
    "soft_rank": cp.soft_rank,
    "soft_permutation": cp.soft_permutation,
    "soft_sort_by": lambda x, **options: cp.soft_sort_by(x, options.pop("values", x), **options),
    "soft_quantile": lambda x, **options: cp.soft_quantile(x, options.pop("q", 0.5), **options),
    "soft_median": cp.soft_median,
    "quantile_normalize": lambda x, **options: cp.quantile_normalize(
        x, options.pop("targets", ROW), **options
    ),
    "soft_quantize": lambda x, **options: cp.soft_quantize(x, options.pop("levels", 2), **options),
}
WITH_TARGETS = ("soft_sort", "soft_rank", "soft_permutation", "soft_sort_by")
WITH_METHODS = ("soft_sort", "soft_rank", "soft_permutation")

CASES = [
    *((name, *case) for name in OPERATORS for case in COMMON),
    *((name, *case) for name in WITH_TARGETS for case in TARGETS),
    *((name, *case) for name in WITH_METHODS for case in METHOD),
    ("soft_sort", "method", {"method": "sigmoid"}, ValueError),
    ("soft_sort", "method", {"method": "gaussian"}, ValueError),
    ("soft_permutation", "method", {"method": "projection"}, ValueError),
    ("soft_permutation", "method", {"method": "sigmoid"}, ValueError),
    ("soft_sort_by", "values", {"values": [1.0]}, TypeError),
    ("soft_sort_by", "values", {"values": torch.ones(3, 4)}, ValueError),
    ("soft_sort_by", "values", {"values": torch.ones(5)}, ValueError),
    ("soft_sort_by", "values", {"values": torch.ones(3, 5, dtype=torch.float64)}, TypeError),
    ("soft_sort_by", "values", {"values": torch.ones(3, 5, dtype=torch.int64)}, TypeError),
    ("soft_sort_by", "values", {"values": torch.ones(3, 5, device="meta")}, ValueError),
    ("soft_quantile", "q", {"q": -0.1}, ValueError),
    ("soft_quantile", "q", {"q": 1.1}, ValueError),
    ("soft_quantile", "q", {"q": math.nan}, ValueError),
    ("soft_quantile", "q", {"q": []}, ValueError),
    ("soft_quantile", "q", {"q": [0.5, 90]}, ValueError),
    ("soft_quantile", "q", {"q": torch.full((2, 2), 0.5)}, ValueError),
    ("soft_quantile", "q", {"q": "median"}, TypeError),
    ("soft_quantile", "q", {"q": None}, TypeError),
    ("soft_quantile", "q", {"q": torch.tensor(0.5j)}, TypeError),
    ("quantile_normalize", "targets", {"targets": [1.0, 2.0]}, TypeError),
    ("quantile_normalize", "targets", {"targets": torch.tensor(1.0)}, ValueError),
    ("quantile_normalize", "targets", {"targets": torch.ones(0)}, ValueError),
    ("quantile_normalize", "targets", {"targets": torch.ones(2, 5)}, ValueError),
    ("quantile_normalize", "targets", {"targets": torch.arange(5)}, TypeError),
    ("quantile_normalize", "targets", {"targets": torch.ones(5, dtype=torch.float64)}, TypeError),
    ("quantile_normalize", "targets", {"targets": torch.ones(5, device="meta")}, ValueError),
    ("soft_quantize", "levels", {"levels": 0}, ValueError),
    ("soft_quantize", "levels", {"levels": 2.5}, TypeError),
    ("soft_quantize", "levels", {"levels": True}, TypeError),
    ("soft_quantize", "levels", {"levels": None}, TypeError),
]


def title(case):
    name, argument, options, _ = case
    return f"{name}-{argument}-" + ",".join(
        f"{key}={type(value).__name__}{tuple(value.shape)}"
        if isinstance(value, torch.Tensor)
        else f"{key}={'a generator' if isinstance(value, torch.Generator) else value}"
        for key, value in options.items()
    )


@pytest.mark.parametrize(("name", "argument", "options", "error"), CASES, ids=map(title, CASES))
def test_refused(name, argument, options, error):
    options = dict(options)
    x = options.pop("x", X)
    argument = "keys" if name == "soft_sort_by" and argument == "x" else argument
    with pytest.raises(error, match=rf"^{argument}: expected .+, got ") as caught:
        OPERATORS[name](x, **options)
    assert type(caught.value) is error


@pytest.mark.parametrize("options", [{"epsilon": 0}, {"hard": True}, {"epsilon": 0.1}])
def test_refused_at_any_epsilon(options):
    for name, argument, bad, error in CASES:
        if name == "soft_sort" and "epsilon" not in bad:
            given = {"x": X, **bad, **options}
            with pytest.raises(error, match=rf"^{argument}: "):
                cp.soft_sort(given.pop("x"), **given)


def test_too_large_a_plan_for_another_cost():
    with pytest.raises(ValueError, match=r"^p: expected 2 for more than"):
        cp.soft_rank(torch.zeros(20_000), p=1.5)


def test_empty_batches_are_fine():
    for function in OPERATORS.values():
        assert function(torch.randn(0, 5)).numel() == 0


def test_values_out_of_sight_give_nan_rows():
    """Under vmap nothing may look at values: what would be an error makes a NaN row, and only that one."""
    x = torch.randn(3, 5)
    weights = torch.rand(3, 5)
    weights[0, 2] = -1
    out = torch.func.vmap(lambda row, w: cp.soft_rank(row, weights=w))(x, weights)
    assert out.isnan().any(-1).tolist() == [True, False, False]
    epsilon = torch.tensor([0.1, -0.1, math.nan])
    out = torch.func.vmap(lambda row, e: cp.soft_rank(row, epsilon=e))(x, epsilon)
    assert out.isnan().any(-1).tolist() == [False, True, True]
    mass = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, -1.0]])
    out = torch.func.vmap(lambda row, b: cp.soft_rank(row, target_weights=b))(x, mass)
    assert out.isnan().any(-1).tolist() == [False, False, True]
    places = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.2, 0.3]])
    out = torch.func.vmap(lambda row, y: cp.soft_rank(row, targets=y))(x, places)
    assert out.isnan().any(-1).tolist() == [False, True, False]
