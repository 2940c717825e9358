"""Functions of what a model says, and the parts of losses that average over noise."""

import pytest
import torch
from torch import nn

import forebear as fb
from forebear.tasks.diffusion import Denoising, images


def test_functions_summarise_outputs_of_any_task() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(5, 4), torch.zeros(5, dtype=torch.long)
    outputs = model(x)
    for name, expected in {
        "square_norm": outputs.square().mean(1),
        "mean": outputs.mean(1),
        "absolute": outputs.abs().mean(1),
    }.items():
        torch.testing.assert_close(fb.losses.cross_entropy.function(name)(model, (x, y)), expected)
    assert fb.losses.cross_entropy.parts == (fb.losses.cross_entropy,)
    with pytest.raises(fb.errors.UnknownNameError, match="did you mean 'absolute'"):
        fb.losses.cross_entropy.function("absolut")


class Shrink(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(0.7))

    def forward(self, noisy: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        return self.by * noisy + levels[:, None].to(noisy) / 1000


def test_parts_average_to_the_loss_and_its_functions() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = images(torch.rand(6, 5, generator=generator, dtype=torch.float64) * 2 - 1)
    loss, model = Denoising(levels=(50, 400), draws=3), Shrink().double()
    assert len(loss.parts) == 6
    for part, point in zip(loss.parts, loss.points, strict=True):
        assert part.points == (point,)
    whole = torch.stack([part(model, batch) for part in loss.parts]).mean(0)
    torch.testing.assert_close(loss(model, batch), whole)
    function = loss.function("square_norm")
    whole = torch.stack([part(model, batch) for part in function.parts]).mean(0)
    torch.testing.assert_close(function(model, batch), whole)
