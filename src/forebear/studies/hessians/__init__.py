"""Does a better curvature give better influence scores, and which approximation costs most?

The ladder of "Better Hessians Matter" (Hong et al. 2025) on classifiers small enough for the exact
Hessian: each rung from it down to K-FAC adds one approximation, and each is held against models
that were really retrained.
"""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from forebear import metrics
from forebear.errors import ForebearWarning
from forebear.metrics.correlation import correlations
from forebear.progress import track
from forebear.studies.base import Pieces, StudyResult
from forebear.studies.figure import require_figures
from forebear.studies.hessians.findings import findings
from forebear.studies.hessians.ladder import (
    NAMES,
    Anatomy,
    Rotated,
    Share,
    anatomy,
    blocks_of,
    fit_kronecker,
    matrices_of,
    residuals,
    shares,
)
from forebear.studies.hessians.subject import (
    Gold,
    Network,
    Outcomes,
    Subject,
    margin,
    outcomes_of,
    subject_of,
)
from forebear.studies.hessians.tables import tables

DAMPINGS = tuple(float(value) for value in 10.0 ** np.arange(-4, -0.9, 0.5))
"""Absolute dampings that every curvature is tried with; weight decay is one of them."""

SUSPECTS = tuple(float(value) for value in 10.0 ** np.arange(-5, 0.1, 1.0))
"""Those of self-influence, for wrong labels."""

RESAMPLES = 200

NETWORK, GOLD = Network(), Gold()
SUSPICIOUS = Network(examples=1000)
WIDE = Network(widths=(64, 16, 16, 10), activation="gelu", examples=1000, polish=500)
# With more weight decay some seeds fall to a constant output, and kinks stop L-BFGS.
DEEP = Network(
    widths=(64, 12, 12, 12, 12, 12, 12, 10),
    activation="relu",
    examples=1000,
    weight_decay=1e-4,
    polish=0,
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of a study.

    Attributes:
        network: whose scores are judged by retraining.
        gold: how it is retrained.
        suspects: the network whose wrong labels are looked for.
        others: networks of which only the matrices are compared.
        seeds: of everything that is drawn; each is a whole repetition.
    """

    network: Network = NETWORK
    gold: Gold = GOLD
    suspects: Network = SUSPICIOUS
    others: tuple[Network, ...] = (WIDE, DEEP)
    seeds: tuple[int, ...] = (0, 1, 2)

    @classmethod
    def of(cls, *, quick: bool, seed: int) -> "Plan":
        """The whole study, or a smaller one that shows what it does."""
        if not quick:
            return cls(seeds=(seed, seed + 1, seed + 2))
        small = Network(examples=200, steps=200)
        return cls(
            network=small,
            gold=Gold(subsets=20, queries=20, steps=150, cold_seeds=2),
            suspects=replace(small, examples=300),
            others=(replace(small, widths=(64, 10, 10), activation="gelu"),),
            seeds=(seed,),
        )


@dataclass(frozen=True)
class Found:
    """What one seed gave.

    Attributes:
        warm: LDS of each query by curvature and damping, `[dampings, q]`, against retraining from
            the trained weights.
        cold: the same against retraining from scratch.
        best: position of the damping with the best mean warm LDS, by curvature.
        draws: mean warm LDS at the best damping, over resampled subsets, `[RESAMPLES]`.
        agreement: mean rank correlation with the scores of the Hessian, each at its best damping.
        steps: residuals by rung, from the rung above and from the Hessian.
        halves: agreement between two halves of the cold seeds; NaN with fewer than two.
        ceiling: what a perfect predictor of the cold outcome can expect.
        alike: rank correlation between warm and cold outcomes.
        shares: of K-FAC's error, by network and estimate.
        anatomies: exact matrices of each network.
        suspicion: AUROC for wrong labels by score, one for each of `SUSPECTS` or one.
        slopes: `‖∇J‖` where training of each network ended.
        accuracies: on the test set.
    """

    warm: Mapping[str, np.ndarray]
    cold: Mapping[str, np.ndarray]
    best: Mapping[str, int]
    draws: Mapping[str, np.ndarray]
    agreement: Mapping[str, float]
    steps: Mapping[str, tuple[float, float]]
    halves: float
    ceiling: float
    alike: float
    shares: list[Share] = field(default_factory=list)
    anatomies: list[Anatomy] = field(default_factory=list)
    suspicion: Mapping[str, list[float]] = field(default_factory=dict)
    slopes: Mapping[str, float] = field(default_factory=dict)
    accuracies: Mapping[str, float] = field(default_factory=dict)


def run(
    out: Path, *, quick: bool = False, seed: int = 0, threads: int | None = None
) -> StudyResult:
    """Train, retrain on subsets, score with every curvature, compare, and write the folder.

    Args:
        out: folder to write; retrainings that it holds are not made again.
        quick: one seed, smaller networks and fewer retrainings.
        seed: the first of three (one when quick).
        threads: to compute with.

    Raises:
        MissingDependencyError: matplotlib or scikit-learn is not installed.
        MismatchError: the folder holds other work.
    """
    require_figures()
    from forebear.studies.hessians.figures import draw

    if threads is not None:
        torch.set_num_threads(threads)
    plan = Plan.of(quick=quick, seed=seed)
    facts = asdict(plan)
    pieces = Pieces(Path(out) / "pieces", facts)
    found = [measure(plan, one, pieces) for one in track(plan.seeds, "seeds")]
    result = StudyResult(
        name="hessians",
        title="Better Hessians: which approximation costs what",
        summary=SUMMARY.format(
            network=plan.network.title,
            n=plan.network.examples,
            m=plan.gold.subsets,
            seeds=len(plan.seeds),
        ),
        settings={**facts, "quick": quick, "dampings": list(DAMPINGS)},
        tables=tables(found, DAMPINGS, SUSPECTS),
        findings=findings(found, DAMPINGS),
        figures=draw(found, DAMPINGS, plan.network.weight_decay, Path(out)),
    )
    result.save(out)
    return result


SUMMARY = (
    "A classifier ({network}, {n} digits, a tenth of the labels changed) was retrained on {m} "
    "random halves of its training set, {seeds} times with other data and weights. Influence "
    "scores from the exact Hessian and from each of its approximations predict what retraining "
    "does to the margins of test examples; LDS says how well. Nothing but the matrix differs."
)


def measure(plan: Plan, seed: int, pieces: Pieces) -> Found:
    """Everything for one seed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ForebearWarning)  # constant scores are NaN in the tables
        subject = subject_of(plan.network, plan.gold.queries, seed, pieces)
        outcomes = outcomes_of(subject, plan.gold, seed, pieces)
        matrices = matrices_of(subject, seed)
        found = judged(subject, outcomes, matrices)
        subjects = [subject]
        parts = shares(subject, matrices["block"], seed)
        anatomies = [anatomy(subject, matrices["hessian"][0], matrices["ggn"][0])]
        for network in plan.others:
            other = subject_of(network, plan.gold.queries, seed, pieces)
            hessian, ggn = (blocks_of(other, kind)[0] for kind in ("hessian", "gauss_newton"))
            blocks = blocks_of(other, "gauss_newton", "layers")
            parts += shares(other, blocks, seed)
            anatomies.append(anatomy(other, hessian, ggn))
            subjects.append(other)
        suspects = subject_of(plan.suspects, plan.gold.queries, seed, pieces)
    return replace(
        found,
        shares=parts,
        anatomies=anatomies,
        suspicion=suspicions(suspects, seed),
        slopes={one.network.title: one.slope for one in subjects},
        accuracies={one.network.title: one.accuracy for one in subjects},
    )


