"""Small networks that take noise off small images."""

import math
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


class Denoiser(nn.Module):
    """A residual network on flattened images: `model(noisy, levels, condition) -> noisy.shape`.

    `h = in(x) + time(level) [+ condition(c)]`, then twice `h += hidden(SiLU(h))`, then
    `out(SiLU(h))`.

    Args:
        shape: of an image.
        width: of h.
        conditions: length of condition vectors `[b, conditions]`; 0 for none.
        form: what the layers give: the noise itself (`"plain"`), the noise over what a linear
            denoiser knows (`"noise"`), or the clean image in the form of Karras et al. (2022)
            (`"clean"`), whose levels are noise scales.
        deviation: standard deviation of the data, for the last two.
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
        if form == "noise" and schedule is None:
            raise TaskError("form='noise' needs the schedule of its timesteps: pass schedule=")
        pixels = math.prod(shape)
        self.form = form
        self.deviation = deviation
        self.inside = nn.Linear(pixels, width)
        self.time = nn.Linear(2 * FREQUENCIES, width)
        self.condition = nn.Linear(conditions, width, bias=False) if conditions else None
        self.hidden = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.out = nn.Linear(width, pixels)
        if form == "clean":  # knows nothing to begin with
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)
        share = schedule.tensor.float() if schedule is not None else torch.zeros(0)
        self.register_buffer("share", share, persistent=False)

    def forward(self, noisy: Tensor, levels: Tensor, condition: Any = None) -> Tensor:
        """What the network says of noisy images."""
        if self.condition is not None and condition is None:
            raise TaskError("this network is told a condition: give the images conditions")
        flat = noisy.flatten(1)
        if self.form == "plain":
            said = self._layers(flat, levels.to(flat), condition)
        elif self.form == "clean":
            said = self._clean(flat, levels.to(flat)[:, None], condition)
        else:
            said = self._noise(flat, levels, condition)
        return said.view(noisy.shape)

    def _layers(self, flat: Tensor, times: Tensor, condition: Any) -> Tensor:
        state = self.inside(flat) + self.time(waves(times))
        if self.condition is not None:
            state = state + self.condition(condition.to(state))
        for layer in self.hidden:
            state = state + layer(F.silu(state))
        return self.out(F.silu(state))

    def _clean(self, flat: Tensor, scale: Tensor, condition: Any) -> Tensor:
        variance = scale.square() + self.deviation**2
        said = self._layers(flat / variance.sqrt(), 250 * scale[:, 0].log(), condition)
        known = self.deviation**2 / variance * flat
        return known + scale * self.deviation / variance.sqrt() * said

    def _noise(self, flat: Tensor, levels: Tensor, condition: Any) -> Tensor:
        share = self.share.to(flat)[levels][:, None]  # type: ignore[operator]
        variance = share * self.deviation**2 + 1 - share
        said = self._layers(flat / variance.sqrt(), levels.to(flat), condition)
        known = (1 - share).sqrt() / variance * flat
        return known - share.sqrt() * self.deviation / variance.sqrt() * said


class Transformer(nn.Module):
    """A small diffusion transformer (DiT, Peebles & Xie, 2023) that predicts the noise.

    Args:
        size: side of the square images of one channel.
        patch: side of a patch.
        width: of a token.
        depth: blocks.
        heads: of the attention.
        classes: of the condition `[b]`; one more stands for no condition.
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
    ) -> None:
        super().__init__()
        if size % patch or width % 4 or width % heads:
            raise TaskError(
                f"size {size}, patch {patch}, width {width} and {heads} heads do not fit: size must"
                " be a multiple of the patch, and width one of 4 and of the heads"
            )
        self.patch, self.classes = patch, classes
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

    def forward(self, noisy: Tensor, levels: Tensor, condition: Any = None) -> Tensor:
        """The noise in `[b, 1, size, size]`; without a condition, of any class."""
        labels = torch.full_like(levels, self.classes) if condition is None else condition
        told = F.silu(self.time(waves(levels.to(noisy))) + self.label(labels.long()))
        side = noisy.shape[-1] // self.patch
        tokens = noisy.unfold(2, self.patch, self.patch).unfold(3, self.patch, self.patch)
        tokens = tokens.reshape(len(noisy), side * side, self.patch**2)
        state = self.inside(tokens) + self.where
        for block in self.blocks:
            state = block(state, told)
        shift, scale = self.last(told)[:, None].chunk(2, -1)
        said = self.out(self.norm(state) * (1 + scale) + shift)
        said = said.view(len(noisy), side, side, self.patch, self.patch)
        return said.transpose(2, 3).reshape(noisy.shape)


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
        nn.init.zeros_(self.told.weight)  # every block begins as the identity
        nn.init.zeros_(self.told.bias)

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
