"""Only the final model is there: which method tells best how it would respond to an example?

The gold standard is further training of the model with and without each example; methods are
compared with it as a function of the amount of further training (after Wei et al. 2025).
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebear import methods, metrics
from forebear.curvature import Absolute
from forebear.errors import ForebearError, ForebearWarning
from forebear.executors import Executor
from forebear.metrics.correlation import correlations
from forebear.progress import track
from forebear.studies.base import Pieces, StudyResult, Table, fingerprint
from forebear.studies.figure import require_figures
from forebear.studies.final_model.entrants import ENTRANTS, Entrant, Field, Scale, absent
from forebear.studies.final_model.figures import draw
from forebear.studies.final_model.findings import findings
from forebear.studies.final_model.subjects import Subject, subject_of
from forebear.types import read_json, write_json

MEASURES = ("cosine", "centred cosine", "Spearman")
SWEEP = 10.0 ** np.arange(-4, 2.51, 0.125)
"""Absolute dampings of the exact Gauss-Newton solve in the second figure."""


@dataclass(frozen=True)
class Outcome:
    """All that was measured.

    Attributes:
        epochs: amounts of further training, in passes over the data.
        horizons: the same as learning rate × steps.
        values: agreement with the gold standard by entrant, `[3, amounts, q]` as in `MEASURES`.
        scores: of the examples left out by entrant, `[amounts, q, m]`.
        seconds: that an entrant took for all amounts.
        skipped: why an entrant did not take part.
        warned: what an entrant warned of.
        reliability: of the gold standard at each amount.
        seeds: that the gold standard is a mean of.
        single: cosine of GradDot with the gold standard of single seeds, `[amounts]`.
        sweep: mean cosine `[amounts, len(SWEEP)]` of an exact Gauss-Newton solve; None without.
        mean_square: λ₀, the mean squared entry of the training gradients.
    """

    epochs: tuple[int, ...]
    horizons: tuple[float, ...]
    values: Mapping[str, np.ndarray]
    scores: Mapping[str, np.ndarray]
    seconds: Mapping[str, float]
    skipped: Mapping[str, str]
    warned: Mapping[str, tuple[str, ...]]
    reliability: tuple[float, ...]
    seeds: int
    single: np.ndarray
    sweep: np.ndarray | None
    mean_square: float

    def mean(self, key: str, measure: str = "cosine") -> np.ndarray:
        """Mean over queries at each amount, `[amounts]`."""
        return np.nanmean(self.values[key][MEASURES.index(measure)], axis=1)

    def interval(self, key: str, measure: str = "cosine") -> np.ndarray:
        """95 % interval of that mean by a bootstrap over queries, `[amounts, 2]`."""
        rows = self.values[key][MEASURES.index(measure)]
        return np.array([metrics.bootstrap_interval(row[~np.isnan(row)]) for row in rows])

    @property
    def ceiling(self) -> np.ndarray:
        """The cosine that the noise of the gold standard leaves to a perfect method."""
        return np.sqrt(np.clip(self.reliability, 0, 1))

    def at(self, epochs: int) -> int | None:
        """Position of an amount, None where it was not measured."""
        return self.epochs.index(epochs) if epochs in self.epochs else None


def run(
    out: Path,
    *,
    task: str = "breast_cancer",
    quick: bool = False,
    seed: int = 0,
    threads: int | None = None,
    executor: Executor | None = None,
) -> StudyResult:
    """Train, train further with and without examples, score, compare, and write the folder.

    Args:
        out: folder to write; what it holds of the same work is not done again.
        task: `breast_cancer`, `diabetes`, `digits`, `text`, or a Python file that defines
            `task()`, `train()`, `queries()` and `further_training()`.
        quick: fewer examples, queries and seeds, and less further training.
        seed: of the model and of the examples left out.
        threads: to compute with.
        executor: where models are trained further; here when left out.

    Raises:
        MissingDependencyError: matplotlib, or scikit-learn for its tables, is not installed.
        MismatchError: the folder holds other work.
    """
    require_figures()
    if threads is not None:
        torch.set_num_threads(threads)
    subject = subject_of(task, quick=quick, seed=seed)
    pieces = Pieces(out / "pieces", subject.facts())
    outcome = measure(subject, pieces, executor)
    result = StudyResult(
        name="final-model",
        title=f"Final-model attribution on {subject.title}",
        summary=SUMMARY.format(m=len(subject.left_out), q=len(subject.queries)),
        settings={**subject.facts(), "quick": quick, "λ₀": outcome.mean_square},
        tables=tables(outcome),
        findings=findings(outcome, activation=subject.activation),
        figures=draw(outcome, out, subject.title),
    )
    result.save(out)
    return result


SUMMARY = (
    "The trained model was trained further on all examples and on all but one of {m}, and the "
    "change of {q} test losses was recorded. Methods that see only the final model predict that "
    "change; shown is how well, as a function of how far training went."
)


def measure(subject: Subject, pieces: Pieces, executor: Executor | None = None) -> Outcome:
    """Gold standard, scores of every entrant, and how they agree."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ForebearWarning)
        response = subject.further_training.measure(
            subject.task,
            subject.train,
            subject.queries,
            left_out=subject.train.ids[subject.left_out.numpy()],
            folder=pieces.folder / "gold",
            executor=executor,
        )
    gold = response.gold("mean").double().numpy()  # [amounts, q, m]
    field = Field(
        task=subject.task,
        train=subject.train,
        queries=subject.queries,
        left_out=subject.left_out,
        epochs=subject.epochs,
        further=subject.further,
    )
    scales = field.scales()
    scores, seconds, skipped = {}, {}, {}
    warned: dict[str, tuple[str, ...]] = {"gold": _texts(caught)}
    for entrant in track(ENTRANTS, "methods", total=len(ENTRANTS)):
        reason = absent(entrant, scales[0])
        if reason is None:
            try:
                values, about = _entry(entrant, field, scales, pieces)
            except ForebearError as error:
                reason = str(error)
            else:
                scores[entrant.key] = values.numpy()
                seconds[entrant.key] = about["seconds"]
                warned[entrant.key] = tuple(about["warnings"])
        if reason is not None:
            skipped[entrant.key] = reason
    return Outcome(
        epochs=subject.epochs,
        horizons=tuple(float(h) for h in response.horizons),
        values={key: agreement(values, gold) for key, values in scores.items()},
        scores=scores,
        seconds=seconds,
        skipped=skipped,
        warned={key: texts for key, texts in warned.items() if texts},
        reliability=tuple(float(r) for r in response.reliability_by("cosine", "mean")),
        seeds=len(response.seeds),
        single=_single_seeds(scores["graddot"], response.per_seed("mean").double().numpy()),
        sweep=_sweep(field, scales[0], gold, pieces) if scales[0].dense else None,
        mean_square=scales[0].mean_square,
    )


