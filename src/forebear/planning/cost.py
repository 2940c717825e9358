"""What was measured on samples, and the cost that they say the whole will have.

The cost is a sum of terms in n examples and q queries,

    t(n, q) = c₀ + c₁ n + c₂ q + c₃ n q [+ c₄ n²],

with coefficients of zero or more, fitted to the samples with equal weight for equal relative
errors. Which terms a method has is said in `terms.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Basis = dict[str, Callable[[float, float], float]]

TERMS: Basis = {
    "1": lambda n, q: 1.0,
    "n": lambda n, q: n,
    "q": lambda n, q: q,
    "nq": lambda n, q: n * q,
    "n2": lambda n, q: n * n,
    "n3": lambda n, q: n * n * n,
}
"""What a cost may be made of."""


@dataclass(frozen=True)
class Point:
    """One measured run.

    Attributes:
        examples: n.
        queries: q.
        seconds: wall-clock time.
        memory: highest resident bytes of the process.
        disk: bytes written.
        processor: seconds of all processors together, whatever else runs on them.
    """

    examples: int
    queries: int
    seconds: float
    memory: float = 0.0
    disk: float = 0.0
    processor: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """A number and the range it is expected in."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Cost:
    """A fitted sum of terms.

    Attributes:
        coefficients: by name of the term.
        batch: where terms in n count a batch: `min(n, batch)` has the coefficient `"batch"`.
    """

    coefficients: dict[str, float]
    batch: int = 0

    def at(self, examples: float, queries: float) -> float:
        """The cost of so many examples and queries."""
        return sum(c * self._term(name)(examples, queries) for name, c in self.coefficients.items())

    def _term(self, name: str) -> Callable[[float, float], float]:
        if name == "batch":
            return lambda n, q: min(n, self.batch)
        return TERMS[name]

    @classmethod
    def fitted(
        cls,
        points: Sequence[Point],
        values: Sequence[float],
        terms: Sequence[str],
        *,
        batch: int = 0,
    ) -> "Cost":
        """Fit to `values` at `points` by non-negative least squares of relative errors.

        Terms that the points cannot tell apart from earlier ones are left out: with one number of
        queries, say, what grows with queries counts as part of the rest.
        """
        from scipy.optimize import nnls

        measured = np.maximum(np.asarray(values, dtype=float), 1e-12)
        blank = cls({}, batch)
        kept, columns = [], np.empty((len(points), 0))
        for name in terms:
            term = blank._term(name)
            column = np.array([term(p.examples, p.queries) for p in points], dtype=float)
            wider = np.column_stack([columns, column / measured / max(column.max(), 1.0)])
            lengths = np.linalg.norm(wider, axis=0)
            if (lengths > 0).all() and np.linalg.matrix_rank(wider / lengths, 1e-6) == len(lengths):
                kept.append((name, max(column.max(), 1.0)))
                columns = wider
        solution, _ = nnls(columns, np.ones(len(points)))
        found = {name: float(c) / s for (name, s), c in zip(kept, solution, strict=True)}
        return cls(found, batch)


def extrapolate(
    points: Sequence[Point],
    values: Sequence[float],
    terms: Sequence[str],
    examples: int,
    queries: int,
    *,
    batch: int = 0,
) -> tuple[Cost, Estimate]:
    """A cost and its value at the whole.

    The range covers the fits that leave one point out, and what the fit misses the points by.
    """
    cost = Cost.fitted(points, values, terms, batch=batch)
    value = float(cost.at(examples, queries))
    others = [value]
    if len(points) > 3:
        for i in range(len(points)):
            rest = [*range(i), *range(i + 1, len(points))]
            again = Cost.fitted(
                [points[j] for j in rest], [values[j] for j in rest], terms, batch=batch
            )
            others.append(again.at(examples, queries))
    misses = [
        abs(cost.at(p.examples, p.queries) / max(v, 1e-12) - 1)
        for p, v in zip(points, values, strict=True)
    ]
    missed = min(max(misses, default=0.0), 1.0)
    return cost, Estimate(
        value, float(min(others)) / (1 + missed), float(max(others)) * (1 + missed)
    )
