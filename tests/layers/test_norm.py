from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import layer_gradients_by_vmap, layer_gradients_one_at_a_time
from torch import Tensor, nn

from forebear.layers import rule_for

shapes = st.lists(st.integers(1, 4), min_size=2, max_size=4)


def assert_rule_is_right(layer: nn.Module, a: Tensor, rtol: float = 1e-7) -> None:
    layer.double().eval()
    for p in layer.parameters():
        nn.init.normal_(p)
    g = torch.randn_like(layer(a))
    rule: Any = rule_for(layer)
    found = rule.gradients(layer, a, g)
    for oracle in (layer_gradients_by_vmap, layer_gradients_one_at_a_time):
        expected = oracle(layer, a, g)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=rtol, atol=rtol)


@settings(max_examples=25, deadline=None)
@given(shape=shapes, bias=st.booleans(), data=st.data())
def test_layer_norm(shape: list[int], bias: bool, data: st.DataObject) -> None:
    normalised = shape[data.draw(st.integers(1, len(shape) - 1)) :]
    assert_rule_is_right(nn.LayerNorm(normalised, bias=bias), torch.randn(shape).double())


@settings(max_examples=15, deadline=None)
@given(shape=shapes, eps=st.sampled_from([None, 1e-3]), data=st.data())
def test_rms_norm(shape: list[int], eps: float | None, data: st.DataObject) -> None:
    normalised = shape[data.draw(st.integers(1, len(shape) - 1)) :]
    assert_rule_is_right(nn.RMSNorm(normalised, eps=eps), torch.randn(shape).double())


@settings(max_examples=15, deadline=None)
@given(
    b=st.integers(1, 3),
    groups=st.integers(1, 3),
    each=st.integers(1, 3),
    rest=st.lists(st.integers(2, 3), min_size=1, max_size=3),
)
def test_group_norm(b: int, groups: int, each: int, rest: list[int]) -> None:
    layer = nn.GroupNorm(groups, groups * each)
    assert_rule_is_right(layer, torch.randn(b, groups * each, *rest).double())


@settings(max_examples=15, deadline=None)
@given(b=st.integers(1, 3), c=st.integers(1, 4), rest=st.lists(st.integers(1, 3), max_size=2))
def test_batch_norm_in_evaluation_mode(b: int, c: int, rest: list[int]) -> None:
    layer = (nn.BatchNorm2d if len(rest) == 2 else nn.BatchNorm1d)(c)
    nn.init.normal_(layer.running_mean)
    nn.init.uniform_(layer.running_var, 0.5, 2.0)
    assert_rule_is_right(layer, torch.randn(b, c, *rest).double())


def test_batch_norm_without_running_statistics_has_no_rule() -> None:
    assert rule_for(nn.BatchNorm1d(3, track_running_stats=False)) is None


@pytest.mark.parametrize(
    "path",
    [
        "llama.modeling_llama.LlamaRMSNorm",
        "qwen2.modeling_qwen2.Qwen2RMSNorm",
        "gemma.modeling_gemma.GemmaRMSNorm",
        "t5.modeling_t5.T5LayerNorm",
        "mt5.modeling_mt5.MT5LayerNorm",
    ],
)
def test_the_norms_of_transformers(path: str) -> None:
    pytest.importorskip("transformers")
    module, _, name = path.rpartition(".")
    found = __import__(f"transformers.models.{module}", fromlist=[name])
    # These round to float32 inside, whatever the model is in.
    assert_rule_is_right(getattr(found, name)(6), torch.randn(3, 4, 6).double(), rtol=1e-5)


def test_a_norm_that_keeps_its_numbers_under_other_names_has_no_rule() -> None:
    class HouseRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))

    assert rule_for(HouseRMSNorm()) is None
