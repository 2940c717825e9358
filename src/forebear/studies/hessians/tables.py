"""Tables of the Hessian study."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from forebear.studies.base import Cell, Table
from forebear.studies.hessians.ladder import LADDER, NAMES

if TYPE_CHECKING:
    from forebear.studies.hessians import Found


def best_lds(found: Sequence["Found"], name: str, kind: str = "warm") -> np.ndarray:
    """Mean LDS of each seed at that seed's best damping, `[seeds]`.

    The damping is chosen on retraining from the trained weights, for both kinds.
    """
    return np.array([float(np.nanmean(getattr(one, kind)[name][one.best[name]])) for one in found])


def curve(found: Sequence["Found"], name: str) -> np.ndarray:
    """Mean LDS by seed and damping, `[seeds, dampings]`."""
    return np.array([np.nanmean(one.warm[name], 1) for one in found])


def interval(found: Sequence["Found"], name: str) -> tuple[float, float]:
    """95 % interval of the mean over seeds, by drawing subsets again within each seed.

    Subsets that are drawn twice tie, which lowers rank correlations: the draws are moved so that
    their mean is what was measured.
    """
    draws = np.mean([one.draws[name] for one in found], axis=0)
    low, high = np.quantile(draws - draws.mean(), [0.025, 0.975]) + best_lds(found, name).mean()
    return float(low), float(high)


def tables(
    found: Sequence["Found"], dampings: Sequence[float], suspects: Sequence[float]
) -> list[Table]:
    """Everything that was measured."""
    return [
        _quality(found, dampings),
        _ladder(found),
        _shares(found),
        _anatomies(found),
        _suspicion(found, suspects),
        _reliability(found),
        _curves(found, dampings),
    ]


def _quality(found: Sequence["Found"], dampings: Sequence[float]) -> Table:
    rows: list[list[Cell]] = []
    for name, title in NAMES.items():
        warm, low_high = best_lds(found, name), interval(found, name)
        used = sorted({dampings[one.best[name]] for one in found})
        rows.append(
            [
                title,
                *warm.tolist(),
                float(warm.mean()),
                *low_high,
                " ".join(f"{value:.0e}" for value in used),
                float(best_lds(found, name, "cold").mean()),
            ]
        )
    seeds = [f"seed {i}" for i in range(len(found))]
    return Table(
        "lds",
        "LDS of every curvature at its best damping",
        ["curvature", *seeds, "mean", "low", "high", "best λ", "cold"],
        rows,
        "Against retraining from the trained weights; low and high are a 95 % bootstrap interval "
        "of the mean over subsets. Cold: the same scores against retraining from scratch. The "
        "identity's ranking does not depend on λ. The Hessian is taken with absolute eigenvalues.",
    )


def _ladder(found: Sequence["Found"]) -> Table:
    rows: list[list[Cell]] = []
    names = list(LADDER)
    for above, name in zip([None, *names], names, strict=False):
        step, way = (None, None)
        if above is not None:
            step, way = np.mean([one.steps[name] for one in found], axis=0).tolist()
        lds = best_lds(found, name).mean()
        change = None if above is None else float(lds - best_lds(found, above).mean())
        alike = float(np.mean([one.agreement[name] for one in found]))
        rows.append([LADDER[name], step, way, float(lds), change, alike])
    return Table(
        "ladder",
        "The ladder: what each approximation costs",
        ["curvature", "step residual", "from the Hessian", "LDS", "change", "as the Hessian"],
        rows,
        "Residuals are Frobenius norms relative to the matrix above, and to the Hessian. As the "
        "Hessian: rank correlation with its scores, each at its best damping. Means over seeds.",
    )


def _shares(found: Sequence["Found"]) -> Table:
    rows: list[list[Cell]] = []
    for i, share in enumerate(found[0].shares):
        each = [one.shares[i] for one in found]
        values = [one.share for one in each]
        rows.append(
            [
                share.title,
                share.way,
                float(np.mean([one.kfac for one in each])),
                float(np.mean([one.ekfac for one in each])),
                float(np.mean(values)),
                min(values),
                max(values),
            ]
        )
    return Table(
        "shares",
        "What K-FAC's error is made of",
        ["network", "factors from", "K-FAC", "EK-FAC", "eigenvalue share", "lowest", "highest"],
        rows,
        "K-FAC, EK-FAC: error relative to the exact Gauss-Newton blocks G, where EK-FAC has G's "
        "own second moments in the basis of those factors. Eigenvalue share: the part of K-FAC's "
        "squared error that better eigenvalues repair; the rest is the basis. Means over seeds.",
    )


def _anatomies(found: Sequence["Found"]) -> Table:
    rows: list[list[Cell]] = []
    for i, one in enumerate(found[0].anatomies):
        each = [each.anatomies[i] for each in found]
        rows.append(
            [
                one.title,
                float(np.mean([a.residual for a in each])),
                float(np.mean([a.same_layer for a in each])),
                float(np.mean([a.off_block for a in each])),
                min(a.lowest for a in each),
                float(np.mean([f.accuracies[one.title] for f in found])),
                max(f.slopes[one.title] for f in found),
            ]
        )
    return Table(
        "networks",
        "Hessian and Gauss-Newton matrix of each network",
        [
            "network",
            "H − G",
            "same layer",
            "G outside blocks",
            "lowest eigenvalue",
            "accuracy",
            "slope",
        ],
        rows,
        "Frobenius norms: ‖H − G‖ / ‖H‖, the same within layers, and ‖G − blk(G)‖ / ‖G‖. Lowest "
        "eigenvalue of any seed's Hessian, without weight decay. Slope: the largest norm of the "
        "gradient of J that training left.",
    )


def _suspicion(found: Sequence["Found"], suspects: Sequence[float]) -> Table:
    rows: list[list[Cell]] = []
    for name in found[0].suspicion:
        each = np.array([one.suspicion[name] for one in found])  # [seeds, dampings]
        every = each if each.shape[1] > 1 else np.repeat(each, len(suspects), 1)
        rows.append([name, *every.mean(0).tolist(), float(each.min())])
    columns = [f"λ = {damping:.0e}" for damping in suspects]
    return Table(
        "mislabelled",
        "Wrong labels found by self-influence",
        ["score", *columns, "lowest"],
        rows,
        "AUROC for the changed labels, mean over seeds; lowest over dampings and seeds.",
    )


def _reliability(found: Sequence["Found"]) -> Table:
    rows: list[list[Cell]] = [
        [f"seed {i}", one.halves, one.ceiling, one.alike] for i, one in enumerate(found)
    ]
    return Table(
        "reliability",
        "How far retraining agrees with itself",
        ["", "cold halves", "cold ceiling", "warm and cold"],
        rows,
        "Rank correlations over subsets, mean over queries. Cold halves: two halves of the seeds "
        "of retraining from scratch. Cold ceiling: the LDS a perfect predictor could expect. "
        "Nothing in retraining from the trained weights is random, so its reliability is one.",
    )


def _curves(found: Sequence["Found"], dampings: Sequence[float]) -> Table:
    rows: list[list[Cell]] = []
    for name, title in NAMES.items():
        for i, one in enumerate(found):
            warm, cold = np.nanmean(one.warm[name], 1), np.nanmean(one.cold[name], 1)
            for damping, w, c in zip(dampings, warm.tolist(), cold.tolist(), strict=True):
                rows.append([title, i, damping, w, c])
    columns = ["curvature", "seed", "damping", "lds warm", "lds cold"]
    return Table("curves", "LDS at every damping", columns, rows, shown=False)
