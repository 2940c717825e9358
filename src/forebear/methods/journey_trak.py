"""Journey-TRAK: what the model was taught for every step of the way to a generated image."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from forebear.curvature import Damping
from forebear.data import Data
from forebear.errors import DataError, TaskError
from forebear.gradients import Precision
from forebear.methods.diffusion_gradients import RIDGE, kernel
from forebear.methods.fitted_influence import FittedInfluence
from forebear.methods.influence import Influence
from forebear.projections import Compression
from forebear.task import Task
from forebear.tasks.diffusion import Denoising, Point
from forebear.tasks.images import require_batch
from forebear.tasks.objective import SUMMARIES
from forebear.tasks.sampling import Guided, Sampler
from forebear.tasks.schedules import Level

MISSED = 0.1
"""Root mean square of pixels by which the end of a journey may miss its query: more than rounding
to 8 bits, clipping and another device's arithmetic make of it."""


FIFTY_STEPS = Sampler(steps=50)


def JourneyTRAK(
    *,
    sampler: Sampler = FIFTY_STEPS,
    guidance: float = 1.0,
    function: Literal["loss", "square_norm", "mean", "absolute"] = "loss",
    damping: float | Damping = RIDGE,
    dimension: int | None = None,
    projection: Compression = "tensor_sketch",
    precision: Precision = "float32",
    layers: tuple[str, ...] | None = None,
    seed: int = 0,
) -> "JourneyInfluence":
    """TRAK's kernel with query gradients along the query's own sampling (Georgiev et al. 2023).

    At every step the model guesses the clean image. The query's gradient is that of the loss of
    these guesses, each at the level of noise where it was made, averaged over the steps. Queries
    must be generated images: `images(pixels, keys=keys)` of
    `sampler.sample(guided, sampler.start(loss, keys, shape), keys)`.

    Args:
        sampler: how the queries were generated.
        guidance: that they were generated with; above 1 their dataset also has a column `without`.
        function: differentiated on both sides: the `"loss"`, or one of D-TRAK's functions.
        damping: this and what follows as of `DTRAK`.
        dimension: of a projection.
        projection: which one.
        precision: of products.
        layers: that are looked at.
        seed: of the projection.
    """
    return JourneyInfluence(
        name="journey_trak",
        sampler=sampler,
        guidance=guidance,
        gradient=function,
        **kernel(damping, dimension, projection, precision, layers, seed),
    )


@dataclass(frozen=True, kw_only=True)
class JourneyInfluence(Influence):
    """Influence on the loss along the journeys of generated queries.

    Attributes:
        sampler: how the queries were generated.
        guidance: that they were generated with.
    """

    sampler: Sampler = field(default_factory=Sampler)
    guidance: float = 1.0

    def _unfitted(self, task: Task, data: Data, batch_size: int) -> FittedInfluence:
        loss = task.loss
        if not isinstance(loss, Denoising):
            raise TaskError(
                "journey_trak follows the sampling of a diffusion model: make the task with "
                "fb.losses.Denoising(...)"
            )
        journey = Journey(loss, self.sampler, self.guidance, self.gradient)
        return super()._unfitted(task.asking(journey), data, batch_size)


@dataclass(frozen=True)
class Journey:
    """Minus the loss of the model's guesses along the sampling of a generated image.

    Attributes:
        loss: of the task.
        sampler: of the images.
        guidance: of the images.
        function: `"loss"`, or a function of the noise that the network sees.
    """

    loss: Denoising
    sampler: Sampler
    guidance: float = 1.0
    function: str = "loss"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """`[b]`.

        Raises:
            DataError: sampling from the keys does not lead to the images.
        """
        values = []
        for level, guess in self.guesses(model, batch):
            values.append(self._value(model, {**batch, "image": guess}, level))
        return -torch.stack(values).mean(0)

    @torch.no_grad()
    def guesses(self, model: nn.Module, batch: Any) -> list[tuple[Level, Tensor]]:
        """Levels, falling, and the clean image that the model guessed there.

        Raises:
            DataError: sampling from the keys does not lead to the images.
        """
        require_batch(batch)
        image, keys, without = batch["image"], batch["key"], batch.get("without")
        guided = Guided(model, self.loss, batch.get("condition"), self.guidance, without)
        start = self.sampler.start(self.loss, keys, tuple(image.shape[1:])).to(image)
        levels, found, state = self.sampler.levels(self.loss.schedule), [], start
        way = self.sampler.path(guided, start, keys)
        for level, (_, ahead) in zip(levels, way, strict=True):
            clean = guided.clean(state, level)
            found.append((level, clean.clamp(-1, 1) if self.sampler.clip else clean))
            state = ahead
        missed = (state - image).flatten(1).square().mean(1).sqrt()
        if (missed > MISSED).any():
            shown = ", ".join(str(key) for key in keys[missed > MISSED].tolist()[:5])
            raise DataError(
                f"sampling from keys {shown} ends up to {missed.max().item():.3g} from the images: "
                "queries of journey_trak must be generated from Sampler.start(loss, keys, shape) "
                "with sampler= and guidance="
            )
        return found

    def _value(self, model: nn.Module, batch: Any, level: Level) -> Tensor:
        point = Point(level, 0)
        noise = self.loss.noise_of(batch, point)
        noisy = self.loss.noisy(batch, point, noise)
        said = self.loss.predicted(model, noisy, level, batch)
        if self.function != "loss":
            seen = self.loss.seen(noisy, said, level)
            return SUMMARIES[self.function](seen).flatten(1).mean(1)
        error = (said - self.loss.target(batch["image"], noise, level)).square()
        return self.loss.schedule.weight(level) * error.flatten(1).mean(1)
