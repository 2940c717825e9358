"""Concept-TRAK: the configuration, what is asked, and the fitted state."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from forebear.curvature import Damping, Dense, NonzeroRelative, Whole
from forebear.curvature.base import QUERY_BYTES
from forebear.data import Data
from forebear.errors import DataError, TaskError
from forebear.executors import Executor
from forebear.gradients import joined
from forebear.methods.concept_trak.steering import Posterior, Slider, SteeredStream, stops
from forebear.methods.influence import FittedInfluence, Influence
from forebear.methods.unit_points import UnitStream
from forebear.plan import make_plan
from forebear.projections import SJLT, ProjectedStream
from forebear.stream import Stream
from forebear.task import Task
from forebear.tasks.diffusion import Denoising
from forebear.tasks.images import keys_of
from forebear.tasks.sampling import Sampler
from forebear.tasks.schedules import Discrete, Level

Training = Literal["posterior", "loss", "square_norm", "absolute"]
Scope = Literal["global", "local", "image", "whole"]

PATH = Sampler(steps=50, randomness=0.1)
RIDGE = NonzeroRelative(10.0)

WANTED: dict[str, tuple[str, ...]] = {
    "global": ("condition", "without", "key"),
    "local": ("condition", "without", "key"),
    "image": ("condition", "without", "key", "image"),
    "whole": ("image", "condition", "key"),
}
"""What queries of each scope have."""


def concepts(
    condition: Tensor, without: Tensor, *, keys: Any = None, image: Tensor | None = None
) -> dict[str, Tensor]:
    """A dataset of queries: concepts, as what a condition says and another does not.

    Args:
        condition: `[q, ...]` that images are made under.
        without: `[q, ...]` the same with the concept left out, or with another in its place.
        keys: integers `[q]` of the noise that images were drawn from, for `scope="local"`;
            positions when left out.
        image: `[q, ...]` for `scope="image"`.

    Raises:
        DataError: shapes do not agree, or a query asks for nothing.
    """
    if condition.shape != without.shape:
        raise DataError(
            f"condition is of shape {tuple(condition.shape)} and without of "
            f"{tuple(without.shape)}: give each query both, in the same form"
        )
    same = (condition == without).flatten(1).all(1) if condition.ndim > 1 else condition == without
    if same.any():
        raise DataError(
            f"query {int(same.nonzero()[0])} has the same condition with the concept and without: "
            "leave something out"
        )
    # Several concepts of one image are asked for with one key.
    own = keys_of(keys, len(condition), repeated=True)
    if image is not None and len(image) != len(condition):
        raise DataError(f"{len(condition)} conditions and {len(image)} images: give one each")
    batch = {"condition": condition, "without": without, "key": own}
    return batch if image is None else {**batch, "image": image}


def ConceptTRAK(
    *,
    training: Training = "posterior",
    scope: Scope = "global",
    draws: int = 256,
    strength: float = 7.5,
    sampler: Sampler = PATH,
    levels: int | tuple[Level, ...] | None = None,
    inversion: bool | None = None,
    normalise: bool | None = None,
    dimension: int | None = 2048,
    damping: float | Damping = RIDGE,
    layers: tuple[str, ...] | None = None,
    seed: int = 0,
) -> "ConceptInfluence":
    """Which training images taught a conditional diffusion model one concept.

    `g_cᵀ (GᵀG / n + λI)⁻¹ g_i` with gradients of following two rewards: that of a training image
    leads to the image (posterior sampling), that of a query leads from a condition without the
    concept to one with it (a concept slider). Queries are those of `concepts`.

    Args:
        training: what is differentiated on training images: `"posterior"`, the task's own `"loss"`,
            or functions of the noise that the model sees: its `"square_norm"` (D-TRAK) or mean
            `"absolute"` value.
        scope: `"global"`: the concept in all that the model makes under the condition; `"local"`:
            in the image made from the noise of the query's key; `"image"`: in the query's image;
            `"whole"`: no concept but all of the query's image, to compare with: queries are
            images, and steered like training images.
        draws: noisy images that a concept's gradient is averaged over.
        strength: of the concept slider; scales all scores of a query.
        sampler: the model's way to images that those draws are taken from.
        levels: of noise in training images; those of the task's loss when None.
        inversion: noisy training images come from their own way back to noise, not from fresh
            noise; when None, where that can be: with `training="posterior"`, a `Discrete` schedule
            and no `levels`.
        normalise: scale the gradient of every noisy image to unit length before averaging; when
            None, where conditions are sequences of embeddings `[n, tokens, d]`, as of text.
        dimension: of the projection; None compares whole gradients.
        damping: λ; a number is relative to the mean eigenvalue.
        layers: restrict the method to these layers.
        seed: of draws and the projection.
    """
    return ConceptInfluence(
        name="concept_trak",
        gradient="loss" if training == "posterior" else training,
        training=training,
        scope=scope,
        draws=draws,
        strength=strength,
        sampler=sampler,
        levels=levels,
        inversion=inversion,
        unit=normalise,
        curvature=Whole(Dense(kind="fisher")),
        projection=None if dimension is None else SJLT(dimension),
        damping=damping,
        layers=layers,
        seed=seed,
    )


@dataclass(frozen=True, kw_only=True)
class ConceptInfluence(Influence):
    """Influence with rewards in place of losses; see `ConceptTRAK`.

    Attributes:
        training: what is differentiated on training images.
        scope: whose way to images a concept is looked at on.
        draws: noisy images of a query.
        strength: of the concept slider.
        sampler: the model's way to images.
        levels: of noise in training images.
        inversion: noisy training images from their own way back to noise; None where that can be.
        unit: gradients of noisy images of unit length; None decides by the conditions.
    """

    training: Training = "posterior"
    scope: Scope = "global"
    draws: int = 256
    strength: float = 7.5
    sampler: Sampler = field(default=PATH)
    levels: int | tuple[Level, ...] | None = None
    inversion: bool | None = None
    unit: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draws < 1:
            raise TaskError(f"draws is {self.draws}: it must be at least 1")
        if not stops(self.sampler):
            raise TaskError("a way to images of one step has no noisy images: use more steps")
        if self.inversion and (self.training != "posterior" or self.levels is not None):
            raise TaskError(
                "inversion=True takes noisy images from the way back to noise, at levels of its "
                "own and without a target: use training='posterior' and leave out levels="
            )
        if self.scope == "whole" and self.training != "posterior":
            raise TaskError(
                f"training is {self.training!r} and scope 'whole', which steers queries like "
                "training images: use training='posterior', or dtrak for whole images"
            )

    def fit(
        self,
        task: Task,
        train: Any,
        *,
        ids: Any = None,
        batch_size: int = 512,
        executor: Executor | None = None,
    ) -> "FittedConceptInfluence":
        """Gradients of all training images, and their second moments.

        Args:
            task: its loss is a `fb.losses.Denoising`; the network is told a condition.
            train: dataset of `forebear.tasks.diffusion.images` with conditions.
            ids: a stable id for each example; positions when left out.
            batch_size: noisy images at a time; changes no score beyond rounding.
            executor: where gradients of training images are worked out; in this process when None.

        Raises:
            TaskError: the loss is another one, or images have no conditions.
        """
        fitted = super().fit(task, train, ids=ids, batch_size=batch_size, executor=executor)
        assert isinstance(fitted, FittedConceptInfluence)
        return fitted

    def restore(
        self, task: Task, train: Data, tensors: dict[str, Tensor]
    ) -> "FittedConceptInfluence":
        """From saved tensors."""
        fitted = super().restore(task, train, tensors)
        assert isinstance(fitted, FittedConceptInfluence)
        return fitted

    def _unfitted(self, task: Task, data: Data, batch_size: int) -> "FittedConceptInfluence":
        loss = task.loss
        if not isinstance(loss, Denoising):
            raise TaskError(
                f"{self.name} steers the noise that a diffusion model sees, and the task's loss is "
                f"{getattr(loss, 'name', loss)!r}: use fb.losses.Denoising"
            )
        if "condition" not in data.batch(slice(0, 1)):
            raise TaskError(
                f"{self.name} compares conditions, and the training images have none: pass "
                "condition= to images"
            )
        if self.levels is not None:
            task = Task(
                task.model,
                loss.at(self.levels),
                measure=task.measure,
                layers=task.layers,
                checkpoints=task.checkpoints,
                collate=task.collate,
            )
        if self.layers is not None:
            task = task.select(self.layers)
        plan = make_plan(task, data)
        return FittedConceptInfluence(self, task, data, plan, batch_size=batch_size)


class FittedConceptInfluence(FittedInfluence):
    """Gradients of training images, kept where they fit, and their second moments.

    Scores are `[query, train]`, positive where the training image taught the model the concept.
    Self-influence is that of the training images' own gradients.
    """

    def __init__(
        self, method: ConceptInfluence, task: Task, train: Data, plan: Any, *, batch_size: int
    ) -> None:
        super().__init__(method, task, train, plan, batch_size=batch_size)
        assert isinstance(task.loss, Denoising)
        self.objective: Denoising = task.loss
        one = train.batch(slice(0, 1))
        told = one["condition"]
        texts = told.ndim == 3 and told.is_floating_point()
        self.unit = texts if method.unit is None else method.unit
        self.posterior = Posterior(self.objective, method.sampler if self.inverted else None)
        self.slider = Slider(
            objective=self.objective,
            sampler=method.sampler,
            draws=method.draws,
            strength=method.strength,
            scope=method.scope,
            seed=method.seed,
            shape=tuple(one["image"].shape[1:]),
            dtype=one["image"].dtype,
        )

    @property
    def inverted(self) -> bool:
        """Whether noisy training images come from their own way back to noise."""
        method = self.method
        assert isinstance(method, ConceptInfluence)
        if method.inversion is not None:
            return method.inversion
        free = method.training == "posterior" and method.levels is None
        return free and isinstance(self.objective.schedule, Discrete)

    def stream(
        self, i: int, data: Data, executor: Executor | None = None
    ) -> Stream | ProjectedStream:
        """The gradients of training images at checkpoint i."""
        method = self.method
        assert isinstance(method, ConceptInfluence)
        if method.training == "posterior":
            return self._projected(i, self._steered(data, self.posterior, executor))
        kind = UnitStream if self.unit else Stream
        return self._projected(i, kind(self.task, self.plan, data, self.batch_size, executor))

    def details(self) -> dict[str, Any]:
        """Also whether gradients were scaled to unit length, and images inverted."""
        return {**super().details(), "normalised": self.unit, "inverted": self.inverted}

    def _queries(self, queries: Any, ids: Any) -> Data:
        data = super()._queries(queries, ids)
        one = data.batch(slice(0, 1))
        wanted = list(WANTED[self.slider.scope])
        missing = [name for name in wanted if not hasattr(one, "keys") or name not in one]
        if missing:
            maker = "forebear.methods.concept_trak.concepts(condition, without, keys=, image=)"
            if self.slider.scope == "whole":
                maker = "forebear.tasks.diffusion.images(pixels, condition)"
            raise DataError(f"queries lack {', '.join(missing)}: make them with {maker}")
        return data

    def _groups(self, queries: Data) -> Iterator[slice]:
        each = 4 * self._feature_size() * len(self.moments)
        step = max(1, min(len(queries), QUERY_BYTES // each))
        for start in range(0, len(queries), step):
            yield slice(start, min(start + step, len(queries)))

    def _prepare(self, i: int, group: Data) -> tuple[Any, Tensor]:
        """Gradients of concepts, as the curvature wants them."""
        with self.task.at(self.query_moments[i]):
            reward = self.posterior if self.slider.scope == "whole" else self.slider
            stream = self._projected(i, self._steered(group, reward, None))
            parts = [g for _, _, g in stream.gradients(self.query_function, "concepts")]
        return self.curvatures[i].prepare(joined(parts)), torch.ones(())

    def _steered(
        self, data: Data, reward: Posterior | Slider, executor: Executor | None
    ) -> SteeredStream:
        return SteeredStream(
            self.task, self.plan, data, self.batch_size, executor, reward=reward, unit=self.unit
        )

    def _projected(self, i: int, stream: Stream) -> Stream | ProjectedStream:
        if self.method.projection is None:
            return stream
        return ProjectedStream(stream, self.projections[i], self.feature_plan)
