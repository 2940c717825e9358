"""Noise schedules of diffusion models: how much of an image is left at a level."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from forebear.errors import TaskError

Level = float
"""A timestep, or a noise scale σ."""


class Schedule(Protocol):
    """Levels of noise: `x_t = signal · x + noise · e`."""

    def at(self, level: Level) -> tuple[float, float]:
        """Signal and noise at a level.

        Raises:
            TaskError: there is no such level.
        """
        ...

    def levels(self, count: int) -> tuple[Level, ...]:
        """So many levels over the whole range, from little noise to much."""
        ...

    def weight(self, level: Level) -> float:
        """Factor of the squared error in the training loss."""
        ...


@dataclass(frozen=True)
class Discrete:
    """The T steps of denoising diffusion (DDPM), of constant variance.

    Attributes:
        signal: `[T]` shares of variance that are signal, `ᾱ_t`, falling.
    """

    signal: tuple[float, ...]

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in zip(self.signal, self.signal[1:], strict=False))
        if not self.signal or not falling or self.signal[-1] < 0 or self.signal[0] > 1:
            raise TaskError(
                "a noise schedule's cumulative signal must fall from at most 1 to at least 0: pass "
                "alphas_cumprod, not betas"
            )
        # Made here: inside a transform of torch.func it would belong to that transform for ever.
        _ = self.tensor

    @classmethod
    def linear(cls, steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> "Discrete":
        """Betas that rise linearly, after Ho et al. (2020)."""
        betas = torch.linspace(first, last, steps, dtype=torch.float64)
        return cls(tuple((1 - betas).cumprod(0).tolist()))

    @classmethod
    def cosine(cls, steps: int = 1000, offset: float = 0.008) -> "Discrete":
        """The cosine schedule of Nichol & Dhariwal (2021)."""
        times = torch.arange(steps + 1, dtype=torch.float64) / steps
        curve = torch.cos((times + offset) / (1 + offset) * (math.pi / 2)).square()
        betas = (1 - curve[1:] / curve[:-1]).clamp_max(0.999)
        return cls(tuple((1 - betas).cumprod(0).tolist()))

    @classmethod
    def of(cls, cumulative: Tensor) -> "Discrete":
        """From `alphas_cumprod` `[T]`, as the schedulers of diffusers have it."""
        return cls(tuple(cumulative.double().tolist()))

    def __len__(self) -> int:
        return len(self.signal)

    @cached_property
    def tensor(self) -> Tensor:
        """`[T]` in double precision."""
        return torch.tensor(self.signal, dtype=torch.float64)

    def at(self, level: Level) -> tuple[float, float]:
        """`√ᾱ_t` and `√(1 − ᾱ_t)`."""
        if not math.isfinite(level) or level != int(level) or not 0 <= level < len(self.signal):
            raise TaskError(
                f"timestep {level} does not exist: the schedule has whole ones from 0 to "
                f"{len(self.signal) - 1}"
            )
        share = self.signal[int(level)]
        return math.sqrt(share), math.sqrt(1 - share)

    def levels(self, count: int) -> tuple[Level, ...]:
        """The middles of so many equal stretches."""
        steps = len(self.signal)
        if not 1 <= count <= steps:
            raise TaskError(f"{count} levels of a schedule of {steps} steps: choose 1 to {steps}")
        return tuple(float((2 * i + 1) * steps // (2 * count)) for i in range(count))

    def weight(self, level: Level) -> float:
        """One: the simple loss."""
        return 1.0


@dataclass(frozen=True)
class Continuous:
    """Noise added on top of the image, after Karras et al. (2022, EDM).

    Attributes:
        deviation: standard deviation σ_d of the data.
        least: smallest noise scale that is asked for.
        most: largest one.
        power: ρ of the grid.
    """

    deviation: float = 0.5
    least: float = 0.002
    most: float = 80.0
    power: float = 7.0

    def __post_init__(self) -> None:
        if not (0 < self.deviation < math.inf and 0 < self.least < self.most < math.inf):
            raise TaskError(
                f"deviation is {self.deviation}, noise scales go from {self.least} to {self.most}: "
                "all must be above 0 and finite, and rising"
            )

    def at(self, level: Level) -> tuple[float, float]:
        """One, and σ itself."""
        if not 0 < level < math.inf:
            raise TaskError(f"noise scale {level}: it must be above 0 and finite")
        return 1.0, float(level)

    def levels(self, count: int) -> tuple[Level, ...]:
        """Karras's grid from `least` to `most`."""
        if count < 1:
            raise TaskError(f"{count} noise levels: choose at least 1")
        if count == 1:
            return (math.sqrt(self.least * self.most),)
        low, high = (s ** (1 / self.power) for s in (self.least, self.most))
        steps = ((low + (high - low) * i / (count - 1)) ** self.power for i in range(count))
        return tuple(steps)

    def weight(self, level: Level) -> float:
        """`(σ² + σ_d²) / (σ σ_d)²`: a network that knows nothing has a loss of about one."""
        return (level**2 + self.deviation**2) / (level * self.deviation) ** 2
