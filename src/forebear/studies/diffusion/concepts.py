"""Which training images taught a model one of two concepts, where no image shows both."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebear import methods, metrics
from forebear.curvature import NonzeroRelative
from forebear.errors import ForebearError
from forebear.progress import track
from forebear.studies.base import Cell, Finding, Pieces, StudyResult, Table, fingerprint
from forebear.studies.diffusion import likeness
from forebear.studies.figure import FAINT, PALETTE, figure
from forebear.task import Task
from forebear.zoo import concepts
from forebear.zoo.concepts import Concepts

RIDGE = 10.0
"""A multiple of the mean eigenvalue that is not zero, for all kernels."""

TOP = 10

SUMMARY = (
    "{n} pictures show a ring, a plus or a cross, and a bar at one of three heights; no training "
    "picture shows a ring and a bar at the top. A network that is told both was trained on them. "
    "Methods say which pictures count for a query; shown is the share of the first ten that have "
    "the concept that was asked about, mean over both concepts of a query."
)


@dataclass(frozen=True)
class Trained:
    """The network and its pictures.

    Attributes:
        task: the network and the loss that is attributed.
        data: training pictures and queries.
        draws: noisy images that the gradient of a concept is averaged over.
    """

    task: Task
    data: Concepts
    draws: int


Ranking = Callable[[Trained, int], Tensor]
"""Scores `[q, n]` of the queries for one of their concepts."""


@dataclass(frozen=True)
class Row:
    """One way to rank.

    Attributes:
        key: its name in tables.
        asked: the query's side, for people.
        training: the training side, for people.
        rank: gives the scores.
        method: registered name; empty for likeness of pixels.
        whole: whether it ranks by the whole image, the same for both concepts.
    """

    key: str
    asked: str
    training: str
    rank: Ranking
    method: str = ""
    whole: bool = False


def _pixels(trained: Trained, concept: int) -> Tensor:
    one, other = (d.batch(slice(None))["image"] for d in (trained.data.queries, trained.data.train))
    return likeness.pixel_closeness(one, other)


def _whole(name: str, **options: Any) -> Ranking:
    def rank(trained: Trained, concept: int) -> Tensor:
        method = methods.get(name, damping=NonzeroRelative(RIDGE), **options)
        return method.fit(trained.task, trained.data.train).score(trained.data.queries).values

    return rank


def _slider(training: str, **options: Any) -> Ranking:
    def rank(trained: Trained, concept: int) -> Tensor:
        method = methods.get(
            "concept_trak",
            training=training,
            damping=NonzeroRelative(RIDGE),
            draws=trained.draws,
            **options,
        )
        queries = concepts.asked(trained.data, concept)
        return method.fit(trained.task, trained.data.train).score(queries).values

    return rank


WHOLE, SLIDER = "whole image", "concept slider"

ROWS = (
    Row("pixels", "pixel distance", "–", _pixels, whole=True),
    Row("trak", WHOLE, "loss (TRAK)", _whole("dtrak", function="loss"), "dtrak", whole=True),
    Row("dtrak", WHOLE, "square norm (D-TRAK)", _whole("dtrak"), "dtrak", whole=True),
    Row("das", WHOLE, "absolute value (DAS)", _whole("das", function="absolute"), "das", True),
    Row("slider_trak", SLIDER, "loss (TRAK)", _slider("loss"), "concept_trak"),
    Row("slider_dtrak", SLIDER, "square norm (D-TRAK)", _slider("square_norm"), "concept_trak"),
    Row("slider_das", SLIDER, "absolute value (DAS)", _slider("absolute"), "concept_trak"),
    Row("slider", SLIDER, "posterior sampling", _slider("posterior"), "concept_trak"),
    Row(
        "slider_local",
        "concept slider, from the query's noise",
        "posterior sampling",
        _slider("posterior", scope="local"),
        "concept_trak",
    ),
    Row(
        "slider_unit",
        SLIDER,
        "posterior sampling, unit length",
        _slider("posterior", normalise=True),
        "concept_trak",
    ),
    Row(
        "slider_inverted",
        SLIDER,
        "posterior sampling, inversion",
        _slider("posterior", inversion=True),
        "concept_trak",
    ),
    Row(
        "slider_both",
        SLIDER,
        "posterior sampling, both",
        _slider("posterior", normalise=True, inversion=True),
        "concept_trak",
    ),
)


def run(out: Path, *, quick: bool, seed: int) -> StudyResult:
    """Train the network, rank by every way, and write the folder."""
    data = concepts.load(train=120, each=2) if quick else concepts.load()
    recipe = concepts.recipe(epochs=5) if quick else concepts.recipe()
    settings = {
        "task": "concepts",
        "recipe": recipe.fingerprint,
        "train": data.train.fingerprint,
        "queries": data.queries.fingerprint,
        "draws": 8 if quick else 256,
        "seed": seed,
        "forebear": version("forebear"),
    }
    pieces = Pieces(out / "pieces", settings)
    model = recipe.build()
    model.load_state_dict(
        pieces.tensors("model", lambda: dict(recipe.train(data.train, seed=seed).state_dict()))
    )
    trained = Trained(Task(model.eval(), concepts.loss()), data, settings["draws"])
    found, skipped = _precisions(trained, pieces)
    result = StudyResult(
        name="diffusion",
        title="Attribution of diffusion models: two concepts in a picture",
        summary=SUMMARY.format(n=len(data.train)),
        settings={**settings, "quick": quick},
        tables=[_table(found, data), *([_skipped(skipped)] if skipped else [])],
        findings=findings(found, data.withheld.numpy()),
        figures={"precision": _draw(found, data, out)},
    )
    result.save(out)
    return result


def _precisions(trained: Trained, pieces: Pieces) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Precision of every way to rank by query, mean over both concepts, and who is missing."""
    found, skipped = {}, {}
    for row in track(ROWS, "rankings", total=len(ROWS)):
        if row.method and row.method not in methods.METHODS:
            skipped[row.key] = f"this version has no method {row.method!r}"
            continue

        def make(row: Row = row) -> dict[str, Tensor]:
            count = 1 if row.whole else 2
            return {"scores": torch.stack([row.rank(trained, c).float() for c in range(count)])}

        name = f"scores-{row.key}-{fingerprint(row.method, row.training)}"
        try:
            scores = pieces.tensors(name, make)["scores"].expand(2, -1, -1)
        except ForebearError as error:
            skipped[row.key] = str(error)
            continue
        found[row.key] = np.mean([precision(trained.data, scores[c], c) for c in (0, 1)], axis=0)
    return found, skipped


