"""How much scores depend on the damping."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from forebear.curvature import Relative
from forebear.errors import DataError, TaskError
from forebear.stream import BATCH

FACTORS = tuple(10.0 ** np.arange(-6, 3))

STABLE = 0.95
"""Rank correlation between neighbouring dampings from which scores count as stable."""


@dataclass(frozen=True)
class DampingSweep:
    """Scores of the same queries at several dampings, compared.

    Attributes:
        method: name.
        factors: relative damping, ascending, `[k]`.
        damping_used: λ by block, one dictionary for each factor.
        cosine: of the scores at two dampings, mean over queries, `[k, k]`.
        spearman: rank correlation, the same way.
        scores: `[k, query, train]`.
    """

    method: str
    factors: tuple[float, ...]
    damping_used: tuple[dict[str, float], ...]
    cosine: np.ndarray
    spearman: np.ndarray
    scores: Tensor = field(repr=False)

    @property
    def stable_range(self) -> tuple[float, float] | None:
        """Lowest and highest factor of the longest run whose neighbours rank alike.

        Neighbours count as alike from a rank correlation of `STABLE` on. None where no two do. Of
        runs that are equally long, the one with the least damping.
        """
        alike = np.diag(self.spearman, 1) >= STABLE
        best, start = (0, 0), 0
        for i, same in enumerate([*alike, False]):
            if same:
                continue
            if i - start > best[1] - best[0]:
                best = (start, i)
            start = i + 1
        if best[1] == best[0]:
            return None
        return self.factors[best[0]], self.factors[best[1]]

    def __str__(self) -> str:
        """A table with a line for each damping."""
        lines = [
            f"{self.method}: scores at {len(self.factors)} dampings, compared with the next one",
            f"{'factor':>9}  {'λ, mean':>9}  {'cosine':>7}  {'Spearman':>8}",
        ]
        for i, (factor, used) in enumerate(zip(self.factors, self.damping_used, strict=True)):
            value = sum(used.values()) / max(len(used), 1)
            line = f"{factor:9.1e}  {value:9.2e}"
            if i + 1 < len(self.factors):
                line += f"  {self.cosine[i, i + 1]:7.3f}  {self.spearman[i, i + 1]:8.3f}"
            lines.append(line)
        found = self.stable_range
        if found is None:
            lines.append(f"no two neighbours rank alike (Spearman {STABLE} or more)")
        else:
            lines.append(f"neighbours rank alike (Spearman {STABLE} or more) from {found[0]:.1e}")
            lines[-1] += f" to {found[1]:.1e}"
        return "\n".join(lines)


def damping_sweep(
    task: Any,
    train: Any,
    queries: Any,
    method: Any = "ekfac",
    factors: Sequence[float] = FACTORS,
    *,
    batch_size: int = BATCH,
) -> DampingSweep:
    """Score at several dampings, each relative to the mean eigenvalue; the fit is done once.

    Args:
        task: what was trained and what is asked.
        train: the training set.
        queries: what is asked about.
        method: a registered name, or a configuration that has a curvature.
        factors: relative dampings, two or more.
        batch_size: examples at a time.

    Raises:
        DataError: fewer than two factors, or one that is not above zero.
        TaskError: the method has no damping.
    """
    from forebear.methods import get

    ordered = tuple(sorted({float(factor) for factor in factors}))
    if len(ordered) < 2 or not ordered[0] > 0 or not np.isfinite(ordered[-1]):
        raise DataError(
            f"factors are {ordered}: give two or more different ones, finite and above zero"
        )
    chosen = get(method) if isinstance(method, str) else method
    fitted = chosen.fit(task, train, batch_size=batch_size)
    if not hasattr(fitted, "with_damping"):
        raise TaskError(
            f"{chosen.name} has no damping to sweep over: use a method with a curvature, such as "
            "ekfac or exact"
        )
    scores, used = [], []
    for factor in ordered:
        fitted = fitted.with_damping(Relative(factor))
        scores.append(fitted.score(queries).values)
        used.append(_one(fitted.details().get("damping_used", {})))
    stacked = torch.stack(scores)
    values = stacked.double().numpy()
    ranks = rankdata(values, axis=-1)
    ranks -= ranks.mean(-1, keepdims=True)
    return DampingSweep(
        method=chosen.name,
        factors=ordered,
        damping_used=tuple(used),
        cosine=_correlations(values),
        spearman=_correlations(ranks),
        scores=stacked,
    )


def _correlations(values: np.ndarray) -> np.ndarray:
    """Mean over queries of the cosines of all pairs of `[k, q, n]`, without queries that are zero.

    Norms are divided out first, so that tiny scores count as much as others.
    """
    norms = np.linalg.norm(values, axis=-1, keepdims=True)
    unit = np.divide(values, norms, out=np.full_like(values, np.nan), where=norms > 0)
    return np.nanmean(np.einsum("kqn,lqn->qkl", unit, unit), axis=0)


def _one(used: Any) -> dict[str, float]:
    """λ by block; several checkpoints have a mean."""
    if isinstance(used, dict):
        return used
    return {name: sum(each[name] for each in used) / len(used) for name in used[0]}