def agreement(scores: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Cosine, centred cosine and Spearman's correlation by amount and query, `[3, amounts, q]`.

    Args:
        scores: `[amounts, q, m]`.
        gold: `[amounts, q, m]`, centred over m.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ForebearWarning)  # NaN for a query without effects
        pairs = list(zip(scores, gold, strict=True))
        return np.stack(
            [
                [metrics.cosine_similarity(s, g) for s, g in pairs],
                [metrics.cosine_similarity(s, g, center=True) for s, g in pairs],
                [correlations(s.T, g.T) for s, g in pairs],
            ]
        )


def _entry(
    entrant: Entrant, field: Field, scales: Sequence[Scale], pieces: Pieces
) -> tuple[Tensor, dict[str, Any]]:
    """Scores `[amounts, q, m]` of an entrant, how long they took and what it warned of."""
    settings = [repr(entrant.options(scale)) for scale in scales]
    name = f"{entrant.key}-{fingerprint(entrant.method, settings)}"
    path = pieces.folder / f"{name}.json"

    def make() -> dict[str, Tensor]:
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ForebearWarning)
            values = field.scores(entrant, list(scales))
        about = {"seconds": time.perf_counter() - start, "warnings": _texts(caught)}
        write_json(path, about)
        return {"scores": values}

    values = pieces.tensors(name, make)["scores"]
    return values, read_json(path)


def _texts(caught: list[warnings.WarningMessage]) -> tuple[str, ...]:
    return tuple(sorted({str(w.message) for w in caught if _ours(w)}))


def _ours(warning: warnings.WarningMessage) -> bool:
    return issubclass(warning.category, ForebearWarning)


