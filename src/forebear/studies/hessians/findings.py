"""Claims about curvature, held against what the Hessian study measured.

The orderings and numbers that are expected are those of reference runs of this very protocol; the
claim about eigenvalues is the paper's.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from forebear.studies.base import Finding
from forebear.studies.hessians.tables import best_lds

if TYPE_CHECKING:
    from forebear.studies.hessians import Found


def findings(found: Sequence["Found"], dampings: Sequence[float]) -> list[Finding]:
    """Every claim, judged."""
    lds = {name: float(best_lds(found, name).mean()) for name in found[0].warm}
    judged = [*_orders(lds), _weighted(lds), *_identities(found), *_eigenvalues(found, lds)]
    judged += [_indefinite(found, dampings)]
    if found[0].suspicion:
        judged.append(_mislabelled(found))
    judged.append(_cold(found))
    return judged


def _orders(lds: dict[str, float]) -> list[Finding]:
    exact = min(lds["hessian"], lds["ggn"], lds["block"])
    return [
        _order(
            "The Hessian predicts retraining at least as well as the Gauss-Newton matrix.",
            ("Hessian", lds["hessian"]),
            ("Gauss-Newton", lds["ggn"]),
            0.0,
        ),
        _order(
            "Exact matrices, whole or by layers, are better than Kronecker-factored ones.",
            ("the lowest of the three", exact),
            ("EK-FAC", lds["ekfac"]),
            0.03,
        ),
        _order(
            "EK-FAC is no worse than K-FAC from one target an example.",
            ("EK-FAC", lds["ekfac"]),
            ("K-FAC", lds["kfac_one"]),
            -0.005,
        ),
        _order(
            "K-FAC is better than the empirical Fisher matrix, though that is dense.",
            ("K-FAC", lds["kfac"]),
            ("empirical Fisher", lds["fisher"]),
            0.03,
        ),
        _order(
            "Any curvature is far better than none.",
            ("empirical Fisher", lds["fisher"]),
            ("identity", lds["identity"]),
            0.15,
        ),
    ]


def _order(claim: str, one: tuple[str, float], other: tuple[str, float], margin: float) -> Finding:
    by = f"by at least {margin:.2f}" if margin > 0 else f"or lower by at most {-margin:.3f}"
    expected = "LDS higher " + by if margin else "LDS at least as high"
    return Finding(
        claim,
        expected,
        f"{one[0]} {one[1]:.3f}, {other[0]} {other[1]:.3f}",
        bool(one[1] >= other[1] + margin),
    )


def _weighted(lds: dict[str, float]) -> Finding:
    plain, weighted, exact = lds["ekfac_one"], lds["ekfac_weighted"], lds["ekfac"]
    return Finding(
        "One target drawn by importance, this library's default, is nearer to the exact "
        "expectation than one drawn from the model.",
        "difference in LDS from the exact expectation no larger",
        f"exact {exact:.3f}, weighted {weighted:.3f}, plain {plain:.3f}",
        bool(abs(weighted - exact) <= abs(plain - exact)),
    )


def _identities(found: Sequence["Found"]) -> list[Finding]:
    shares = [share for one in found for share in one.shares]
    # Of the squared norm of the blocks: where K-FAC has no error there is nothing to add up.
    defect = max(s.defect * s.kfac**2 for s in shares)
    trace = max(s.trace for s in shares)
    closer = all(share.ekfac <= share.kfac for share in shares)
    judged = [
        Finding(
            "EK-FAC is the projection of the exact blocks on K-FAC's basis.",
            "errors add up and traces agree to 1e-9, and it is never farther away than K-FAC",
            f"largest defect {defect:.1e}, largest difference of traces {trace:.1e}",
            bool(defect < 1e-9 and trace < 1e-9 and closer),
        )
    ]
    layers = [a.same_layer for one in found for a in one.anatomies if a.title.endswith("relu")]
    if layers:
        judged.append(
            Finding(
                "In a ReLU network Hessian and Gauss-Newton matrix agree within each layer.",
                "to 1e-9",
                f"largest relative difference {max(layers):.1e}",
                bool(max(layers) < 1e-9),
            )
        )
    return judged


def _eigenvalues(found: Sequence["Found"], lds: dict[str, float]) -> list[Finding]:
    first = found[0].shares[0].title

    def values(way: str, ending: str) -> list[float]:
        return [
            share.share
            for one in found
            for share in one.shares
            if share.way == way and share.title.endswith(ending)
        ]

    exact, empirical = values("exact", first), values("training labels", first)
    step = lds["ekfac"] - lds["kfac"]
    above = lds["block"] - lds["ekfac"]
    judged = [
        Finding(
            "Wrong eigenvalues are most of K-FAC's error, as the paper says.",
            f"share above 0.5 on {first} with exact factors",
            f"{min(exact):.3f} to {max(exact):.3f}; from training labels "
            f"{min(empirical):.2f} to {max(empirical):.2f}",
            bool(np.mean(exact) > 0.5),
        ),
        Finding(
            "In a shallow network with exact factors the basis is the error, and from training "
            "labels the eigenvalues are.",
            "share below 0.2 and above 0.5",
            f"{np.mean(exact):.3f} and {np.mean(empirical):.3f}",
            bool(np.mean(exact) < 0.2 and np.mean(empirical) > 0.5),
        ),
        Finding(
            "The step from EK-FAC to K-FAC costs more LDS than that from blocks to EK-FAC.",
            "a larger loss, each with exact expectations",
            f"{step:.3f} against {above:.3f}",
            bool(step > above),
        ),
    ]
    deep = values("exact", "relu")
    if deep:
        judged.insert(
            2,
            Finding(
                "In a deep ReLU network wrong eigenvalues are most of the error even so.",
                "share above 0.5",
                f"{min(deep):.3f} to {max(deep):.3f}",
                bool(np.mean(deep) > 0.5),
            ),
        )
        judged.insert(
            3,
            Finding(
                "Wrong eigenvalues matter more in the deep network than in the shallow one.",
                "with exact factors, a larger share in every seed",
                f"{min(deep):.3f} to {max(deep):.3f} against {min(exact):.3f} to {max(exact):.3f}",
                bool(min(deep) > max(exact)),
            ),
        )
    return judged


def _indefinite(found: Sequence["Found"], dampings: Sequence[float]) -> Finding:
    lowest = min(one.anatomies[0].lowest for one in found)
    return Finding(
        "The Hessian of the mean loss has negative eigenvalues even at a minimum of J, so that "
        "small dampings do not cover them.",
        f"lowest below minus the smallest damping tried, {dampings[0]:.0e}",
        f"{lowest:.2e}",
        bool(lowest < -dampings[0]),
    )


def _mislabelled(found: Sequence["Found"]) -> Finding:
    lowest = {name: min(min(one.suspicion[name]) for one in found) for name in found[0].suspicion}
    matrices = {k: v for k, v in lowest.items() if k not in ("loss", "gradient norm")}
    worst = min(matrices, key=matrices.__getitem__)
    return Finding(
        "Self-influence finds wrong labels whatever the curvature and the damping.",
        "AUROC at least 0.97 for every curvature, damping and seed",
        f"lowest {matrices[worst]:.3f} ({worst}); loss alone {lowest['loss']:.3f}, gradient norm "
        f"{lowest['gradient norm']:.3f}",
        bool(matrices[worst] >= 0.97),
    )


def _cold(found: Sequence["Found"]) -> Finding:
    halves = float(np.mean([one.halves for one in found]))
    warm, cold = best_lds(found, "hessian").mean(), best_lds(found, "hessian", "cold").mean()
    return Finding(
        "Retraining from scratch agrees with itself only in part, and is predicted less well.",
        "LDS of the Hessian lower than against retraining from the trained weights",
        f"{cold:.3f} against {warm:.3f}; two halves of its seeds agree to {halves:.2f}",
        bool(cold < warm),
    )
