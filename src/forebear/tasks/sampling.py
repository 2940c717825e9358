"""Images from noise, and noise from images: the deterministic and random samplers of diffusion."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from forebear.errors import TaskError
from forebear.tasks.diffusion import Denoising
from forebear.tasks.noise import gaussian
from forebear.tasks.schedules import Continuous, Discrete, Level, Schedule
from forebear.types import require_choices

START, STEPS = 3.0, 4.0
"""What of a key is drawn: keeps the noise that sampling begins with apart from that of its steps"""


@dataclass(frozen=True)
class Guided:
    """A network under a condition, with classifier-free guidance.

    Attributes:
        model: the network.
        loss: how it is called and what it gives.
        condition: `[b, ...]`, or None.
        guidance: 1 follows the condition alone; more leads away from `without`.
        without: the condition that says nothing, `[b, ...]`; needed when guidance is not 1.
    """

    model: nn.Module
    loss: Denoising
    condition: Any = None
    guidance: float = 1.0
    without: Any = None

    def __post_init__(self) -> None:
        if self.guidance != 1.0 and (self.without is None or self.condition is None):
            raise TaskError(
                f"guidance is {self.guidance}, which compares two conditions: pass condition= and "
                "without="
            )

    def clean(self, noisy: Tensor, level: Level) -> Tensor:
        """The clean image that the network sees behind `noisy`."""
        found = self._clean(noisy, level, self.condition)
        if self.guidance == 1.0:
            return found
        base = self._clean(noisy, level, self.without)
        return base + self.guidance * (found - base)

    def _clean(self, noisy: Tensor, level: Level, condition: Any) -> Tensor:
        batch = {} if condition is None else {"condition": condition}
        said = self.loss.predicted(self.model, noisy, level, batch)
        return self.loss.clean(noisy, said, level)


@dataclass(frozen=True)
class Sampler:
    """How images are drawn.

    Attributes:
        steps: calls of the network (Heun's method calls it twice a step).
        randomness: η of DDIM: 0 is deterministic, 1 as random as DDPM. Discrete schedules only.
        clip: keep the clean image within -1 and 1 at every step.
        most: noise scale to begin with, for `Continuous` schedules; the schedule's when left out.
        spacing: of the timesteps of `Discrete` schedules, with the names of diffusers:
            `"linspace"` has both ends in it, `"leading"` the first, `"trailing"` the last.
        offset: added to `"leading"` timesteps.
        to_first: the last step ends at the noise of timestep 0, not at the clean image.
    """

    steps: int = 50
    randomness: float = 0.0
    clip: bool = False
    most: float | None = None
    spacing: Literal["linspace", "leading", "trailing"] = "linspace"
    offset: int = 0
    to_first: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise TaskError(f"steps is {self.steps}: it must be at least 1")
        require_choices(self)

    def start(self, loss: Denoising, keys: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The noise `[b, *shape]` that sampling begins with, which belongs to the keys."""
        noise = gaussian(keys, shape, START)
        scale = self._scales(loss.schedule)[0] if isinstance(loss.schedule, Continuous) else 1.0
        return noise * scale

    @torch.no_grad()
    def sample(self, guided: Guided, start: Tensor, keys: Tensor | None = None) -> Tensor:
        """Images `[b, ...]` from `start`; keys `[b]` are needed where steps are random."""
        *_, (_, image) = self.path(guided, start, keys)
        return image

    @torch.no_grad()
    def path(
        self, guided: Guided, start: Tensor, keys: Tensor | None = None
    ) -> Iterator[tuple[Level, Tensor]]:
        """Levels and states after each step; the last level is 0, its state the image."""
        schedule = guided.loss.schedule
        if isinstance(schedule, Continuous):
            yield from self._heun(guided, start, schedule)
        elif isinstance(schedule, Discrete):
            if self.randomness > 0 and keys is None:
                raise TaskError(f"randomness is {self.randomness}: pass keys= for its noise")
            yield from self._ddim(guided, start, schedule, keys)
        else:
            raise TaskError(f"{type(schedule).__name__} has no sampler: write one")

    @torch.no_grad()
    def inversion(self, guided: Guided, images: Tensor) -> Iterator[tuple[Level, Tensor]]:
        """Levels and states on the deterministic path from images to noise (DDIM inversion).

        Raises:
            TaskError: the schedule is continuous.
        """
        schedule = guided.loss.schedule
        if not isinstance(schedule, Discrete):
            raise TaskError("images are inverted along the timesteps of a Discrete schedule")
        levels = self.timesteps(schedule)[::-1]
        state, here = images, None
        for there in levels:
            state = self._moved(guided, state, here, there, schedule)
            here = there
            yield there, state

    def levels(self, schedule: Schedule) -> list[Level]:
        """The levels that sampling visits, falling."""
        if isinstance(schedule, Discrete):
            return self.timesteps(schedule)
        return self._scales(schedule)

    def timesteps(self, schedule: Discrete) -> list[Level]:
        """The timesteps that sampling visits, falling."""
        if self.steps > len(schedule):
            raise TaskError(f"{self.steps} steps and the schedule has {len(schedule)}")
        size, steps = len(schedule), range(self.steps)
        if self.spacing == "leading":
            found = [size // self.steps * i + self.offset for i in reversed(steps)]
            if found[0] >= size:
                raise TaskError(
                    f"offset={self.offset} leads to timestep {found[0]} of {size}: use fewer steps"
                )
        elif self.spacing == "trailing":
            found = [round(size - i * size / self.steps) - 1 for i in steps]
        elif self.steps == 1:
            found = [size - 1]
        else:
            found = [round((size - 1) * i / (self.steps - 1)) for i in reversed(steps)]
        return [float(level) for level in found]

    def _ddim(
        self, guided: Guided, state: Tensor, schedule: Discrete, keys: Tensor | None
    ) -> Iterator[tuple[Level, Tensor]]:
        levels = self.timesteps(schedule)
        last = 0.0 if self.to_first else None
        for here, there in zip(levels, [*levels[1:], last], strict=True):
            clean = self._clean(guided, state, here)
            if there is None:
                yield 0.0, clean
                return
            signal, noise = schedule.at(here)
            kept, strength = schedule.at(there)
            said = (state - signal * clean) / noise
            fresh = self.randomness * strength / noise * math.sqrt(1 - (signal / kept) ** 2)
            state = kept * clean + math.sqrt(max(strength**2 - fresh**2, 0.0)) * said
            if fresh > 0 and keys is not None:
                shape = tuple(state.shape[1:])
                state = state + fresh * gaussian(keys, shape, STEPS, here, dtype=state.dtype)
            yield there, state

    def _moved(
        self,
        guided: Guided,
        state: Tensor,
        here: Level | None,
        there: Level,
        schedule: Discrete,
    ) -> Tensor:
        """One deterministic step from a level, or from the image itself, to a noisier one."""
        signal, noise = (1.0, 0.0) if here is None else schedule.at(here)
        at = there if here is None else here  # networks are not asked about images without noise
        asked, around = schedule.at(at)
        clean = self._clean(guided, state, at)
        said = (state - asked * clean) / around  # the noise that the network sees
        kept, strength = schedule.at(there)
        return kept * (state - noise * said) / signal + strength * said

    def _heun(
        self, guided: Guided, state: Tensor, schedule: Continuous
    ) -> Iterator[tuple[Level, Tensor]]:
        scales = self._scales(schedule)
        for here, there in zip(scales, [*scales[1:], 0.0], strict=True):
            slope = (state - self._clean(guided, state, here)) / here
            ahead = state + (there - here) * slope
            if there > 0:
                again = (ahead - self._clean(guided, ahead, there)) / there
                ahead = state + (there - here) * 0.5 * (slope + again)
            state = ahead
            yield there, state

    def _clean(self, guided: Guided, state: Tensor, level: Level) -> Tensor:
        clean = guided.clean(state, level)
        return clean.clamp(-1, 1) if self.clip else clean

    def _scales(self, schedule: Any) -> list[float]:
        """Falling noise scales of a continuous schedule."""
        most = schedule.most if self.most is None else self.most
        own = Continuous(schedule.deviation, schedule.least, most, schedule.power)
        return list(own.levels(self.steps)[::-1]) if self.steps > 1 else [most]
