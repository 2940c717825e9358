from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import layer_gradients_by_vmap, layer_gradients_one_at_a_time, written_out
from torch import Tensor, nn

from forebear.layers import rule_for


def rule_gradients(layer: Any, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    """What a matrix rule says, as gradients of weight and bias, written out slowly."""
    rule: Any = rule_for(layer)
    left, right = rule.factors(layer, a, g)
    with_ones = rule.factors(layer, a, g, bias=True).right
    assert torch.equal(with_ones, torch.cat([right, torch.ones_like(right[..., :1])], 2))
    rows, _ = rule.to_matrix(layer.weight).shape
    dense = written_out(left, right, rows)
    found = {"weight": torch.stack([rule.from_matrix(m, layer.weight) for m in dense])}
    if getattr(layer, "bias", None) is not None:
        found["bias"] = left.sum(1)
    return found


def assert_rule_is_right(layer: nn.Module, a: Tensor, found: dict[str, Tensor], g: Tensor) -> None:
    for oracle in (layer_gradients_by_vmap, layer_gradients_one_at_a_time):
        expected = oracle(layer, a, g)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 4)] * 3),
    between=st.lists(st.integers(1, 3), max_size=2),
    bias=st.booleans(),
)
def test_linear(sizes: tuple[int, int, int], between: list[int], bias: bool) -> None:
    b, i, o = sizes
    layer = nn.Linear(i, o, bias=bias).double()
    a, g = torch.randn(b, *between, i).double(), torch.randn(b, *between, o).double()
    assert_rule_is_right(layer, a, rule_gradients(layer, a, g), g)


@settings(max_examples=10, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 4)] * 4))
def test_transposed_linear_of_transformers(sizes: tuple[int, int, int, int]) -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    b, t, i, o = sizes
    layer = pytorch_utils.Conv1D(o, i).double()
    a, g = torch.randn(b, t, i).double(), torch.randn(b, t, o).double()
    assert_rule_is_right(layer, a, rule_gradients(layer, a, g), g)
