"""A model customised on a few pictures of something new: who names these pictures?"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from forebear import methods, metrics
from forebear.curvature import NonzeroRelative
from forebear.data import Data
from forebear.executors import Executor, InProcess
from forebear.studies.base import Cell, Finding, StudyResult, Table, fingerprint
from forebear.studies.diffusion import likeness
from forebear.studies.diffusion.concepts import RIDGE
from forebear.studies.figure import FAINT, PALETTE, figure
from forebear.studies.jobs import SCORING, TRAINING, Found, Job, TimedPieces, heard, refusal
from forebear.task import Task
from forebear.training.recipe import Recipe
from forebear.zoo import concepts, customised
from forebear.zoo.pictures import Pictures

TOP = 10

DIMENSION = 2048
"""That gradients are projected to for kernels."""

SUMMARY = (
    "A network was trained on {n} pictures of rings, plusses and crosses, and then customised on "
    "{exemplars} pictures of a new shape, for each of {glyphs} new shapes. Methods are asked which "
    "of all these pictures count for {queries} pictures of the new shape that it made. The "
    "customer's pictures are the right answer, all others are distractors."
)

Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Made:
    """A customised model and what it made.

    Attributes:
        task: the model and the loss that is attributed.
        data: all training pictures, the customer's last.
        queries: pictures of the new shape.
        embed: hidden states of a classifier of the old shapes.
        draws: noisy images that the gradient of a concept is averaged over.
    """

    task: Task
    data: customised.Customised
    queries: Data
    embed: Embed
    draws: int

    def shown(self) -> tuple[Tensor, Tensor]:
        """Pixels of queries and of training pictures."""
        return self.queries.batch(slice(None))["image"], self.data.train.batch(slice(None))["image"]


Ranking = Callable[[Made], Tensor]
"""Scores `[q, n]`."""


@dataclass(frozen=True)
class Row:
    """One way to rank.

    Attributes:
        key: its name in tables.
        label: for people.
        rank: gives the scores.
        method: registered name; empty for what is no method of the library.
    """

    key: str
    label: str
    rank: Ranking
    method: str = ""


def _pixels(made: Made) -> Tensor:
    return likeness.pixel_closeness(*made.shown())


def _embedding(made: Made) -> Tensor:
    return likeness.cosine(*(made.embed(pixels) for pixels in made.shown()))


def _method(name: str, **options: Any) -> Ranking:
    def rank(made: Made) -> Tensor:
        fitted = methods.get(name, **options).fit(made.task, made.data.train)
        return fitted.score(made.queries).values

    return rank


def _kernel(name: str, **options: Any) -> Ranking:
    return _method(name, damping=NonzeroRelative(RIDGE), dimension=DIMENSION, **options)


def _slider(**options: Any) -> Ranking:
    def rank(made: Made) -> Tensor:
        method = methods.get("concept_trak", draws=made.draws, **options)
        fitted = method.fit(made.task, made.data.train)
        return fitted.score(customised.asked(made.queries)).values

    return rank


ROWS = (
    Row("random", "Random", _method("random"), "random"),
    Row("pixels", "Pixel distance", _pixels),
    Row("embedding", "Embedding cosine", _embedding),
    Row("nda", "NDA, 5 × 5", _method("nda", patch=5, timesteps=(50,)), "nda"),
    Row("graddot", "GradDot", _method("graddot"), "graddot"),
    Row("gradcos", "GradCos", _method("gradcos"), "gradcos"),
    Row("trak", "TRAK", _kernel("dtrak", function="loss"), "trak"),
    Row("dtrak", "D-TRAK", _kernel("dtrak"), "dtrak"),
    Row("das", "DAS, squared", _kernel("das"), "das"),
    Row("abu", "AbU+, linear", _method("abu", query_draws=1024), "abu"),
    Row("mucs", "MUCS", _method("mucs", learning_rate=3e-4, layers=("hidden.*",)), "mucs"),
    Row("slider_trak", "Concept-TRAK, loss", _slider(training="loss"), "concept_trak"),
    Row("slider", "Concept-TRAK", _slider(), "concept_trak"),
    Row("slider_local", "Concept-TRAK, local", _slider(scope="local"), "concept_trak"),
    Row("slider_unit", "Concept-TRAK, unit length", _slider(normalise=True), "concept_trak"),
    Row(
        "slider_local_unit",
        "Concept-TRAK, local, unit length",
        _slider(scope="local", normalise=True),
        "concept_trak",
    ),
)


def run(out: Path, *, quick: bool, seed: int, executor: Executor | None = None) -> StudyResult:
    """Train, customise, rank by every method, and write the folder."""
    glyphs = tuple(customised.GLYPHS)[: 1 if quick else None]
    every = {glyph: customised.load(glyph, train=100 if quick else 1000) for glyph in glyphs}
    first = every[glyphs[0]]
    recipe = customised.recipe(**({"epochs": 3} if quick else {}))
    steps, each, draws = (5, 1, 9) if quick else (1000, 2, 90)
    settings = {
        "task": "customised",
        "recipe": recipe.fingerprint,
        "train": {glyph: data.train.fingerprint for glyph, data in every.items()},
        "steps": steps,
        "queries of a bar": each,
        "draws": draws,
        "seed": seed,
        "forebear": version("forebear"),
    }
    pieces = TimedPieces(out / "pieces", settings, executor or InProcess())
    base = _stored(Job(TRAINING, "model", partial(_trained, recipe, first.old, seed)), pieces)
    again = {
        glyph: Job(TRAINING, f"model-{glyph}", partial(_customised, base, data, steps))
        for glyph, data in every.items()
    }
    pieces.make(again.values(), "customising")
    embed, made = _encoder(first), []
    for glyph, data in every.items():
        model = _stored(again[glyph], pieces)
        queries = customised.generate(model, each=each)
        made.append(Made(Task(model, concepts.loss()), data, queries, embed, draws))
    found, seconds, skipped = _ranked(made, pieces)
    settings |= {"quick": quick, "executor": str(pieces.executor)}
    return _result(out, made, found, seconds, skipped, settings)


def _result(
    out: Path,
    made: list[Made],
    found: dict[str, list[Tensor]],
    seconds: dict[str, float],
    skipped: dict[str, str],
    settings: dict[str, Any],
) -> StudyResult:
    data, count = made[0].data, sum(len(one.queries) for one in made)
    missing = Table("missing", "What took no part", ["ranking", "why"], list(skipped.items()))
    result = StudyResult(
        name="diffusion",
        title="Attribution of diffusion models: a customised model",
        summary=SUMMARY.format(
            n=len(data.old), exemplars=int(data.exemplars.sum()), glyphs=len(made), queries=count
        ),
        settings=settings,
        tables=[_table(made, found, seconds), *([missing] if skipped else [])],
        findings=findings({key: recalls(made, scores) for key, scores in found.items()}),
        figures={"recall": _draw(made, found, out)},
    )
    result.save(out)
    return result


def _stored(job: Job, pieces: TimedPieces) -> nn.Module:
    """A model whose training is done once."""
    model = customised.build()
    model.load_state_dict(pieces.read(job)[0])
    return model.eval()


def _trained(recipe: Recipe, data: Data, seed: int) -> Found:
    return dict(recipe.train(data, seed=seed).state_dict()), {}


def _customised(base: nn.Module, data: customised.Customised, steps: int) -> Found:
    return dict(customised.customise(base, data, steps=steps).state_dict()), {}


def _encoder(data: customised.Customised) -> Embed:
    """Of a classifier of the shapes that the model knew before it was customised."""
    labels = data.labels[~data.exemplars][:, 0]
    old = Pictures(
        name="customised",
        train=data.old,
        queries=data.old,
        labels=labels,
        query_labels=labels,
        classes=concepts.SHAPES,
    )
    return likeness.encoder(old)


def _ranked(
    made: list[Made], pieces: TimedPieces
) -> tuple[dict[str, list[Tensor]], dict[str, float], dict[str, str]]:
    """Scores of every row for every model, the time of the processor, and who is missing."""
    jobs = {row.key: [_job(row, one) for one in made] for row in ROWS}
    pieces.make([job for each in reversed(jobs.values()) for job in each], "rankings")
    found: dict[str, list[Tensor]] = {}
    seconds: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for key, each in jobs.items():
        known = [pieces.read(job) for job in each]
        reason = refusal(known)
        if reason is not None:
            skipped[key] = reason
            continue
        found[key] = [tensors["scores"] for tensors, _ in known]
        seconds[key] = sum(about["seconds"] for _, about in known)
    return found, seconds, skipped


def _job(row: Row, one: Made) -> Job:
    name = f"scores-{one.data.glyph}-{row.key}-{fingerprint(row.label)}"
    return Job(SCORING, name, partial(heard, partial(_scores, row, one)))


def _scores(row: Row, one: Made) -> Found:
    return {"scores": row.rank(one).float()}, {}


def recalls(made: list[Made], scores: list[Tensor]) -> np.ndarray:
    """Share of the customer's pictures among the first ten, `[q]` of all models."""
    pairs = zip(made, scores, strict=True)
    return np.concatenate([metrics.recall_at(s, one.data.exemplars, TOP) for one, s in pairs])


