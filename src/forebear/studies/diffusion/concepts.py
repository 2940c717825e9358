"""Which training images taught a model one of two concepts, where no image shows both."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebear import methods
from forebear.curvature import NonzeroRelative
from forebear.executors import Executor, InProcess
from forebear.studies.base import Cell, Finding, StudyResult, Table, fingerprint
from forebear.studies.diffusion import likeness
from forebear.studies.diffusion.steps import steps_bring_nearer
from forebear.studies.figure import FAINT, PALETTE, figure
from forebear.studies.jobs import SCORING, TRAINING, Found, Job, TimedPieces, heard, refusal
from forebear.task import Task
from forebear.training.ensemble import Ensemble
from forebear.training.recipe import Recipe
from forebear.zoo import concepts
from forebear.zoo.concepts import Concepts, precision

RIDGE = 10.0
"""A multiple of the mean eigenvalue that is not zero, for all kernels."""

TOP = 10

SUMMARY = (
    "{n} pictures show a ring, a plus or a cross, and a bar at one of three heights; no training "
    "picture shows a ring and a bar at the top. {networks} networks that are told both were "
    "trained on them. Methods say which pictures count for a query; shown is the share of the "
    "first ten that have the concept that was asked about, mean over both concepts of a query."
)


@dataclass(frozen=True)
class Trained:
    """A network and its pictures.

    Attributes:
        task: the network and the loss that is attributed.
        data: training pictures and queries.
        draws: noisy images that the gradient of a concept is averaged over.
    """

    task: Task
    data: Concepts
    draws: int


Ranking = Callable[[Trained], Tensor]
"""Scores of the queries `[2, q, n]` for both of their concepts, or `[1, q, n]` for all at once."""


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


def _pixels(trained: Trained) -> Tensor:
    one, other = (d.batch(slice(None))["image"] for d in (trained.data.queries, trained.data.train))
    return likeness.pixel_closeness(one, other)[None]


def _whole(name: str, **options: Any) -> Ranking:
    def rank(trained: Trained) -> Tensor:
        method = methods.get(name, damping=NonzeroRelative(RIDGE), **options)
        return method.fit(trained.task, trained.data.train).score(trained.data.queries).values[None]

    return rank


def _slider(
    training: str = "posterior",
    *,
    without: Callable[[Tensor, int], Tensor] = concepts.without,
    **options: Any,
) -> Ranking:
    def rank(trained: Trained) -> Tensor:
        damping = NonzeroRelative(RIDGE)
        method = methods.get(
            "concept_trak", training=training, damping=damping, draws=trained.draws, **options
        )
        fitted = method.fit(trained.task, trained.data.train)
        labels = trained.data.query_labels
        keys = trained.data.queries.batch(slice(None))["key"]
        place = torch.arange(len(labels))
        if method.scope == "global":  # one answer for all pictures of a pair
            labels, place = labels.unique(dim=0, return_inverse=True)
            keys = torch.arange(len(labels))
        asked = [concepts.asked(labels, c, keys=keys) for c in (0, 1)]
        each = [{**queries, "without": without(labels, c)} for c, queries in enumerate(asked)]
        return torch.stack([fitted.score(queries).values[place] for queries in each])

    return rank


def left_out(labels: Tensor, concept: int) -> Tensor:
    """Conditions `[q, 6]` that say nothing of a concept, which no training picture does."""
    said = concepts.condition(labels).view(-1, 2, 3)
    said[:, concept] = 0.0
    return said.flatten(1)


WHOLE, SLIDER = "whole image", "concept slider"
POSTERIOR, INVERTED = "posterior sampling, fresh noise", "posterior sampling, inverted"

ROWS = (
    Row("pixels", "pixel distance", "–", _pixels, whole=True),
    Row("trak", WHOLE, "loss (TRAK)", _whole("dtrak", function="loss"), "dtrak", whole=True),
    Row("dtrak", WHOLE, "square norm (D-TRAK)", _whole("dtrak"), "dtrak", whole=True),
    Row("das", WHOLE, "absolute value (DAS)", _whole("das", function="absolute"), "das", True),
    Row("whole", WHOLE, INVERTED, _whole("concept_trak", scope="whole"), "concept_trak", True),
    Row("slider_trak", SLIDER, "loss (TRAK)", _slider("loss"), "concept_trak"),
    Row("slider_dtrak", SLIDER, "square norm (D-TRAK)", _slider("square_norm"), "concept_trak"),
    Row("slider_das", SLIDER, "absolute value (DAS)", _slider("absolute"), "concept_trak"),
    Row("slider_fresh", SLIDER, POSTERIOR, _slider(inversion=False), "concept_trak"),
    Row(
        "slider_fresh_unit",
        SLIDER,
        f"{POSTERIOR}, unit length",
        _slider(inversion=False, normalise=True),
        "concept_trak",
    ),
    Row("slider", SLIDER, INVERTED, _slider(), "concept_trak"),
    Row("slider_unit", SLIDER, f"{INVERTED}, unit length", _slider(normalise=True), "concept_trak"),
    Row(
        "slider_left_out",
        "concept slider, concept left out",
        INVERTED,
        _slider(without=left_out),
        "concept_trak",
    ),
    Row(
        "slider_local",
        "concept slider, from a noise of the query's own",
        INVERTED,
        _slider(scope="local"),
        "concept_trak",
    ),
)


@dataclass(frozen=True)
class Compared:
    """What was found.

    Attributes:
        found: precision by row, `[networks, q]`, mean over both concepts.
        skipped: why a row took no part.
        nearer: share of steps on training pictures that brought what the model sees nearer to
            them, by network.
        changed: largest change of normalised scores where the strength of the slider is seven
            times as large, over the largest score.
    """

    found: Mapping[str, np.ndarray]
    skipped: Mapping[str, str]
    nearer: np.ndarray
    changed: float


def run(out: Path, *, quick: bool, seed: int, executor: Executor | None = None) -> StudyResult:
    """Train the networks, rank by every way, and write the folder."""
    data = concepts.load(train=120, each=2) if quick else concepts.load(each=2, pairs=8)
    recipe = concepts.recipe(epochs=5) if quick else concepts.recipe()
    seeds = tuple(range(seed, seed + (2 if quick else 5)))
    settings = {
        "task": "concepts",
        "recipe": recipe.fingerprint,
        "train": data.train.fingerprint,
        "queries": data.queries.fingerprint,
        "draws": 9 if quick else 90,
        "networks": seeds,
        "forebear": version("forebear"),
    }
    pieces = TimedPieces(out / "pieces", settings, executor or InProcess())
    state, _ = pieces.read(Job(TRAINING, "models", partial(_states, recipe, data, seeds)))
    models = Ensemble(recipe.build().eval(), state).models()
    networks = [Trained(Task(model, concepts.loss()), data, settings["draws"]) for model in models]
    compared = compare(networks, pieces)
    skipped = Table("missing", "What took no part", ["ranking", "why"], [*compared.skipped.items()])
    result = StudyResult(
        name="diffusion",
        title="Attribution of diffusion models: two concepts in a picture",
        summary=SUMMARY.format(n=len(data.train), networks=len(seeds)),
        settings={**settings, "quick": quick, "executor": str(pieces.executor)},
        tables=[_table(compared.found, data), *([skipped] if compared.skipped else [])],
        findings=findings(compared, data.withheld.numpy()),
        figures={"precision": _draw(compared.found, data, out)},
    )
    result.save(out)
    return result


def _states(recipe: Recipe, data: Concepts, seeds: tuple[int, ...]) -> Found:
    everything = torch.ones(len(seeds), len(data.train), dtype=torch.bool)
    return dict(recipe.train_many(data.train, everything, seeds).state), {}


def compare(networks: list[Trained], pieces: TimedPieces) -> Compared:
    """Every way to rank under every network, and what gradients of concepts do."""
    jobs = {row.key: [_job(row, i, one) for i, one in enumerate(networks)] for row in ROWS}
    checks = Job(SCORING, "checks", partial(_checks, networks))
    pieces.make([checks, *(job for each in jobs.values() for job in each)], "rankings")
    found: dict[str, np.ndarray] = {}
    skipped: dict[str, str] = {}
    for key, each in jobs.items():
        made = [pieces.read(job) for job in each]
        reason = refusal(made)
        if reason is not None:
            skipped[key] = reason
            continue
        pairs = zip(networks, made, strict=True)
        found[key] = np.stack([both(one.data, scores["scores"]) for one, (scores, _) in pairs])
    checked, _ = pieces.read(checks)
    return Compared(found, skipped, checked["nearer"].numpy(), checked["changed"].item())


def _job(row: Row, place: int, trained: Trained) -> Job:
    name = f"scores-{row.key}-{fingerprint(row.method, row.asked, row.training)}-{place}"
    return Job(SCORING, name, partial(heard, partial(_scores, row, trained)))


def _scores(row: Row, trained: Trained) -> Found:
    return {"scores": row.rank(trained).float().expand(2, -1, -1)}, {}


def both(data: Concepts, scores: Tensor) -> np.ndarray:
    """Precision of the first ten `[q]`, mean over both concepts, of scores `[2, q, n]`."""
    return np.mean([precision(data, scores[c], c, TOP) for c in (0, 1)], axis=0)


def _checks(networks: list[Trained]) -> Found:
    nearer = [steps_bring_nearer(one.task.model, concepts.loss(), one.data) for one in networks]
    return {"nearer": torch.tensor(nearer), "changed": torch.tensor(_change(networks[0]))}, {}


def _change(trained: Trained) -> float:
    """Of normalised scores, where the slider is seven times as strong."""
    few = Trained(trained.task, trained.data, draws=9)
    one, other = (_slider(normalise=True, strength=s)(few) for s in (7.5, 52.5))
    return ((one - other).abs().max() / one.abs().max()).item()


def findings(compared: Compared, withheld: np.ndarray) -> list[Finding]:
    """Claims about the withheld pair, and about gradients."""
    rows = {row.key: row for row in ROWS}
    mean = {key: float(values[:, withheld].mean()) for key, values in compared.found.items()}
    whole = {key: value for key, value in mean.items() if rows[key].whole}
    judged = [
        Finding(
            "A ranking by whole images cannot find teachers of both concepts of a withheld pair.",
            "precision at most 0.50, for no training image has both",
            ", ".join(
                f"{rows[key].training.replace('–', 'pixels')} {value:.2f}"
                for key, value in whole.items()
            ),
            all(value <= 0.5 for value in whole.values()),
        )
    ]
    if "slider" in mean:
        each = compared.found["slider"][:, withheld].mean(1)
        judged.append(
            Finding(
                "Concept sliders with the posterior-sampling loss find them.",
                "precision at least 0.80 on the withheld pair, mean of networks",
                f"{mean['slider']:.2f}; from {each.min():.2f} to {each.max():.2f} by network",
                mean["slider"] >= 0.8,
            )
        )
    pairs = {
        "posterior sampling": ("slider", "whole"),
        "TRAK": ("slider_trak", "trak"),
        "D-TRAK": ("slider_dtrak", "dtrak"),
        "DAS": ("slider_das", "das"),
    }
    for gradients, (one, other) in pairs.items():
        if {one, other} <= set(mean):
            judged.append(
                Finding(
                    f"With the training gradients of {gradients}, it is the question that counts.",
                    "the slider higher by at least 0.25 than the whole image, on the withheld pair",
                    f"{mean[one]:.2f} and {mean[other]:.2f}",
                    mean[one] - mean[other] >= 0.25,
                )
            )
    return judged + _about_gradients(compared)


def _about_gradients(compared: Compared) -> list[Finding]:
    return [
        Finding(
            "Of unit length, gradients do not know how strong the slider is.",
            "scores change by at most 1e-6 of the largest when it is seven times as strong",
            f"{compared.changed:.1e}",
            compared.changed <= 1e-6,
        ),
        Finding(
            "A step on a training picture brings what the model sees nearer to it.",
            "for at least 90 % of pictures and timesteps, mean of networks",
            f"{100 * compared.nearer.mean():.0f} %, in the worst network "
            f"{100 * compared.nearer.min():.0f} %",
            bool(compared.nearer.mean() >= 0.9),
        ),
    ]


def _table(found: Mapping[str, np.ndarray], data: Concepts) -> Table:
    withheld = data.withheld.numpy()
    rows: list[list[Cell]] = []
    for row in ROWS:
        if row.key not in found:
            continue
        seen, held = found[row.key][:, ~withheld], found[row.key][:, withheld].mean(1)
        networks = ", ".join(f"{value:.2f}" for value in held)
        rows.append([row.asked, row.training, float(seen.mean()), float(held.mean()), networks])
    base = [
        float((data.query_labels[:, c, None] == data.labels[None, :, c]).double().mean())
        for c in (0, 1)
    ]
    note = (
        f"Mean over networks, {int((~withheld).sum())} queries of seen pairs and "
        f"{int(withheld.sum())} of the withheld one. Chance is {base[0]:.2f} for shapes and "
        f"{base[1]:.2f} for bars."
    )
    columns = ["query", "training images", "seen pairs", "withheld pair", "in each network"]
    return Table("precision", f"Precision of the first {TOP}", columns, rows, note)


def _draw(found: Mapping[str, np.ndarray], data: Concepts, out: Path) -> str:
    withheld = data.withheld.numpy()
    shown = [row for row in ROWS if row.key in found][::-1]
    with figure(out, "precision", (9.6, 1.6 + 0.34 * len(shown))) as axes:
        kinds = ((~withheld, PALETTE[0], "seen", 0.12), (withheld, PALETTE[1], "withheld", -0.12))
        for mask, color, text, shift in kinds:
            each = [found[row.key][:, mask].mean(1) for row in shown]
            for place, values in enumerate(each):
                heights = [place + shift] * len(values)
                axes.plot(values, heights, "o", color=color, markersize=3.5, alpha=0.35)
            means = [values.mean() for values in each]
            places = [place + shift for place in range(len(shown))]
            axes.plot(means, places, "o", color=color, markersize=7.5, label=text)
        axes.axvline(0.5, color=FAINT, linewidth=1.4, linestyle=(0, (5, 3)))
        names = [f"{row.asked}: {row.training}".removesuffix(": –") for row in shown]
        axes.set_yticks(range(len(shown)), names)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel(f"precision of the first {TOP}")
        axes.legend(frameon=False, loc="lower left", title="pair of concepts")
    return (
        f"Share of the first {TOP} training pictures that have the concept asked about: mean, and "
        "small for each network. Dashed: what a ranking by whole images cannot exceed on the "
        "withheld pair."
    )
