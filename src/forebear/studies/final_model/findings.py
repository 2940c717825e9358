"""Claims about final-model attribution, held against what the study measured.

The numbers that are expected come from reference runs of a comparison like that of Wei et al.
(2025) on small networks with tanh; with ReLU single runs dip and they are loosened.
"""

from typing import TYPE_CHECKING

import numpy as np

from forebear.studies.base import Finding

if TYPE_CHECKING:
    from forebear.studies.final_model import Outcome

FAR = 20
"""Epochs at which the claims about far training are judged."""


def findings(outcome: "Outcome", *, activation: str) -> list[Finding]:
    """Every claim that the entrants present allow to be judged."""
    relu = activation == "relu"
    judged = [
        _first_order_fades(outcome, 0.90 if relu else 0.95),
        _fixed_damping(outcome),
        _horizon_high(outcome, 0.80 if relu else 0.90),
        _horizon_wins(outcome),
        _grid_effect(outcome),
        _optimum(outcome),
        _filter(outcome),
        _upper_end(outcome, "cosine"),
        _upper_end(outcome, "Spearman"),
        _layers(outcome),
        _limit(outcome),
        _averaging(outcome),
        _weak(outcome),
        _first_order_relative(outcome),
        _same_system(outcome),
        _reliable(outcome),
    ]
    return [finding for finding in judged if finding is not None]


def _first_order_fades(outcome: "Outcome", least: float) -> Finding | None:
    near, far = outcome.at(1), outcome.at(FAR)
    if near is None or far is None:
        return None
    cosine = outcome.mean("graddot")
    return Finding(
        "GradDot is right for little further training and fades as training goes on.",
        f"cosine at least {least:.2f} after 1 epoch, lower by at least 0.25 after {FAR}",
        f"{cosine[near]:.3f} after 1 epoch, {cosine[far]:.3f} after {FAR}",
        bool(cosine[near] >= least and cosine[near] - cosine[far] >= 0.25),
    )


def _fixed_damping(outcome: "Outcome") -> Finding | None:
    key = _present(outcome, "gn_100", "cg_100")
    near, far = outcome.at(1), outcome.at(FAR)
    if key is None or near is None or far is None:
        return None
    fixed, dot = outcome.mean(key), outcome.mean("graddot")
    return Finding(
        "With one fixed damping (100 λ₀) influence starts below GradDot and ends above it.",
        f"below by at least 0.1 after 1 epoch, above by at least 0.2 after {FAR}",
        f"{fixed[near] - dot[near]:+.3f} after 1 epoch, {fixed[far] - dot[far]:+.3f} after {FAR}",
        bool(dot[near] - fixed[near] >= 0.1 and fixed[far] - dot[far] >= 0.2),
    )


def _horizon_high(outcome: "Outcome", least: float) -> Finding | None:
    key = _present(outcome, "horizon", "cg_horizon")
    if key is None:
        return None
    cosine = outcome.mean(key)
    places = [a for a, epochs in enumerate(outcome.epochs) if epochs <= FAR]
    worst = min(places, key=lambda a: cosine[a])
    return Finding(
        "Damping matched to the horizon, λ = 1/(ηT), stays right as training goes on.",
        f"cosine at least {least:.2f} through epoch {FAR}",
        f"lowest {cosine[worst]:.3f}, after {outcome.epochs[worst]} epochs",
        bool(cosine[worst] >= least),
    )


def _horizon_wins(outcome: "Outcome") -> Finding | None:
    key = _present(outcome, "horizon", "cg_horizon")
    places = [a for a, epochs in enumerate(outcome.epochs) if epochs >= 2]
    if key is None or not places:
        return None
    ahead = outcome.mean(key) - outcome.mean("graddot")
    worst = min(places, key=lambda a: ahead[a])
    return Finding(
        "From epoch 2 on horizon-matched damping is closer than GradDot.",
        "a higher cosine at every amount",
        f"least ahead by {ahead[worst]:+.3f}, after {outcome.epochs[worst]} epochs",
        bool(ahead[worst] > 0),
    )


def _grid_effect(outcome: "Outcome") -> Finding | None:
    horizon = _present(outcome, "horizon", "cg_horizon")
    fixed = [key for key in outcome.values if key.startswith("cg_") and key[3:4].isdigit()]
    if horizon is None or not fixed:
        return None
    grid = np.stack([outcome.mean(key) for key in fixed])  # [λ, amounts]
    spread = grid.mean(1).max()
    matched = outcome.mean(horizon).mean()
    return Finding(
        "That influence functions are stable but lower is an effect of keeping one damping.",
        "no fixed λ of the grid reaches the mean over amounts of the matched one",
        f"best fixed λ {spread:.3f}, matched {matched:.3f}",
        bool(matched > spread),
    )


def _optimum(outcome: "Outcome") -> Finding | None:
    if outcome.sweep is None:
        return None
    from forebear.studies.final_model import SWEEP

    best = SWEEP[outcome.sweep.argmax(1)]  # [amounts]
    factors = best * np.asarray(outcome.horizons)
    return Finding(
        "The best damping falls as 1/(ηT).",
        "the best λ × ηT lies between 0.1 and 10 at every amount",
        f"{factors.min():.2g} to {factors.max():.2g}",
        bool(factors.min() >= 0.1 and factors.max() <= 10),
    )


