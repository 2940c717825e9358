"""Who takes part in the study of diffusion models, and with which settings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from forebear import methods
from forebear.curvature import NonzeroRelative
from forebear.data import Data
from forebear.errors import ForebearError
from forebear.methods.diffusion_gradients import ridge_sweep
from forebear.studies.diffusion import likeness
from forebear.studies.diffusion.models import Trained
from forebear.studies.jobs import Found
from forebear.task import Task
from forebear.tasks.diffusion import Denoising
from forebear.tasks.schedules import Discrete
from forebear.types import Scores

RIDGES = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
"""Multiples of the mean eigenvalue that is not zero; the fixed rule is 1."""

FIXED = RIDGES.index(1.0)

NEAR = 50
"""Timestep at which images are compared by their hidden states and by softmax weights."""


@dataclass(frozen=True)
class Field:
    """What all entrants are scored on.

    Attributes:
        trained: the model and its queries.
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


Score = Callable[[Field, Data], Sequence[Scores | Tensor]]
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

    @property
    def settings(self) -> list[Any]:
        """What decides its scores on a task, for the name of the piece that keeps them."""
        if not isinstance(self.score, partial):
            return [self.method, self.score.__name__]
        options = {k: getattr(v, "__name__", v) for k, v in self.score.keywords.items()}
        return [self.method, self.score.func.__name__, options]


def absent(entrant: Entrant, field: Field) -> str | None:
    """Why an entrant cannot take part; None when it can."""
    if entrant.only and entrant.only != field.trained.subject.name:
        return f"takes part in {entrant.only} only"
    return None


def _method(field: Field, queries: Data, *, name: str, **options: Any) -> list[Scores]:
    """A registered method with fixed options."""
    return [methods.get(name, **options).fit(field.task(), field.train).score(queries)]


def _ridged(field: Field, queries: Data, *, name: str, **options: Any) -> list[Tensor]:
    """A registered method at every ridge."""
    return _at_ridges(methods.get(name, **options), field, queries)


def _relative(field: Field, queries: Data) -> list[Tensor]:
    """TRAK's kernel over the length of the step in parameters."""
    kernel = methods.get("dtrak", function="loss")
    return _at_ridges(replace(kernel, normalise="relative_parameters"), field, queries)


def _at_ridges(method: Any, field: Field, queries: Data) -> list[Tensor]:
    """From one fit and one pass for the gradients of queries."""
    fitted = method.fit(field.task(), field.train)
    return list(ridge_sweep(fitted, queries, [NonzeroRelative(ridge) for ridge in RIDGES]))


def _journey(field: Field, queries: Data) -> list[Tensor]:
    return _ridged(field, queries, name="journey_trak", sampler=field.trained.subject.sampler)


def _nda(field: Field, queries: Data, *, timestep: int = NEAR, scale: float = 0.75) -> list[Scores]:
    schedule = field.trained.subject.loss.schedule
    options: dict[str, Any] = {"patch": 5, "timesteps": (timestep,)}
    if not isinstance(schedule, Discrete):
        options |= {"schedule": schedule, "timesteps": (scale,)}
    return _method(field, queries, name="nda", **options)


def _similarity(field: Field, queries: Data) -> list[Scores]:
    schedule = field.trained.subject.loss.schedule
    level = NEAR if isinstance(schedule, Discrete) else 0.1
    task = field.task(field.shared.at((level,)))
    return [methods.get("similarity").fit(task, field.train).score(queries)]


def _pixels(
    field: Field, queries: Data, *, compare: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    return [compare(queries.batch(slice(None))["image"], field.images)]


def _embedding(field: Field, queries: Data) -> list[Tensor]:
    embed = field.encoder
    return [likeness.cosine(embed(queries.batch(slice(None))["image"]), embed(field.images))]


def _softmax(field: Field, queries: Data) -> list[Tensor]:
    batch, schedule = queries.batch(slice(None)), field.trained.subject.loss.schedule
    level = NEAR if isinstance(schedule, Discrete) else 0.75
    return [
        likeness.whole_image_softmax(batch["image"], field.images, batch["key"], schedule, level)
    ]


def _mucs(field: Field, queries: Data, **options: Any) -> list[Scores]:
    flat = hasattr(field.trained.model, "hidden")
    layers = ("hidden.*",) if flat else ("blocks.*.wide", "blocks.*.narrow")
    return _method(field, queries, name="mucs", learning_rate=3e-4, layers=layers, **options)


APART = "digits-edm"
"""The task on which MUCS is taken apart."""

ENTRANTS = (
    Entrant("random", "Random", partial(_method, name="random"), "random"),
    Entrant("pixels", "Pixel distance", partial(_pixels, compare=likeness.pixel_closeness)),
    Entrant("pixels_cosine", "Pixel cosine", partial(_pixels, compare=likeness.cosine)),
    Entrant("embedding", "Embedding cosine", _embedding),
    Entrant("hidden", "Hidden state cosine", _similarity, "similarity"),
    Entrant("softmax", "Whole-image softmax", _softmax),
    Entrant("nda", "NDA, 5 × 5", _nda, "nda"),
    Entrant("nda_late", "NDA, t = 400", partial(_nda, timestep=400), "nda", only="digits-eps"),
    Entrant("graddot", "GradDot", partial(_method, name="graddot"), "graddot"),
    Entrant("gradcos", "GradCos", partial(_method, name="gradcos"), "gradcos"),
    Entrant("trak", "TRAK", partial(_ridged, name="dtrak", function="loss"), "trak"),
    Entrant("relative", "Relative influence", _relative, "relatif"),
    Entrant("dtrak", "D-TRAK", partial(_ridged, name="dtrak"), "dtrak"),
    Entrant("das_linear", "DAS, linear", partial(_ridged, name="das", form="linear"), "das"),
    Entrant("das", "DAS, squared", partial(_ridged, name="das"), "das"),
    Entrant("journey", "Journey-TRAK", _journey, "journey_trak", groups=("generated",)),
    Entrant("abu", "AbU+, linear", partial(_method, name="abu", query_draws=1024), "abu"),
    Entrant("abu_step", "AbU+, one step", partial(_method, name="abu", mode="step"), "abu", True),
    Entrant(
        "abu_diagonal",
        "AbU, linear",
        partial(_method, name="abu", curvature="diagonal", query_draws=1024),
        "abu",
    ),
    Entrant("mucs", "MUCS", _mucs, "mucs", few=True),
    *(
        Entrant(f"mucs_{key}", f"MUCS, {text}", partial(_mucs, **options), "mucs", True, only=APART)
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


def score(entrant: Entrant, field: Field, queries: Data) -> Found:
    """All scores of an entrant, `[ridges or 1, q, n]`, and how unlearning went where it was done.

    Raises:
        ForebearError: the method refuses this task.
    """
    found = entrant.score(field, queries)
    for values in found:
        if not bool(torch.isfinite(_plain(values)).all()):
            raise ForebearError(f"{entrant.label} has scores that are NaN or infinite")
    first = found[0]
    settings = first.provenance.settings if isinstance(first, Scores) else {}
    about = {key: settings[key] for key in ("unlearning",) if key in settings}
    return {"scores": torch.stack([_plain(one).detach().float().cpu() for one in found])}, about


def _plain(values: Scores | Tensor) -> Tensor:
    return values.values if isinstance(values, Scores) else values