def _single_seeds(scores: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Mean cosine of scores with the gold standard of one seed at a time, `[amounts]`."""
    each = [agreement(scores, one)[0] for one in gold]  # gold: [seeds, amounts, q, m]
    return np.nanmean(np.stack(each), axis=(0, 2))


def _sweep(field: Field, scale: Scale, gold: np.ndarray, pieces: Pieces) -> np.ndarray:
    """Mean cosine of exact Gauss-Newton solves at many dampings, `[amounts, len(SWEEP)]`."""

    def make() -> dict[str, Tensor]:
        method = methods.get("exact", curvature="gauss_newton", damping=Absolute(1.0))
        fitted = method.fit(field.task, field.train)
        columns = []
        for damping in track(SWEEP, "dampings", total=len(SWEEP)):
            again = fitted.with_damping(Absolute(float(damping)))
            scores = again.score(field.queries).values[:, field.left_out].double().numpy()
            values = agreement(np.broadcast_to(scores, gold.shape), gold)[0]
            columns.append(np.nanmean(values, axis=1))
        return {"cosines": torch.from_numpy(np.stack(columns, 1))}

    return pieces.tensors(f"sweep-{fingerprint(SWEEP.tolist())}", make)["cosines"].numpy()


def tables(outcome: Outcome) -> list[Table]:
    """What was measured, by method and amount."""
    labels = {entrant.key: entrant.label for entrant in ENTRANTS}
    shown = [key for key in labels if key in outcome.values]
    columns = ["method", *(f"{epochs} epoch{'s' * (epochs > 1)}" for epochs in outcome.epochs)]
    found = [_by_amount(outcome, measure, labels, shown, columns) for measure in MEASURES]
    found.append(
        Table(
            "gold",
            "The gold standard",
            ["epochs", "ηT", "reliability", "ceiling", "GradDot with one seed", "with all seeds"],
            list(
                zip(
                    outcome.epochs,
                    outcome.horizons,
                    outcome.reliability,
                    outcome.ceiling.tolist(),
                    outcome.single.tolist(),
                    outcome.mean("graddot").tolist(),
                    strict=True,
                )
            ),
            f"{outcome.seeds} seeds. Reliability: how well two halves of the seeds agree, as a "
            "cosine, corrected to all; ceiling: its root, what a perfect method could reach. "
            + " ".join(outcome.warned.get("gold", ())),
        )
    )
    found.append(_cost(outcome, labels))
    found.append(_intervals(outcome, shown))
    rows = [
        (key, int(epochs), query, *map(float, outcome.values[key][:, a, query]))
        for key in shown
        for a, epochs in enumerate(outcome.epochs)
        for query in range(outcome.values[key].shape[2])
    ]
    names = ["method", "epochs", "query", *MEASURES]
    found.append(Table("per_query", "Agreement of every query", names, rows, shown=False))
    return found


def _by_amount(
    outcome: Outcome, measure: str, labels: dict[str, str], shown: list[str], columns: list[str]
) -> Table:
    rows = []
    for key in shown:
        means, intervals = outcome.mean(key, measure), outcome.interval(key, measure)
        cells = [
            f"{mean:.3f} ±{(high - low) / 2:.2f}"
            for mean, (low, high) in zip(means, intervals, strict=True)
        ]
        rows.append([labels[key], *cells])
    horizons = ", ".join(f"{horizon:.3g}" for horizon in outcome.horizons)
    note = (
        f"Mean over queries ± half of its 95 % bootstrap interval. ηT of the columns: {horizons}."
    )
    name = measure.lower().replace(" ", "_")
    title = f"{measure[:1].upper()}{measure[1:]} with the gold standard"
    return Table(name, title, columns, rows, note)


def _intervals(outcome: Outcome, shown: list[str]) -> Table:
    rows = []
    for key in shown:
        for measure in MEASURES:
            means, intervals = outcome.mean(key, measure), outcome.interval(key, measure)
            for epochs, mean, (low, high) in zip(outcome.epochs, means, intervals, strict=True):
                rows.append((key, measure, epochs, float(mean), float(low), float(high)))
    names = ["method", "measure", "epochs", "mean", "low", "high"]
    return Table("summary", "Means with their intervals", names, rows, shown=False)


def _cost(outcome: Outcome, labels: dict[str, str]) -> Table:
    rows = [
        (
            label,
            outcome.seconds.get(key),
            outcome.skipped.get(key) or "; ".join(outcome.warned.get(key, ())) or "",
        )
        for key, label in labels.items()
    ]
    entered = {entrant.method for entrant in ENTRANTS}
    rows += [
        (entry.label, None, f"takes no part: it needs {entry.needs}")
        for name, entry in methods.METHODS.items()
        if name not in entered
    ]
    note = (
        "Seconds for all queries and, where settings follow the amount, for all amounts. What "
        "differs only in damping is fitted once, and timed with the first that needs it."
    )
    return Table(
        "cost", "Time, and what methods had to say", ["method", "seconds", "note"], rows, note
    )
