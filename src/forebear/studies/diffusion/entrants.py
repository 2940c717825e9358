"""Who takes part in the study of diffusion models, and with which settings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from forebear import methods
from forebear.curvature import NonzeroRelative
from forebear.data import Data
from forebear.errors import ForebearError
from forebear.studies.diffusion import likeness
from forebear.studies.diffusion.models import Trained
from forebear.task import Task
from forebear.tasks.diffusion import Denoising
from forebear.tasks.schedules import Discrete

RIDGES = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
"""Multiples of the mean eigenvalue that is not zero; the fixed rule is 1."""

FIXED = RIDGES.index(1.0)

NEAR = 50
"""Timestep at which images are compared by their hidden states and by softmax weights."""


@dataclass(frozen=True)
class Field:
    """What all entrants are scored on.

    Attributes:
        trained: the model, its queries and ground truth.
    """

    trained: Trained

    @property
    def train(self) -> Data:
        """The training images."""
        return self.trained.subject.train

    @property
    def images(self) -> Tensor:
        """`[n, c, h, w]`."""
        return self.train.batch(slice(None))["image"]

    def task(self, loss: Denoising | None = None) -> Task:
        """The model with the loss that is attributed, or with another."""
        return Task(self.trained.model, loss or self.shared)

    @cached_property
    def shared(self) -> Denoising:
        """The loss with one noise for all images, which is how the published methods compare."""
        loss = self.trained.subject.loss
        return Denoising(
            loss.schedule,
            loss.prediction,
            levels=loss.levels,
            draws=loss.draws,
            noise="shared",
            call=loss.call,
        )

    def rows(self, entrant: "Entrant") -> Tensor:
        """Positions of the queries that an entrant scores, `[q]`."""
        subject = self.trained.subject
        most = subject.few if entrant.few else None
        groups = [g for name, g in subject.groups.items() if name in entrant.groups]
        return torch.cat([torch.arange(g.start, g.stop)[:most] for g in groups])

    @cached_property
    def encoder(self) -> Callable[[Tensor], Tensor]:
        """Hidden states of a classifier of the training images."""
        return likeness.encoder(self.trained.subject.pictures)


Score = Callable[[Field, Data], Sequence[Tensor]]
"""Scores `[q, n]` of queries, one for each of `RIDGES` where a method has a ridge."""


@dataclass(frozen=True)
class Entrant:
    """One line of the study.

    Attributes:
        key: its name in tables.
        label: for people.
        score: gives its scores.
        method: registered name; empty for what is no method of the library.
        few: whether it pays for every query, so that it gets the first of each group only.
        groups: of queries that it can be asked about.
        only: the task it takes part in; empty for all.
    """

    key: str
    label: str
    score: Score
    method: str = ""
    few: bool = False
    groups: tuple[str, ...] = ("validation", "generated")
    only: str = ""


def absent(entrant: Entrant, field: Field) -> str | None:
    """Why an entrant cannot take part; None when it can."""
    if entrant.method and entrant.method not in methods.METHODS:
        return f"this version has no method {entrant.method!r}"
    if entrant.only and entrant.only != field.trained.subject.name:
        return f"takes part in {entrant.only} only"
    return None


def _method(name: str, **options: Any) -> Score:
    """A registered method with fixed options."""

    def score(field: Field, queries: Data) -> list[Tensor]:
        fitted = methods.get(name, **options).fit(field.task(), field.train)
        return [fitted.score(queries).values]

    return score


def _ridged(name: str, **options: Any) -> Score:
    """A registered method at every ridge, from one fit."""

    def score(field: Field, queries: Data) -> list[Tensor]:
        return _at_ridges(methods.get(name, **options), field, queries)

    return score


def _relative(field: Field, queries: Data) -> list[Tensor]:
    """TRAK's kernel over the length of the step in parameters."""
    kernel = methods.get("dtrak", function="loss")
    return _at_ridges(replace(kernel, normalise="relative_parameters"), field, queries)


def _journey(field: Field, queries: Data) -> list[Tensor]:
    method = methods.get("journey_trak", sampler=field.trained.subject.sampler)
    return _at_ridges(method, field, queries)


def _at_ridges(method: Any, field: Field, queries: Data) -> list[Tensor]:
    fitted = method.fit(field.task(), field.train)
    return [fitted.with_damping(NonzeroRelative(ridge)).score(queries).values for ridge in RIDGES]


