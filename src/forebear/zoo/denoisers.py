"""Small networks that take noise off small images."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forebear.errors import TaskError
from forebear.tasks.schedules import Discrete

FREQUENCIES = 32


def waves(levels: Tensor, count: int = FREQUENCIES) -> Tensor:
    """Sines and cosines of levels, `[b, 2 * count]`."""
    speeds = torch.exp(torch.arange(count) * (-math.log(10_000.0) / count))
    angles = levels[:, None] * speeds.to(levels)
    return torch.cat([angles.sin(), angles.cos()], 1)


@dataclass(frozen=True)
class Form:
    """What a network's layers give, and how it becomes the prediction.

    Attributes:
        kind: `"plain"`: the layers give the prediction itself; `"noise"`: the noise beyond what a
            linear denoiser knows; `"clean"`: the clean image beyond that, in the form of Karras et
            al. (2022), whose levels are noise scales.
        deviation: standard deviation of the data, for the last two.
        schedule: of the timesteps, for `"noise"`.
    """

    kind: Literal["plain", "noise", "clean"] = "plain"
    deviation: float = 0.75
    schedule: Discrete | None = None

    def __post_init__(self) -> None:
        if self.kind == "noise" and self.schedule is None:
            raise TaskError("form='noise' needs the schedule of its timesteps: pass schedule=")

    def __call__(
        self, layers: Callable[[Tensor, Tensor], Tensor], noisy: Tensor, levels: Tensor
    ) -> Tensor:
        """The prediction for noisy images `[b, ...]`; `layers` is given images and times `[b]`."""
        if self.kind == "plain":
            return layers(noisy, levels.to(noisy))
        around = (len(noisy), *[1] * (noisy.ndim - 1))
        if self.kind == "clean":
            scale = levels.to(noisy)
            variance = (scale.square() + self.deviation**2).view(around)
            said = layers(noisy / variance.sqrt(), 250 * scale.log())
            known = self.deviation**2 / variance * noisy
            return known + scale.view(around) * self.deviation / variance.sqrt() * said
        assert self.schedule is not None
        share = self.schedule.tensor.to(noisy)[levels].view(around)
        variance = share * self.deviation**2 + 1 - share
        said = layers(noisy / variance.sqrt(), levels.to(noisy))
        known = (1 - share).sqrt() / variance * noisy
        return known - share.sqrt() * self.deviation / variance.sqrt() * said


class Denoiser(nn.Module):
    """A residual network on flattened images: `model(noisy, levels, condition) -> noisy.shape`.

    `h = in(x) + time(level) [+ condition(c)]`, then twice `h += hidden(SiLU(h))`, then
    `out(SiLU(h))`.

    Args:
        shape: of an image.
        width: of h.
        conditions: length of condition vectors `[b, conditions]`; 0 for none.
        form: what the layers give; see `Form`.
        deviation: standard deviation of the data, for forms that are not plain.
        schedule: of the timesteps, for `"noise"`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int,
        *,
        conditions: int = 0,
        form: Literal["plain", "noise", "clean"] = "plain",
        deviation: float = 0.75,
        schedule: Discrete | None = None,
    ) -> None:
        super().__init__()
        pixels = math.prod(shape)
        self.form = Form(form, deviation, schedule)
        self.inside = nn.Linear(pixels, width)
        self.time = nn.Linear(2 * FREQUENCIES, width)
        self.condition = nn.Linear(conditions, width, bias=False) if conditions else None
        self.hidden = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.out = nn.Linear(width, pixels)
        if form == "clean":  # knows nothing to begin with
            _silence(self.out)

    def forward(self, noisy: Tensor, levels: Tensor, condition: Any = None) -> Tensor:
        """What the network says of noisy images."""
        if self.condition is not None and condition is None:
            raise TaskError("this network is told a condition: give the images conditions")

        def layers(flat: Tensor, times: Tensor) -> Tensor:
            state = self.inside(flat) + self.time(waves(times))
            if self.condition is not None:
                state = state + self.condition(condition.to(state))
            for layer in self.hidden:
                state = state + layer(F.silu(state))
            return self.out(F.silu(state))

        return self.form(layers, noisy.flatten(1), levels).view(noisy.shape)


