"""What the removal study measures: errors of removal estimates on random logistic regressions.

Features are standard normal, the truth is `signal · e_1` and labels are drawn from it. Errors are
norms of parameter vectors, in the mean over random sets. Everything is float64 and seeded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forebear.removal import Factorised, LinearModel, shift

SIGNAL = 2.0

COMPARED = ("influence", "rescaled", "rescaled_n", "rescaled_d", "newton_step", "newton_step_2")


@dataclass(frozen=True)
class Cell:
    """Mean errors at one place of a grid, for each data seed.

    Attributes:
        n: examples.
        d: dimensions.
        k: removed examples.
        size: of the shift, `[seeds]`.
        errors: distance of each estimator to the exact shift, `[seeds]` by name.
        gaps: distance of each estimator to the Newton step, `[seeds]` by name.
    """

    n: int
    d: int
    k: int
    size: np.ndarray
    errors: dict[str, np.ndarray]
    gaps: dict[str, np.ndarray]


def problem(
    n: int, d: int, seed: int, *, signal: float = SIGNAL, penalty: float = 0.0
) -> LinearModel:
    """A logistic regression at its optimum."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    chance = torch.rand(n, generator=generator, dtype=torch.float64)
    y = (chance < (signal * x[:, 0]).sigmoid()).long()
    return LinearModel.of(x, y, family="logistic", penalty=penalty).fitted()


def random_sets(n: int, k: int, sets: int, seed: int) -> Tensor:
    """Uniform sets without repetition, `[sets, k]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(sets, n, generator=generator).topk(k, dim=1).indices


def measure(
    model: LinearModel, ks: Sequence[int], sets: int, seed: int, names: Sequence[str] = COMPARED
) -> list[dict[str, float]]:
    """Mean errors and gaps of the estimators on one data set, a row for each k."""
    factorised, rows = Factorised(model), []
    for k in ks:
        groups = random_sets(len(model), k, sets, 7919 * seed + k)
        exact = shift(factorised, groups, "exact")
        newton = shift(factorised, groups, "newton_step")
        row = {"size": _mean_norm(exact)}
        for name in names:
            estimate = newton if name == "newton_step" else shift(factorised, groups, name)
            row[name] = _mean_norm(estimate - exact)
            row[f"gap:{name}"] = _mean_norm(estimate - newton)
        rows.append(row)
    return rows


def cell(
    n: int,
    d: int,
    ks: Sequence[int],
    seeds: Sequence[int],
    sets: int,
    *,
    signal: float = SIGNAL,
    penalty: float = 0.0,
) -> list[Cell]:
    """Errors at one n and d for several k, over data seeds."""
    each = [measure(problem(n, d, s, signal=signal, penalty=penalty), ks, sets, s) for s in seeds]
    found = []
    for i, k in enumerate(ks):
        column = {key: np.array([rows[i][key] for rows in each]) for key in each[0][i]}
        errors = {name: column[name] for name in COMPARED}
        gaps = {name: column[f"gap:{name}"] for name in COMPARED}
        found.append(Cell(n, d, k, column["size"], errors, gaps))
    return found


@dataclass(frozen=True)
class Exponents:
    """A power law fitted to means over seeds.

    Attributes:
        values: fitted exponents, in the order of the terms.
        low: of 95 % bootstrap intervals over data seeds.
        high: the same.
        fit: R² of the logarithms.
    """

    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    fit: float


def fit_law(terms: np.ndarray, values: np.ndarray, *, resamples: int = 1000) -> Exponents:
    """Fit `log value = c + Σ_j a_j term_j`; intervals by resampling seeds.

    Args:
        terms: logarithms `[cells, j]`.
        values: `[cells, seeds]`.
        resamples: of the seeds.
    """
    design = np.column_stack([np.ones(len(terms)), terms])
    solve = np.linalg.pinv(design)
    logs = np.log(values.mean(1))
    found = solve @ logs
    left = logs - design @ found
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, values.shape[1], (resamples, values.shape[1]))
    again = np.log(values[:, drawn].mean(2)).T @ solve.T  # [resamples, 1 + j]
    low, high = np.percentile(again[:, 1:], [2.5, 97.5], axis=0)
    return Exponents(found[1:], low, high, float(1 - left.var() / logs.var()))


def self_logit_slopes(
    n: int, d: int, penalty: float, seeds: Sequence[int], sets: int = 60
) -> dict[str, float]:
    """Slope of the predicted on the real change of an example's own logit when it is left out.

    Features are scaled to a squared length near 20, as the paper's bounds ask for.
    """
    sums: dict[str, list[float]] = {"leverage": [], "influence": [], "rescaled": []}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, d, generator=generator, dtype=torch.float64) * (20 / d) ** 0.5
        truth = torch.randn(d, generator=generator, dtype=torch.float64)
        logits = x @ truth * (2.0 / (20 / d * truth.square().sum()) ** 0.5)
        y = (torch.rand(n, generator=generator, dtype=torch.float64) < logits.sigmoid()).long()
        model = LinearModel.of(x, y, family="logistic", penalty=penalty).fitted()
        factorised = Factorised(model)
        rows = torch.randperm(n, generator=generator)[:sets, None]
        own = x[rows[:, 0]]
        real = (own * shift(factorised, rows, "exact")).sum(1)
        sums["leverage"].append(factorised.leverages.mean().item())
        for name in ("influence", "rescaled"):
            predicted = (own * shift(factorised, rows, name)).sum(1)
            sums[name].append(float((predicted @ real) / (real @ real)))
    return {name: float(np.mean(values)) for name, values in sums.items()}


def _mean_norm(vectors: Tensor) -> float:
    return vectors.norm(dim=1).mean().item()