def _nda(field: Field, queries: Data) -> Sequence[Tensor]:
    schedule = field.trained.subject.loss.schedule
    options: dict[str, Any] = {"patch": 5, "timesteps": (NEAR,)}
    if not isinstance(schedule, Discrete):
        options |= {"schedule": schedule, "timesteps": (0.75,)}
    return _method("nda", **options)(field, queries)


def _similarity(field: Field, queries: Data) -> list[Tensor]:
    schedule = field.trained.subject.loss.schedule
    level = NEAR if isinstance(schedule, Discrete) else 0.1
    task = field.task(field.shared.at((level,)))
    return [methods.get("similarity").fit(task, field.train).score(queries).values]


def _images(compare: Callable[[Tensor, Tensor], Tensor]) -> Score:
    return lambda field, queries: [compare(queries.batch(slice(None))["image"], field.images)]


def _embedding(field: Field, queries: Data) -> list[Tensor]:
    embed = field.encoder
    return [likeness.cosine(embed(queries.batch(slice(None))["image"]), embed(field.images))]


def _softmax(field: Field, queries: Data) -> list[Tensor]:
    batch, schedule = queries.batch(slice(None)), field.trained.subject.loss.schedule
    level = NEAR if isinstance(schedule, Discrete) else 0.75
    return [
        likeness.whole_image_softmax(batch["image"], field.images, batch["key"], schedule, level)
    ]


def _mucs(**options: Any) -> Score:
    def score(field: Field, queries: Data) -> list[Tensor]:
        flat = hasattr(field.trained.model, "hidden")
        layers = ("hidden.*",) if flat else ("blocks.*.wide", "blocks.*.narrow")
        method = methods.get("mucs", learning_rate=3e-4, layers=layers, **options)
        return [method.fit(field.task(), field.train).score(queries).values]

    return score


ABLATED = "digits-edm"
"""The task on which MUCS is taken apart."""

ENTRANTS = (
    Entrant("random", "Random", _method("random"), "random"),
    Entrant("pixels", "Pixel distance", _images(likeness.pixel_closeness)),
    Entrant("pixels_cosine", "Pixel cosine", _images(likeness.cosine)),
    Entrant("embedding", "Embedding cosine", _embedding),
    Entrant("hidden", "Hidden state cosine", _similarity, "similarity"),
    Entrant("softmax", "Whole-image softmax", _softmax),
    Entrant("nda", "NDA, 5 × 5", _nda, "nda"),
    Entrant("graddot", "GradDot", _method("graddot"), "graddot"),
    Entrant("gradcos", "GradCos", _method("gradcos"), "gradcos"),
    Entrant("trak", "TRAK", _ridged("dtrak", function="loss"), "trak"),
    Entrant("relative", "Relative influence", _relative, "relatif"),
    Entrant("dtrak", "D-TRAK", _ridged("dtrak"), "dtrak"),
    Entrant("das_linear", "DAS, linear", _ridged("das", form="linear"), "das"),
    Entrant("das", "DAS, squared", _ridged("das"), "das"),
    Entrant("journey", "Journey-TRAK", _journey, "journey_trak", groups=("generated",)),
    Entrant("abu", "AbU+, linear", _method("abu", query_draws=1024), "abu"),
    Entrant("abu_step", "AbU+, one step", _method("abu", mode="step"), "abu", few=True),
    Entrant(
        "abu_diagonal",
        "AbU, linear",
        _method("abu", curvature="diagonal", query_draws=1024),
        "abu",
    ),
    Entrant("mucs", "MUCS", _mucs(), "mucs", few=True),
    *(
        Entrant(f"mucs_{key}", f"MUCS, {text}", _mucs(**options), "mucs", few=True, only=ABLATED)
        for key, text, options in (
            ("100", "100 levels", {"levels": 100}),
            ("raw", "difference", {"ratio": False}),
            ("fresh", "fresh noise", {"consistent": False}),
            ("forget", "no retaining", {"retain": False}),
            ("free", "no bound", {"clamp": False}),
        )
    ),
)

PAIRS = (("mucs", "das"), ("das", "pixels"), ("das", "abu"))
"""Members of the ensembles."""


def score(entrant: Entrant, field: Field, queries: Data) -> Tensor:
    """All scores of an entrant, `[ridges or 1, q, n]`.

    Raises:
        ForebearError: the method refuses this task.
    """
    found = entrant.score(field, queries)
    for values in found:
        if not bool(torch.isfinite(values).all()):
            raise ForebearError(f"{entrant.label} has scores that are NaN or infinite")
    return torch.stack([values.detach().float().cpu() for values in found])