class Transformer(nn.Module):
    """A small diffusion transformer (DiT, Peebles & Xie, 2023).

    Args:
        size: side of the square images of one channel.
        patch: side of a patch.
        width: of a token.
        depth: blocks.
        heads: of the attention.
        classes: of the condition `[b]`; one more stands for no condition.
        form: what the layers give; see `Form`.
        deviation: standard deviation of the data, for forms that are not plain.
        schedule: of the timesteps, for `"noise"`.
    """

    def __init__(
        self,
        size: int = 14,
        *,
        patch: int = 2,
        width: int = 64,
        depth: int = 3,
        heads: int = 4,
        classes: int = 10,
        form: Literal["plain", "noise", "clean"] = "plain",
        deviation: float = 0.75,
        schedule: Discrete | None = None,
    ) -> None:
        super().__init__()
        if size % patch or width % 4 or width % heads:
            raise TaskError(
                f"size {size}, patch {patch}, width {width} and {heads} heads do not fit: size must"
                " be a multiple of the patch, and width one of 4 and of the heads"
            )
        self.patch, self.classes = patch, classes
        self.form = Form(form, deviation, schedule)
        self.inside = nn.Linear(patch * patch, width)
        places = torch.arange((size // patch) ** 2)
        across, down = places % (size // patch), places // (size // patch)
        where = torch.cat([waves(place.float(), width // 4) for place in (across, down)], 1)
        self.register_buffer("where", where, persistent=False)
        self.time = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.label = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.last = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, patch * patch)
        _silence(self.last)
        if form == "clean":  # knows nothing to begin with
            _silence(self.out)

    def forward(self, noisy: Tensor, levels: Tensor, condition: Any = None) -> Tensor:
        """What the network says of `[b, 1, size, size]`; without a condition, of any class."""
        labels = torch.full_like(levels, self.classes) if condition is None else condition

        def layers(seen: Tensor, times: Tensor) -> Tensor:
            told = F.silu(self.time(waves(times)) + self.label(labels.long()))
            state = self.inside(self._tokens(seen)) + self.where
            for block in self.blocks:
                state = block(state, told)
            shift, scale = self.last(told)[:, None].chunk(2, -1)
            said = self.out(self.norm(state) * (1 + scale) + shift)
            side = seen.shape[-1] // self.patch
            said = said.view(len(seen), side, side, self.patch, self.patch)
            return said.transpose(2, 3).reshape(seen.shape)

        return self.form(layers, noisy, levels)

    def _tokens(self, images: Tensor) -> Tensor:
        """Patches `[b, tokens, patch ** 2]`."""
        tokens = images.unfold(2, self.patch, self.patch).unfold(3, self.patch, self.patch)
        return tokens.reshape(len(images), -1, self.patch**2)


class Block(nn.Module):
    """Attention and a two-layer network, both shifted and scaled by what the block is told."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.told = nn.Linear(width, 6 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attend = nn.Linear(width, 3 * width)
        self.joined = nn.Linear(width, width)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        _silence(self.told)  # every block begins as the identity

    def forward(self, state: Tensor, told: Tensor) -> Tensor:
        """Tokens `[b, t, width]`."""
        shift, scale, gate, shift2, scale2, gate2 = self.told(told)[:, None].chunk(6, -1)
        state = state + gate * self._attention(self.norm(state) * (1 + scale) + shift)
        inner = F.silu(self.wide(self.norm(state) * (1 + scale2) + shift2))
        return state + gate2 * self.narrow(inner)

    def _attention(self, tokens: Tensor) -> Tensor:
        size, count, width = tokens.shape
        parts = self.attend(tokens).view(size, count, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
        return self.joined((weights @ value).transpose(1, 2).reshape(size, count, width))


def _silence(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
