from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import layer_gradients_by_vmap, layer_gradients_one_at_a_time, written_out
from torch import Tensor, nn

from forebear.layers import rule_for
from forebear.layers.conv import ConvRule, GroupedConvRule


def rule_gradients(layer: Any, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    rule: Any = rule_for(layer)
    if isinstance(rule, GroupedConvRule):
        return rule.gradients(layer, a, g)
    assert isinstance(rule, ConvRule)
    left, right = rule.factors(layer, a, g)
    with_ones = rule.factors(layer, a, g, bias=True).right
    assert torch.equal(with_ones, torch.cat([right, torch.ones_like(right[..., :1])], 2))
    dense = written_out(left, right, layer.out_channels)
    found = {"weight": torch.stack([rule.from_matrix(m, layer.weight) for m in dense])}
    return found if layer.bias is None else {**found, "bias": left.sum(1)}


def assert_rule_is_right(layer: Any, a: Tensor) -> None:
    g = torch.randn_like(layer(a))
    found = rule_gradients(layer, a, g)
    for oracle in (layer_gradients_by_vmap, layer_gradients_one_at_a_time):
        expected = oracle(layer, a, g)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


@st.composite
def convolutions(draw: st.DrawFn, dimensions: int) -> tuple[Any, Tensor]:
    """A convolution and an input large enough for it."""

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel, dilation = each(1, 3), each(1, 2)
    padding = draw(st.sampled_from(["same", "valid", "numbers"]))
    stride = (1,) * dimensions if padding == "same" else each(1, 3)
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,  # type: ignore[arg-type]
        stride=stride,  # type: ignore[arg-type]
        padding=each(0, 2) if padding == "numbers" else padding,  # type: ignore[arg-type]
        dilation=dilation,  # type: ignore[arg-type]
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"])),
    )
    sizes = [d * (k - 1) + 3 + draw(st.integers(0, 2)) for d, k in zip(dilation, kernel)]  # noqa: B905
    return layer.double(), torch.randn(draw(st.integers(1, 3)), layer.in_channels, *sizes).double()


@settings(max_examples=25, deadline=None)
@given(drawn=convolutions(1))
def test_conv1d(drawn: tuple[Any, Tensor]) -> None:
    assert_rule_is_right(*drawn)


@settings(max_examples=25, deadline=None)
@given(drawn=convolutions(2))
def test_conv2d(drawn: tuple[Any, Tensor]) -> None:
    assert_rule_is_right(*drawn)


@settings(max_examples=10, deadline=None)
@given(drawn=convolutions(3))
def test_conv3d(drawn: tuple[Any, Tensor]) -> None:
    assert_rule_is_right(*drawn)


def test_channels_last_memory() -> None:
    a = torch.randn(2, 3, 5, 6).double().to(memory_format=torch.channels_last)
    assert_rule_is_right(nn.Conv2d(3, 4, 2, stride=2).double(), a)


@pytest.mark.parametrize("kernel", [2, 4])
def test_padding_same_with_an_even_kernel_pads_one_side_more(kernel: int) -> None:
    layer = nn.Conv2d(2, 3, (kernel, 3), padding="same").double()
    assert_rule_is_right(layer, torch.randn(2, 2, 5, 6).double())


def test_a_depthwise_convolution() -> None:
    layer = nn.Conv2d(4, 8, 3, groups=4, padding=1).double()
    assert_rule_is_right(layer, torch.randn(3, 4, 5, 5).double())


def test_one_by_one_patches_are_the_input_itself() -> None:
    layer, a = nn.Conv2d(3, 2, 1), torch.randn(2, 3, 4, 4)
    rule: Any = rule_for(layer)
    right = rule.factors(layer, a, torch.randn(2, 2, 4, 4)).right
    assert right.data_ptr() == a.data_ptr()