def judged(subject: Subject, outcomes: Outcomes, matrices: Mapping[str, list[np.ndarray]]) -> Found:
    """Scores of every curvature at every damping, held against retraining."""
    train = subject.gradients(subject.train, subject.task.loss)
    queries = subject.gradients(subject.queries, margin)
    cold_mean = outcomes.cold.mean(0)
    warm, cold, best, draws, chosen = {}, {}, {}, {}, {}
    for name in NAMES:
        rotated = Rotated.of(matrices[name], train, queries)
        scores = [rotated.scores(damping) for damping in DAMPINGS]
        warm[name] = np.array([metrics.lds(s, outcomes.masks, outcomes.warm) for s in scores])
        cold[name] = np.array([metrics.lds(s, outcomes.masks, cold_mean) for s in scores])
        best[name] = int(np.nanmean(warm[name], 1).argmax())
        chosen[name] = scores[best[name]]
        draws[name] = resampled(chosen[name], outcomes.masks, outcomes.warm)
    ceiling, halves = np.nan, np.nan
    if len(outcomes.cold) > 1:
        noise = metrics.noise_ceiling(outcomes.cold)
        ceiling, halves = float(noise.ceiling.mean()), float(noise.agreement.mean())
    return Found(
        warm,
        cold,
        best,
        draws,
        {name: _alike(chosen[name], chosen["hessian"]) for name in NAMES},
        residuals(matrices),
        halves,
        ceiling,
        float(np.nanmean(correlations(outcomes.warm, cold_mean))),
    )


def resampled(scores: np.ndarray, masks: np.ndarray, outcomes: np.ndarray) -> np.ndarray:
    """Mean LDS over subsets drawn again with replacement, `[RESAMPLES]`."""
    predicted = masks.astype(np.float64) @ (scores - scores.mean(1, keepdims=True)).T  # [m, q]
    draws = np.random.default_rng(0).integers(0, len(masks), (RESAMPLES, len(masks)))
    return np.array([np.nanmean(correlations(predicted[d], outcomes[d])) for d in draws])


def suspicions(subject: Subject, seed: int) -> dict[str, list[float]]:
    """AUROC for the changed labels of self-influence by curvature, gradient norm and loss."""
    from forebear.metrics.curvature import kronecker_blocks

    train = subject.gradients(subject.train, subject.task.loss)
    nobody = train[:0]
    kinds = {
        "ggn": blocks_of(subject, "gauss_newton"),
        "block": blocks_of(subject, "gauss_newton", "layers"),
        "ekfac": kronecker_blocks(fit_kronecker(subject, "exact", seed, corrected=True)).values(),
        "kfac": kronecker_blocks(fit_kronecker(subject, "exact", seed, corrected=False)).values(),
        "fisher": [train.T @ train / len(train)],
    }
    found = {}
    for name, matrices in kinds.items():
        rotated = Rotated.of(list(matrices), train, nobody)
        found[NAMES[name]] = [
            metrics.mislabel_auc(rotated.self_influence(damping), subject.flipped)
            for damping in SUSPECTS
        ]
    with torch.no_grad():
        values = subject.task.loss(subject.task.model, subject.train.batch(slice(None))).numpy()
    norms = np.linalg.norm(train, axis=1)
    found["gradient norm"] = [metrics.mislabel_auc(norms, subject.flipped)]
    found["loss"] = [metrics.mislabel_auc(values, subject.flipped)]
    return found


def _alike(scores: np.ndarray, exact: np.ndarray) -> float:
    """Rank correlation over training examples, mean over queries."""
    return float(np.nanmean(correlations(scores.T, exact.T)))
