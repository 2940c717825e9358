"""Noise scales of any schedule, and the loss that mirrored unlearning is about."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from forebear.errors import TaskError
from forebear.tasks.diffusion import Denoising
from forebear.tasks.schedules import Continuous, Discrete

LEAST, MOST = 0.002, 80.0
"""Noise scales of the grid, where the schedule reaches so far."""


class Levels(NamedTuple):
    """Levels of a batch, each `[b]`: what the network is told, how much of image and noise there
    is, and the factor of the squared error of the network.
    """

    told: Tensor
    signal: Tensor
    strength: Tensor
    factor: Tensor


@dataclass(frozen=True)
class Scales:
    """The clean image's squared error with EDM's weight, for a network of any kind.

    A network that knows nothing but the deviation of the data has a loss of about one at every
    noise scale, which plain losses of networks that say the noise do not: there "nothing" is as bad
    as one at some levels and nearly perfect at others.

    Attributes:
        loss: how the network is called and what it says.
        deviation: standard deviation σ_d of the data.
    """

    loss: Denoising
    deviation: float

    def __post_init__(self) -> None:
        schedule = self.loss.schedule
        if not isinstance(schedule, Continuous | Discrete):
            raise TaskError(
                f"{type(schedule).__name__} has no noise scales that mirrored unlearning knows of: "
                "use a Discrete or a Continuous schedule"
            )

    def grid(self, count: int, keep: float) -> tuple[float, ...]:
        """The `count` largest of a grid of noise scales, of which they are the share `keep`."""
        schedule = self.loss.schedule
        if isinstance(schedule, Continuous):
            grid = schedule
        else:
            scales = self._table
            low, high = max(LEAST, scales[0].item()), min(MOST, scales[-1].item())
            grid = Continuous(self.deviation, low, high)
        return grid.levels(max(count, int(count / keep)))[::-1][:count]

    def levels(self, scales: Tensor) -> Levels:
        """Levels of noise scales σ `[b]`; of timesteps the nearest ones."""
        if isinstance(self.loss.schedule, Continuous):
            signal, told, found = torch.ones_like(scales), scales, scales
        else:
            table = self._table.log().to(scales.device)
            place = torch.searchsorted(0.5 * (table[1:] + table[:-1]), scales.double().log())
            found = self._table.to(scales.device)[place].to(scales)
            told = self._first + place
            signal = (1 + found.square()).rsqrt()
        strength = found * signal
        weight = (found**2 + self.deviation**2) / (found * self.deviation) ** 2
        # By how much an error of what the network says moves the clean image.
        moved = {"x0": torch.ones_like(found), "epsilon": found, "v": strength}
        return Levels(told, signal, strength, weight * moved[self.loss.prediction].square())

    def losses(self, model: nn.Module, batch: Any, levels: Levels, noise: Tensor) -> Tensor:
        """Weighted squared error of the clean image, `[b]`.

        Args:
            model: the network.
            batch: a dict with `image` `[b, ...]` and perhaps `condition`.
            levels: of each image.
            noise: `[b, ...]`, or with 1 in place of b when all images share it.
        """
        image = batch["image"]
        around = (-1, *[1] * (image.ndim - 1))
        signal, strength = levels.signal.view(around), levels.strength.view(around)
        noisy = signal * image + strength * noise
        said = self.loss.predicted(model, noisy, levels.told, batch)
        wanted = {
            "x0": image,
            "epsilon": noise,
            "v": signal * noise - strength * image,
        }[self.loss.prediction]
        return levels.factor * (said - wanted).square().flatten(1).mean(1)

    def null(self, mean_square: float, location: float, spread: float) -> float:
        """Loss of the linear denoiser `σ_d² / (σ² + σ_d²) · noisy`, which knows only the deviation.

        It is what an EDM network says before training, when its last layer is zero. Noise scales
        have logarithms from a Gaussian.

        Args:
            mean_square: of the pixels.
            location: mean of the logarithm of the noise scale.
            spread: its standard deviation.
        """
        shares = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
        scales = (location + spread * math.sqrt(2) * torch.erfinv(2 * shares - 1)).exp()
        levels = self.levels(scales)
        noise = (levels.strength / levels.signal).square()
        known = self.deviation**2
        # The squares of what it takes off the image, and of the noise that it leaves in.
        lost = noise / (noise + known) * mean_square / known
        return (lost + known / (noise + known)).mean().item()

    @property
    def _first(self) -> int:
        """The first timestep that has noise."""
        assert isinstance(self.loss.schedule, Discrete)
        return int((self.loss.schedule.tensor >= 1).sum())

    @property
    def _table(self) -> Tensor:
        """Noise scales of the timesteps that have both signal and noise, rising."""
        assert isinstance(self.loss.schedule, Discrete)
        kept = self.loss.schedule.tensor
        kept = kept[(kept < 1) & (kept > 0)]
        return ((1 - kept) / kept).sqrt()


def seen(batch: Any) -> dict[str, Tensor]:
    """What of a batch a network sees."""
    return {key: batch[key] for key in ("image", "condition") if key in batch}
