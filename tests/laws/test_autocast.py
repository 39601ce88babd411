"""Under autocast to bfloat16 results keep their dtype and their bits: nothing is solved in half precision."""

from __future__ import annotations

import pytest
import torch
from law_entry import Operator, Outputs, Sizes, Source, cast
from law_table import BY_NAME

USERS = "beam."  # the decoder is the user's, and autocast is for it
MATRICES = {
    "topk_attention": 2e-2,  # its products are cast, as those of ordinary attention
}


@pytest.mark.parametrize("name", [name for name in BY_NAME if not name.startswith(USERS)])
def test_autocast_changes_nothing(name: str) -> None:
    """The forward pass inside, the backward pass outside, as torch wants it."""
    operator: Operator = BY_NAME[name]
    drawn = Sizes(3, n=7, m=5, ties=False, masked=True, epsilon=0.1)
    tensors, settings = operator.draw(Source(drawn))
    tensors = cast(tensors, torch.float32)

    def answer(autocast: bool) -> Outputs:
        leaves = {key: t.clone().requires_grad_(key in operator.learned) for key, t in tensors.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = operator.call(leaves, drawn.epsilon, settings)
        if not operator.learned:
            return out
        total = sum(o.square().sum() for o in out if o.requires_grad)
        return (*out, *torch.autograd.grad(total, [leaves[key] for key in operator.learned]))

    for one, expected in zip(answer(True), answer(False), strict=True):
        if name not in MATRICES:
            assert one.dtype == expected.dtype
        size = float(expected.detach().abs().nan_to_num(0, 0, 0).max())
        one = one.to(expected.dtype)
        torch.testing.assert_close(one, expected, atol=MATRICES.get(name, 0.0) * size, rtol=0, equal_nan=True)
