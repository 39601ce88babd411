"""No operator without its laws: the table is complete, and every gap in it has a reason."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import types

import pytest
from law_entry import LAWS
from law_table import BY_NAME, OPERATORS
from test_modules import MODULES

import couplings as cp

# public and no operator
OTHERS = {
    "Coupling": "a result: tests/transport/test_solve.py",
    "EmbeddingDiagnostics": "a result",
    "MaxSimTopK": "a result",
    "OrderCertificate": "a result",
    "Status": "a result",
    "beam.Beams": "a result",
    "beam.SoftBeams": "a result",
    "beam.Step": "a type",
    "matching.Dustbin": "a type",
    "matching.Matches": "a result",
    "transport.ChebyshevBoxes": "settings of spread and interpolate",
    "transport.Potentials": "a result",
    "transport.act_on_failure": "warns or raises, computes nothing: tests/transport/test_solve.py",
    "similarity_heatmap": "draws a picture: tests/losses/contrastive/test_contrastive_laws.py",
    "losses.cached_backward": "runs encoders and calls backward: tests/losses/contrastive/test_cached.py",
    "testing.OrderedPlan": "a result of an oracle",
    "testing.SCORE_KINDS": "names",
    "testing.maxsim_by_pairs": "an oracle: what others are measured with",
    "testing.ordered_plan": "an oracle",
    "testing.score_rows": "draws problems",
    "testing.sorted_plan_by_sinkhorn": "an oracle",
    "testing.topk_mask_by_bisection": "an oracle",
}
# laws for which the entry says something; the others apply to all that have rows
WITH_FIELDS = (
    "permutation",
    "invariance",
    "padding",
    "order",
    "sums",
    "hard limit",
    "flat limit",
    "gradients",
)
DISTRIBUTED = "distributed."  # needs processes: tests/losses/test_distributed.py


def public() -> dict[str, object]:
    """Every public object by the shortest name that a user can write behind ``couplings.``."""
    modules = [("", cp)]
    folders = [info.name for info in pkgutil.iter_modules(cp.__path__) if not info.name.startswith("_")]
    modules += [(f"{name}.", importlib.import_module(f"couplings.{name}")) for name in folders]
    found: dict[int, tuple[str, object]] = {}
    for prefix, module in modules:
        names = getattr(module, "__all__", None) or [
            name for name in vars(module) if not name.startswith("_")
        ]
        for name in names:
            value = getattr(module, name)
            if not isinstance(value, types.ModuleType):
                found.setdefault(id(value), (prefix + name, value))
    return dict(found.values())


def test_every_public_name_is_in_the_table() -> None:
    names = {name for name in public() if not name.startswith(DISTRIBUTED)}
    known = {operator.name for operator in OPERATORS} | set(OTHERS) | {f"nn.{name}" for name in MODULES}
    assert not names - known, "public, and neither in the table of laws nor among what needs none"
    assert not known - names, "no longer public"


def test_every_module_has_its_form() -> None:
    classes = {name for name, value in vars(cp.nn).items() if inspect.isclass(value)}
    assert classes == set(MODULES)


@pytest.mark.parametrize("name", BY_NAME)
def test_every_law_applies_or_has_a_reason(name: str) -> None:
    operator = BY_NAME[name]
    assert set(operator.without) <= set(LAWS)
    for law in LAWS:
        excused = law in operator.without
        assert operator.given(law) or excused, f"{law}: neither given what it needs nor excused"
        if law in WITH_FIELDS:
            assert not (operator.given(law) and excused), f"{law}: given what it needs, and excused"


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(OPERATORS)