def precision(data: Concepts, scores: Tensor, concept: int) -> np.ndarray:
    """Share of the first ten that have the query's concept, `[q]`."""
    relevant = data.query_labels[:, concept, None] == data.labels[None, :, concept]
    return metrics.precision_at(scores, relevant, TOP)


def findings(found: dict[str, np.ndarray], withheld: np.ndarray) -> list[Finding]:
    """Claims about the withheld pair."""
    rows = {row.key: row for row in ROWS}
    mean = {key: float(values[withheld].mean()) for key, values in found.items()}
    whole = {key: value for key, value in mean.items() if rows[key].whole}
    judged = [
        Finding(
            "A ranking by whole images cannot find teachers of both concepts of a withheld pair.",
            "precision at most 0.50, for no training image has both",
            ", ".join(f"{rows[key].training} {value:.2f}" for key, value in whole.items()),
            all(value <= 0.5 for value in whole.values()),
        )
    ]
    if "slider" in mean:
        judged.append(
            Finding(
                "Concept sliders with the posterior-sampling loss find them.",
                "precision at least 0.80 on the withheld pair",
                f"{mean['slider']:.2f}",
                mean["slider"] >= 0.8,
            )
        )
    if {"slider_trak", "trak"} <= set(mean):
        gain = mean["slider_trak"] - mean["trak"]
        judged.append(
            Finding(
                "It is the question that makes the difference, not the training gradient.",
                "the slider higher by at least 0.25 with TRAK's gradients, on the withheld pair",
                f"{mean['slider_trak']:.2f} and {mean['trak']:.2f}",
                gain >= 0.25,
            )
        )
    return judged


def _table(found: dict[str, np.ndarray], data: Concepts) -> Table:
    withheld = data.withheld.numpy()
    rows: list[list[Cell]] = [
        [row.asked, row.training, float(values[~withheld].mean()), float(values[withheld].mean())]
        for row in ROWS
        if (values := found.get(row.key)) is not None
    ]
    base = [
        float((data.query_labels[:, c, None] == data.labels[None, :, c]).double().mean())
        for c in (0, 1)
    ]
    note = (
        f"Mean over {int((~withheld).sum())} queries of seen pairs and {int(withheld.sum())} of "
        f"the withheld one. Chance is {base[0]:.2f} for shapes and {base[1]:.2f} for bars."
    )
    columns = ["query", "training images", "seen pairs", "withheld pair"]
    return Table("precision", f"Precision of the first {TOP}", columns, rows, note)


def _skipped(reasons: dict[str, str]) -> Table:
    return Table("missing", "What took no part", ["ranking", "why"], list(reasons.items()))


def _draw(found: dict[str, np.ndarray], data: Concepts, out: Path) -> str:
    withheld = data.withheld.numpy()
    shown = [row for row in ROWS if row.key in found][::-1]
    with figure(out, "precision", (9.2, 1.4 + 0.32 * len(shown))) as axes:
        kinds = ((~withheld, PALETTE[0], "seen"), (withheld, PALETTE[1], "withheld"))
        for mask, color, text in kinds:
            means = [found[row.key][mask].mean() for row in shown]
            axes.plot(means, range(len(shown)), "o", color=color, markersize=7, label=text)
        axes.axvline(0.5, color=FAINT, linewidth=1.4, linestyle=(0, (5, 3)))
        names = [f"{row.asked}: {row.training}".removesuffix(": –") for row in shown]
        axes.set_yticks(range(len(shown)), names)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel(f"precision of the first {TOP}")
        axes.legend(frameon=False, loc="lower left", title="pair of concepts")
    return (
        f"Share of the first {TOP} training pictures that have the concept asked about. Dashed: "
        "what a ranking by whole images cannot exceed on the withheld pair."
    )