def findings(recall: dict[str, np.ndarray]) -> list[Finding]:
    """What is claimed of rankings by concepts."""
    mean = {key: float(values.mean()) for key, values in recall.items()}
    judged = []
    if {"slider_trak", "trak"} <= set(mean):
        judged.append(
            Finding(
                "With the same training gradients, the concept finds more of the customer's "
                "pictures than the whole image.",
                f"recall of the first {TOP} higher by 0.1 with TRAK's gradients",
                f"{mean['slider_trak']:.2f} and {mean['trak']:.2f}",
                mean["slider_trak"] - mean["trak"] >= 0.1,
            )
        )
    if {"slider", "slider_unit"} <= set(mean):
        judged.append(
            Finding(
                "Concept-TRAK finds more of them with gradients of unit length.",
                "recall of Concept-TRAK higher with unit length",
                f"{mean['slider_unit']:.2f} and {mean['slider']:.2f}",
                mean["slider_unit"] > mean["slider"],
            )
        )
    likenesses = [key for key in ("pixels", "embedding", "nda") if key in mean]
    if likenesses and "slider_unit" in mean:
        best = max(likenesses, key=lambda key: mean[key])
        judged.append(
            Finding(
                "What the model learned says more than how alike pictures are.",
                "recall of Concept-TRAK with unit length above that of every likeness",
                f"{mean['slider_unit']:.2f}, and {mean[best]:.2f} of {best}",
                mean["slider_unit"] > mean[best],
            )
        )
    return judged


