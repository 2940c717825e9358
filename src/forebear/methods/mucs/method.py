"""MUCS: a diffusion model unlearns a query, and what that costs an image is its score."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forebear.data import Data, naming
from forebear.errors import DataError, TaskError
from forebear.executors import Executor
from forebear.methods.mucs.fitted import FittedMUCS
from forebear.methods.mucs.forgetting import Unlearning
from forebear.sharding import require_whole
from forebear.stream import BATCH
from forebear.task import Task
from forebear.tasks.diffusion import Denoising
from forebear.tasks.images import require_batch
from forebear.tasks.schedules import Continuous
from forebear.training.recipe import Recipe

EVERY = "*"
"""The pattern that asks for all layers."""


@dataclass(frozen=True, kw_only=True)
class MUCS:
    """Mirrored unlearning with noise-consistent skew, for denoising diffusion models.

    A copy of the model forgets the query: it climbs the query's loss, which is bounded by that of
    a network that knows nothing, while it goes on training on the training set. The score of a
    training image is by how much that raised its own loss `L`, at the same noise before and after:
    `mean over levels of (L_after − L_before) / (L_after + L_before + 1e-3)`, between -1 and 1.

    Losses are squared errors of the clean image with EDM's weight, whatever the network says.

    Attributes:
        levels: J noise scales at which images are compared; the paper has 100.
        keep: these are the share of a Karras grid from its noisy end.
        learning_rate: of AdamW while unlearning; a tenth of that of training is usual.
        weight_decay: of AdamW.
        batch_size: training examples, and draws of noise for the query, in a step.
        forget: weight of the query's loss against that of the training examples.
        stop: share of the bound at which unlearning ends; below 1 where the loss is bounded.
        window: batches that the query's loss is averaged over for that.
        max_steps: a run that has not stopped by then is reported and kept.
        layers: modules whose weight matrices change; the task's when None. Biases never do. All
            layers must be asked for with `("*",)`.
        retain: train on the training set while unlearning.
        clamp: bound the query's loss.
        consistent: compare an image before and after with the same noise, one tensor a level for
            all images; otherwise each has fresh noise of its own.
        ratio: divide differences of losses by their sums.
        null: the bound: a number; that of the untrained network of a `Recipe`; or, for None, that
            of the linear denoiser that knows only the deviation of the data, which an EDM network
            is before training.
        deviation: standard deviation of the data; the schedule's when None, or for timesteps that
            of the training pixels.
        location: mean of the logarithm of the noise scale while unlearning.
        spread: its standard deviation.
        seed: of batches and noise, which all queries share.
    """

    name: str = "mucs"
    levels: int = 10
    keep: float = 0.7
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    batch_size: int = 100
    forget: float = 0.2
    stop: float = 0.95
    window: int = 1
    max_steps: int = 1000
    layers: tuple[str, ...] | str | None = None
    retain: bool = True
    clamp: bool = True
    consistent: bool = True
    ratio: bool = True
    null: float | Recipe | None = None
    deviation: float | None = None
    location: float = -1.2
    spread: float = 1.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("levels", 1), ("batch_size", 1), ("window", 1), ("max_steps", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise TaskError(f"{name} is {value}: it must be a whole number from {least}")
        if not 0 < self.keep <= 1:
            raise TaskError(f"keep is {self.keep}: it is a share, above 0 and up to 1")
        for name in ("learning_rate", "forget", "stop"):
            if not 0 < getattr(self, name) < math.inf:
                raise TaskError(f"{name} is {getattr(self, name)}: it must be above 0 and finite")
        for name in ("weight_decay", "spread"):
            if not 0 <= getattr(self, name) < math.inf:
                raise TaskError(f"{name} is {getattr(self, name)}: it must be 0 or more and finite")
        if not math.isfinite(self.location):
            raise TaskError(f"location is {self.location}: it must be finite")
        if self.clamp and self.stop >= 1:
            raise TaskError(
                f"stop is {self.stop}: the query's loss is cut off at the bound and its mean stays "
                "below, so unlearning would never end; choose a share below 1, or clamp=False"
            )
        if self.deviation is not None and not 0 < self.deviation < math.inf:
            raise TaskError(f"deviation is {self.deviation}: it must be above 0 and finite")

    @property
    def unlearning(self) -> Unlearning:
        """How a query is forgotten."""
        return Unlearning(
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            batch_size=self.batch_size,
            forget=self.forget,
            stop=self.stop,
            window=self.window,
            max_steps=self.max_steps,
            retain=self.retain,
            clamp=self.clamp,
            location=self.location,
            spread=self.spread,
            seed=self.seed,
        )

    def fit(
        self,
        task: Task,
        train: Any,
        *,
        ids: Any = None,
        batch_size: int = BATCH,
        executor: Executor | None = None,
    ) -> FittedMUCS:
        """Losses of all training images at all levels: so many forward passes.

        `executor` works on these losses, and later on queries, so many together.

        Raises:
            TaskError: the task is no diffusion model, or the layers are none or all.
            DataError: the dataset has no images.
            NonFiniteError: a loss is NaN or infinite.
        """
        data = Data.of(train, ids=ids, collate=task.collate)
        fitted = self._unfitted(task, data, batch_size, executor)
        moments, keys = _moments(data, batch_size)
        fitted.order = keys.argsort(stable=True)
        fitted.deviation = self._deviation(task, moments)
        fitted.null = fitted.untrained_loss(moments[1].item())
        if not 0 < fitted.null < float("inf"):
            raise TaskError(f"null is {fitted.null}: the bound of the loss must be above 0")
        fitted.find_losses()
        return fitted

    def restore(self, task: Task, train: Data, tensors: dict[str, Tensor]) -> FittedMUCS:
        """From the saved losses."""
        fitted = self._unfitted(task, train, BATCH, None)
        fitted.before, fitted.order = tensors["before"], tensors["order"]
        fitted.deviation, fitted.null = tensors["deviation"].item(), tensors["null"].item()
        return fitted

    def _unfitted(
        self, task: Task, data: Data, batch_size: int, executor: Executor | None
    ) -> FittedMUCS:
        if not isinstance(task.loss, Denoising):
            raise TaskError(
                f"{type(task.loss).__name__} is not the loss of a diffusion model, which mucs "
                "unlearns: use forebear.losses.Denoising"
            )
        require_whole(task.model)
        names = self._trained(task)
        return FittedMUCS(self, task, data, names, batch_size=batch_size, executor=executor)

    def _trained(self, task: Task) -> tuple[str, ...]:
        """Names of the weight matrices that unlearning changes."""
        chosen = task if self.layers is None else task.select(self.layers)
        names = tuple(n for n, p in chosen.selected_parameters().items() if p.ndim > 1)
        every = [name for name, p in task.model.named_parameters() if p.ndim > 1]
        if not names:
            raise TaskError(
                f"layers={chosen.layers!r} have no weight matrix to unlearn with: name others"
            )
        if len(names) == len(every) and EVERY not in (chosen.layers or ()):
            raise TaskError(
                "unlearning would change every weight matrix of the model, which is not what the "
                "method does: name hidden layers, such as MUCS(layers=('hidden.*',)), or ask for "
                "all with layers=('*',)"
            )
        return names

    def _deviation(self, task: Task, moments: Tensor) -> float:
        schedule = task.objective.schedule  # type: ignore[attr-defined]
        if self.deviation is not None:
            return self.deviation
        if isinstance(schedule, Continuous):
            return schedule.deviation
        found = (moments[1] - moments[0].square()).clamp_min(0).sqrt().item()
        if found == 0:
            raise DataError("all training pixels are the same: there is nothing to attribute")
        return found


def _moments(data: Data, batch_size: int) -> tuple[Tensor, Tensor]:
    """Mean and mean square of the pixels `[2]`, and keys `[n]`."""
    sums, count, keys = torch.zeros(2, dtype=torch.float64), 0, []
    for rows, batch in data.batches(batch_size):
        with naming(data, rows):
            require_batch(batch)
        image = batch["image"]
        sums += torch.stack([image.double().sum(), image.double().square().sum()]).cpu()
        count += image.numel()
        keys.append(batch["key"].cpu())
    return sums / count, torch.cat(keys)