def _filter(outcome: "Outcome") -> Finding | None:
    if _present(outcome, "filter") is None or _present(outcome, "horizon") is None:
        return None
    ahead = outcome.mean("filter") - outcome.mean("horizon")
    return Finding(
        "The exact filter of gradient descent, f_T, is no worse than its surrogate λ = 1/(ηT).",
        "a cosine no lower than 0.02 below at every amount",
        f"between {ahead.min():+.3f} and {ahead.max():+.3f}",
        bool(ahead.min() >= -0.02),
    )


def _upper_end(outcome: "Outcome", measure: str) -> Finding | None:
    if _present(outcome, "unrolled") is None:
        return None
    others = [key for key in outcome.values if key != "unrolled"]
    best = np.stack([outcome.mean(key, measure) for key in others]).max(0)
    ahead = outcome.mean("unrolled", measure) - best
    by = "cosine" if measure == "cosine" else "rank correlation"
    return Finding(
        f"By {by} the derivative along the trajectory is the accurate end of the family.",
        f"a {by} no lower than 0.01 below the best other method at every amount",
        f"between {ahead.min():+.3f} and {ahead.max():+.3f} of the best other",
        bool(ahead.min() >= -0.01),
    )


def _layers(outcome: "Outcome") -> Finding | None:
    keys = ("horizon", "layers_horizon", "ekfac_horizon")
    if any(key not in outcome.values for key in keys):
        return None
    whole, layers, ekfac = (float(outcome.mean(key)[-1]) for key in keys)
    return Finding(
        "What EK-FAC misses of far training is mostly the curvature between layers.",
        f"after {outcome.epochs[-1]} epochs more is lost from the whole Gauss-Newton matrix to its "
        "layers than from those to EK-FAC",
        f"whole {whole:.3f}, by layer {layers:.3f}, EK-FAC {ekfac:.3f}, all with λ = 1/(ηT)",
        bool(whole - layers > layers - ekfac),
    )


def _limit(outcome: "Outcome") -> Finding | None:
    if _present(outcome, "gn_large") is None:
        return None
    claim = "With ever larger damping influence becomes GradDot."
    return _alike(outcome, "gn_large", "graddot", 0.999, claim)


def _same_system(outcome: "Outcome") -> Finding | None:
    pairs = [("cg_100", "gn_100"), ("cg_100", "lissa_100")]
    known = [pair for pair in pairs if all(key in outcome.scores for key in pair)]
    if not known:
        return None
    lowest = min(_likeness(outcome, *pair) for pair in known)
    return Finding(
        "Conjugate gradients, LiSSA and an exact solve answer the same equation.",
        "cosine between their scores at least 0.99",
        f"lowest {lowest:.4f}",
        bool(lowest >= 0.99),
    )


def _first_order_relative(outcome: "Outcome") -> Finding | None:
    if _present(outcome, "datainf") is None:
        return None
    claim = "DataInf behaves as a first-order method."
    return _alike(outcome, "datainf", "graddot", 0.9, claim)


def _alike(outcome: "Outcome", one: str, other: str, least: float, claim: str) -> Finding:
    cosine = _likeness(outcome, one, other)
    return Finding(
        claim,
        f"cosine between the scores of both at least {least:g}",
        f"{cosine:.4f}",
        bool(cosine >= least),
    )


def _averaging(outcome: "Outcome") -> Finding:
    change = outcome.mean("graddot") - outcome.single
    return Finding(
        "Averaging the gold standard over seeds does not lower the agreement.",
        "never lower by more than 0.05 for GradDot",
        f"lowest change {change.min():+.3f}",
        bool(change.min() >= -0.05),
    )


def _weak(outcome: "Outcome") -> Finding | None:
    known = [key for key in ("gradcos", "trak") if key in outcome.values]
    highest = {key: float(outcome.mean(key).max()) for key in known}
    text = ", ".join(
        f"{'GradCos' if key == 'gradcos' else 'TRAK'} at most {value:.3f}"
        for key, value in highest.items()
    )
    return Finding(
        "GradCos and TRAK with one model tell little of further training.",
        "cosine below 0.5 at every amount",
        text,
        all(value < 0.5 for value in highest.values()),
    )


def _reliable(outcome: "Outcome") -> Finding:
    lowest = min(outcome.reliability)
    return Finding(
        "A few seeds of the scheme 'every' make a reliable gold standard.",
        "reliability at least 0.9 at every amount",
        f"lowest {lowest:.3f}",
        bool(lowest >= 0.9),
    )


def _likeness(outcome: "Outcome", one: str, other: str) -> float:
    """Mean cosine between two entrants' scores at the first amount."""
    from forebear.metrics import cosine_similarity

    return float(np.nanmean(cosine_similarity(outcome.scores[one][0], outcome.scores[other][0])))


def _present(outcome: "Outcome", *keys: str) -> str | None:
    return next((key for key in keys if key in outcome.values), None)