def _table(made: list[Made], found: dict[str, list[Tensor]], seconds: dict[str, float]) -> Table:
    rows: list[list[Cell]] = []
    for row in ROWS:
        if row.key not in found:
            continue
        scores = found[row.key]
        each = [
            metrics.recall_at(s, one.data.exemplars, TOP).mean()
            for one, s in zip(made, scores, strict=True)
        ]
        precision = [
            metrics.map_at(s, one.data.exemplars) for one, s in zip(made, scores, strict=True)
        ]
        mean = float(np.concatenate(precision).mean())
        rows.append(
            [row.label, float(np.mean(each)), mean, *map(float, each), round(seconds[row.key], 1)]
        )
    columns = ["method", f"recall at {TOP}", "mAP", *(one.data.glyph for one in made), "seconds"]
    first = made[0].data
    note = (
        f"Mean over {sum(len(one.queries) for one in made)} generated pictures, and recall by new "
        f"shape. {int(first.exemplars.sum())} of {len(first.exemplars)} training pictures are the "
        f"customer's; chance is {TOP / len(first.exemplars):.2f}. Seconds of the processor for all "
        "shapes."
    )
    return Table("recall", "Who names the customer's pictures", columns, rows, note)


def _draw(made: list[Made], found: dict[str, list[Tensor]], out: Path) -> str:
    shown = [row for row in ROWS if row.key in found][::-1]
    with figure(out, "recall", (9.2, 1.4 + 0.32 * len(shown))) as axes:
        for place, row in enumerate(shown):
            pairs = zip(made, found[row.key], strict=True)
            each = [metrics.recall_at(s, one.data.exemplars, TOP).mean() for one, s in pairs]
            axes.plot(each, [place] * len(each), "o", color=FAINT, markersize=5)
            axes.plot([np.mean(each)], [place], "o", color=PALETTE[0], markersize=8)
        axes.set_yticks(range(len(shown)), [row.label for row in shown])
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel(f"recall at {TOP} of the customer's pictures")
    return (
        f"Share of the customer's pictures among the first {TOP}: mean, and faint for every new "
        "shape."
    )
