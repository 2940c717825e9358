from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import layer_gradients_by_vmap, layer_gradients_one_at_a_time, written_out
from torch import nn

from forebear.layers import rule_for


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    d=st.integers(1, 4),
    padding=st.sampled_from([None, 0, -2]),
)
def test_embedding(shape: list[int], d: int, padding: int | None) -> None:
    layer = nn.Embedding(5, d, padding_idx=padding).double()
    a, g = torch.randint(0, 5, shape), torch.randn(*shape, d).double()
    rule: Any = rule_for(layer)
    left, right = rule.factors(layer, a, g)
    assert not left.is_floating_point()
    found = written_out(left, right, 5)
    for oracle in (layer_gradients_by_vmap, layer_gradients_one_at_a_time):
        torch.testing.assert_close(found, oracle(layer, a, g)["weight"])


def test_gradients_scaled_by_frequency_in_the_batch_have_no_rule() -> None:
    assert rule_for(nn.Embedding(5, 2, scale_grad_by_freq=True)) is None
