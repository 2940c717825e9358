"""Denoising diffusion: the loss of a network that takes noise off images."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from forebear.errors import TaskError, unknown_name
from forebear.tasks.failures import why_failed
from forebear.tasks.images import (
    keys_of,
    require_batch,
    require_conditions,
    require_scaled,
)
from forebear.tasks.noise import gaussian, uniform
from forebear.tasks.objective import Objective
from forebear.tasks.schedules import Continuous, Discrete, Level, Schedule

Prediction = Literal["epsilon", "v", "x0"]

Pairing = Literal["example", "shared"]

Call = Callable[[nn.Module, Tensor, Tensor, Any], Tensor]
"""`call(model, noisy [b, ...], levels [b], condition or None)` gives a prediction `[b, ...]`."""

LEVELS, PIXELS = 1.0, 2.0
"""What of a moment is drawn: keeps the level apart from the noise."""


class Point(NamedTuple):
    """A level of noise and the number of a draw at it."""

    level: Level
    draw: int


def images(pixels: Tensor, condition: Tensor | None = None, *, keys: Any = None) -> dict[str, Any]:
    """A dataset of images for diffusion tasks.

    Args:
        pixels: `[n, c, h, w]` or any other shape that the network takes, floating point and
            scaled as in training, mostly from -1 to 1.
        condition: `[n, ...]` of each image: a label, or an embedded text.
        keys: integers `[n]` that noise belongs to, all different; positions when left out. Queries
            need keys of their own only where noise is to differ from that of the training examples.

    Raises:
        DataError: pixels are integers, or are not scaled; conditions or keys are not one for each
            image, or keys are no integers or repeat.
        NonFiniteError: a pixel is NaN or infinite.
    """
    require_scaled(pixels)
    batch = {"image": pixels, "key": keys_of(keys, len(pixels))}
    if condition is None:
        return batch
    require_conditions(condition, len(pixels))
    return {**batch, "condition": condition}


class Denoising(Objective):
    """Squared error of a denoising network, averaged over pixels, levels and draws of noise.

    The batch is a dict with `image` `[b, ...]`, `key` `[b]` and, for conditional models,
    `condition` `[b, ...]`; see `images`. The noise of an example belongs to its key, the level, the
    draw and the seed, so it is the same for every model, batch size and order.

    Args:
        schedule: `Discrete` (DDPM) or `Continuous` (EDM).
        prediction: what the network gives: the noise `"epsilon"`, the velocity `"v"` (Salimans &
            Ho, 2022) or the clean image `"x0"`.
        levels: timesteps or noise scales to average over; a number chooses so many.
        draws: of noise at each level.
        noise: `"example"`: each key has its own noise; `"shared"`: all have the same.
        seed: of the noise.
        call: how the network is called; `model(noisy, levels)` or `model(noisy, levels, condition)`
            when left out, and what it returns may have the prediction as `.sample`.
    """

    name = "denoising"

    def __init__(
        self,
        schedule: Schedule | None = None,
        prediction: Prediction = "epsilon",
        *,
        levels: int | Sequence[Level] = 10,
        draws: int = 1,
        noise: Pairing = "example",
        seed: int = 0,
        call: Call | None = None,
    ) -> None:
        self.schedule: Schedule = Discrete.linear() if schedule is None else schedule
        if prediction not in get_args(Prediction):
            raise unknown_name("prediction", prediction, get_args(Prediction))
        if isinstance(self.schedule, Continuous) and prediction != "x0":
            raise TaskError(
                f"prediction is {prediction!r} and the schedule is Continuous (EDM), whose "
                "networks give the clean image: use prediction='x0', or a Discrete schedule"
            )
        if noise not in get_args(Pairing):
            raise unknown_name("noise", noise, get_args(Pairing))
        if not isinstance(draws, int) or draws < 1:
            raise TaskError(f"draws is {draws}: it must be a whole number from 1")
        self.prediction: Prediction = prediction
        chosen = self.schedule.levels(levels) if isinstance(levels, int) else tuple(levels)
        if not chosen:
            raise TaskError("levels is empty: name at least one timestep or noise scale")
        for place, level in enumerate(chosen):
            self.schedule.at(level)
            if level in chosen[:place]:
                raise TaskError(
                    f"levels name {level} more than once, always with the same noise: name it "
                    "once, and take more draws= for more noise"
                )
        self.levels = tuple(float(level) for level in chosen)
        self.draws = draws
        self._first = 0  # of the draws
        self.noise: Pairing = noise
        self.seed = seed
        self.call: Call = _plain_call if call is None else call

    def at(self, levels: int | Sequence[Level], *, draws: int | None = None) -> "Denoising":
        """The same loss at other levels, with the same noise where levels agree."""
        return Denoising(
            self.schedule,
            self.prediction,
            levels=levels,
            draws=self.draws if draws is None else draws,
            noise=self.noise,
            seed=self.seed,
            call=self.call,
        )

    @property
    def about(self) -> dict[str, Any]:
        """What decides the loss, for records that must not be mixed."""
        own = {name: one for name, one in vars(self).items() if not name.startswith("_")}
        first = {"first_draw": self._first} if self._first else {}
        asked = self._asked()
        return {**asked, **{k: v for k, v in own.items() if k not in asked}, **first}

    def _asked(self) -> dict[str, Any]:
        """What the network is for, at whatever level and noise."""
        called = "plain" if self.call is _plain_call else self.call
        return {"prediction": self.prediction, "schedule": self.schedule, "call": called}

    @property
    def clearest(self) -> Level:
        """The least noisy of the levels that have noise at all, where most can be seen."""

        def order(level: Level) -> tuple[bool, float]:
            signal, strength = self.schedule.at(level)
            return strength == 0, strength / signal if signal else math.inf

        return min(self.levels, key=order)

    @property
    def points(self) -> tuple[Point, ...]:
        """Every level with every draw, level by level."""
        draws = range(self._first, self._first + self.draws)
        return tuple(Point(level, draw) for level in self.levels for draw in draws)

    @property
    def parts(self) -> tuple["Denoising", ...]:
        """The losses at single points, in the order of `points`."""
        each = []
        for point in self.points:
            each.append(self.at((point.level,), draws=1))
            each[-1]._first = point.draw
        return tuple(each)

    def noise_of(self, batch: Any, point: Point) -> Tensor:
        """The noise of each example at a point, in the images' shape."""
        image = batch["image"]
        keys = self._keys(batch)
        coordinates = (float(self.seed), point.level, float(point.draw))
        return gaussian(keys, tuple(image.shape[1:]), *coordinates, dtype=image.dtype)

    def noisy(self, batch: Any, point: Point, noise: Tensor | None = None) -> Tensor:
        """Images with noise of a level in them."""
        signal, strength = self.schedule.at(point.level)
        return signal * batch["image"] + strength * (
            self.noise_of(batch, point) if noise is None else noise
        )

    def predicted(
        self, model: nn.Module, noisy: Tensor, level: Level | Tensor, batch: Any
    ) -> Tensor:
        """What the network says of noisy images at a level, or at one each `[b]`; `[b, ...]`."""
        levels = level if isinstance(level, Tensor) else noisy.new_full((len(noisy),), level)
        if isinstance(self.schedule, Discrete):
            levels = levels.long()
        condition = batch.get("condition")
        try:
            said = self.call(model, noisy, levels, condition)
        except (TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
            reason = why_failed(error, model, noisy, condition)
            if reason is None:
                raise
            raise TaskError(f"{reason} ({type(error).__name__}: {error})") from error
        if said.shape != noisy.shape:
            raise TaskError(
                f"the network gives {tuple(said.shape)} for images of shape {tuple(noisy.shape)}: "
                "pass call= to pick its prediction, without a learned variance"
            )
        return said

    def target(self, image: Tensor, noise: Tensor, level: Level) -> Tensor:
        """What the network should say."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "x0":
            return image
        signal, strength = self.schedule.at(level)
        return signal * noise - strength * image

    def clean(self, noisy: Tensor, said: Tensor, level: Level) -> Tensor:
        """The clean image that a prediction amounts to."""
        if self.prediction == "x0":
            return said
        signal, strength = self.schedule.at(level)
        if self.prediction == "v":
            return signal * noisy - strength * said
        return (noisy - strength * said) / signal

    def seen(self, noisy: Tensor, said: Tensor, level: Level) -> Tensor:
        """The noise that a prediction amounts to."""
        if self.prediction == "epsilon":
            return said
        signal, strength = self.schedule.at(level)
        return (noisy - signal * self.clean(noisy, said, level)) / strength

    def summarised(self, model: nn.Module, batch: Any) -> Tensor:
        """The noise that the network sees at every point, `[b, points, pixels]`.

        Whatever the network predicts, so that functions of it mean the same for all.
        """
        terms = self.terms(model, batch)
        seen = [self.seen(noisy, said, point.level) for point, noisy, _, said in terms]
        return torch.stack(seen, 1).flatten(2)

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Predictions at every point, `[b, points, pixels]`."""
        require_batch(batch)
        said = [
            self.predicted(model, self.noisy(batch, point), point.level, batch).flatten(1)
            for point in self.points
        ]
        return torch.stack(said, 1)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Weighted squared error of each example, `[b]`."""
        # As by way of outputs, with noise made once: it is a good part of a small network's pass.
        found = []
        for point, _, noise, said in self.terms(model, batch):
            target = self.target(batch["image"], noise, point.level)
            error = (said - target).square().flatten(1).mean(1)
            found.append(self.schedule.weight(point.level) * error)
        return torch.stack(found, 1).mean(1)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Weighted squared error of each example, `[b]`."""
        return self.errors(outputs, batch).mean(1)

    def errors(self, outputs: Tensor, batch: Any) -> Tensor:
        """Weighted squared error at every point, `[b, points]`."""
        found = []
        for place, point in enumerate(self.points):
            target = self.target(batch["image"], self.noise_of(batch, point), point.level)
            error = (outputs[:, place] - target.flatten(1)).square().mean(-1)
            found.append(self.schedule.weight(point.level) * error)
        return torch.stack(found, 1)

    def sample(
        self, outputs: Tensor, batch: Any, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Targets from a Gaussian around the prediction; weights one.

        The loss is twice as large as the negative log-likelihood of a Gaussian of the variance
        `points · pixels / weight`, which is the one that targets are drawn from here.
        """
        noise = torch.randn(outputs.shape, generator=generator, device=outputs.device)
        scale = self._scales(outputs).rsqrt() * (0.5**0.5)
        return outputs + noise.to(outputs.dtype) * scale[:, None], outputs.new_ones(len(outputs))

    def loss_at(self, outputs: Tensor, batch: Any, targets: Tensor, weights: Tensor) -> Tensor:
        """Weighted squared error of each example at other targets, `[b]`."""
        squares = (outputs - targets).square().sum(-1)  # [b, points]
        return weights * (squares * self._scales(outputs)).sum(-1)

    def link(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Minus the loss, with weight one: TRAK for diffusion compares gradients of the loss."""
        loss = self(model, batch)
        return -loss, torch.ones_like(loss).detach()

    def terms(self, model: nn.Module, batch: Any) -> Iterator[tuple[Point, Tensor, Tensor, Tensor]]:
        """Point, noisy images, noise and prediction, one point at a time."""
        require_batch(batch)
        for point in self.points:
            noise = self.noise_of(batch, point)
            noisy = self.noisy(batch, point, noise)
            yield point, noisy, noise, self.predicted(model, noisy, point.level, batch)

    def training(self, *, location: float = -1.2, spread: float = 1.2) -> "DenoisingTraining":
        """The loss to train with: one random level and noise for each example at every visit.

        Args:
            location: mean of the logarithm of the noise scale, for `Continuous` schedules.
            spread: its standard deviation.
        """
        return DenoisingTraining(self, location, spread)

    def _scales(self, outputs: Tensor) -> Tensor:
        """Factor of every squared number in the loss, `[points]`."""
        weights = [self.schedule.weight(point.level) for point in self.points]
        return outputs.new_tensor(weights) / (outputs.shape[1] * outputs.shape[2])

    def _keys(self, batch: Any) -> Tensor:
        return batch["key"] * 0 if self.noise == "shared" else batch["key"]


@dataclass(frozen=True)
class DenoisingTraining:
    """The loss that a denoising network is trained with: `loss(model, batch) -> [b]`.

    Each example has a level and noise of its own, which belong to `batch["moment"]` `[b]`: a
    `Recipe` puts it there, other at every epoch and seed, and the same for all subsets.

    Attributes:
        loss: what is trained.
        location: mean of the logarithm of the noise scale, for `Continuous` schedules; timesteps
            of a `Discrete` schedule are all as likely.
        spread: its standard deviation.
    """

    loss: Denoising
    location: float = -1.2
    spread: float = 1.2
    random = True
    name = "denoising_training"

    @property
    def about(self) -> dict[str, Any]:
        """What decides the loss; levels, draws and seed of `loss` play no part in training."""
        drawn = {"location": self.location, "spread": self.spread}
        continuous = isinstance(self.loss.schedule, Continuous)
        # Nothing is known of what else a loss of another class looks at.
        whole = {} if type(self.loss) is Denoising else {"loss": self.loss}
        return {**self.loss._asked(), **whole, **(drawn if continuous else {})}

    def check(self, batch: Any) -> None:
        """Refuse examples that are not images as in training; see `require_batch`."""
        require_batch(batch)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Weighted squared error of each example at its moment, `[b]`."""
        weight, squares = self.squares(model, batch)
        return weight * squares.flatten(1).mean(1)

    def squares(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Weight of each example at its moment `[b]` and its squared errors `[b, ...]`."""
        if "moment" not in batch:
            raise TaskError(
                "this loss draws noise for each visit of an example, and the batch has no "
                "'moment': train with a Recipe, and attribute the loss it was made from"
            )
        image, moment, schedule = batch["image"], batch["moment"], self.loss.schedule
        around = (len(image), *[1] * (image.ndim - 1))
        noise = gaussian(moment, tuple(image.shape[1:]), PIXELS, dtype=image.dtype)
        if isinstance(schedule, Discrete):
            level = (uniform(moment, LEVELS) * len(schedule)).ceil().long() - 1
            kept = schedule.tensor.to(image.device)[level]
            signal, strength = kept.sqrt().to(image), (1 - kept).sqrt().to(image)
            weight = torch.ones_like(signal)
        elif isinstance(schedule, Continuous):
            drawn = gaussian(moment, (1,), LEVELS, dtype=image.dtype)[:, 0]
            level = strength = (self.location + self.spread * drawn).exp()
            signal, spread = torch.ones_like(level), schedule.deviation
            weight = (level**2 + spread**2) / (level * spread) ** 2
        else:
            raise TaskError(f"{type(schedule).__name__} cannot be trained with: write a loss")
        signal, strength = signal.view(around), strength.view(around)
        noisy = signal * image + strength * noise
        said = self.loss.predicted(model, noisy, level, batch)
        wanted = {"epsilon": noise, "x0": image, "v": signal * noise - strength * image}
        return weight, (said - wanted[self.loss.prediction]).square()


def _plain_call(model: nn.Module, noisy: Tensor, levels: Tensor, condition: Any) -> Tensor:
    said = model(noisy, levels) if condition is None else model(noisy, levels, condition)
    return said.sample if hasattr(said, "sample") and not isinstance(said, Tensor) else said
