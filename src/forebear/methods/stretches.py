"""Scores of stretches of the training set, which other processes can work out."""

from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from forebear.data import Data
from forebear.executors import Executor, results
from forebear.methods.fitted import best_of
from forebear.stream import Result, stretches


class Restrictable(Protocol):
    """What is needed of a fitted method."""

    train: Data

    def on(self, executor: Executor | None) -> Self:
        """The same state for another place."""
        ...

    def restricted(self, positions: Tensor) -> Self:
        """The same state facing some training examples."""
        ...

    def against_training(self, prepared: Any) -> Any:
        """Training positions and scores `[q, b]` of prepared queries."""
        ...

    def require_finite(self, values: Tensor, ids: np.ndarray) -> None:
        """Raise an error with the ids of queries whose scores are not finite."""
        ...

    def self_influence(self) -> Tensor:
        """Score of each training example for itself, `[n]`."""
        ...


@dataclass(frozen=True)
class Stretches:
    """Scores of a group of queries, by the number of the stretch; goes to other processes.

    Queries are prepared once, before: for some curvatures that is most of the work.

    Attributes:
        fitted: the method, to be restricted.
        prepared: the queries.
        ids: theirs, `[q]`.
        columns: positions of each stretch.
        top: how many scores to keep of a stretch, times which sign they are the largest; None
            keeps all.
    """

    fitted: Restrictable
    prepared: Any
    ids: np.ndarray
    columns: tuple[slice, ...]
    top: tuple[int, float] | None = None

    def __call__(self, number: int) -> Result:
        """`"scores"` `[q, b]`, or `"values"` and `"positions"` `[q, k]`."""
        positions = torch.arange(self.columns[number].start, self.columns[number].stop)
        part = self.fitted.restricted(positions)
        found = [values.cpu() for _, values in part.against_training(self.prepared)]
        scores = torch.cat(found, 1)
        self.fitted.require_finite(scores, self.ids)
        if self.top is None:
            return {"scores": scores}
        k, sign = self.top
        values, where = best_of(sign * scores, positions.expand(scores.shape), k)
        return {"values": values, "positions": where}


@dataclass(frozen=True)
class _Own:
    """Self-influence by the number of the stretch."""

    fitted: Restrictable
    columns: tuple[slice, ...]

    def __call__(self, number: int) -> Result:
        positions = torch.arange(self.columns[number].start, self.columns[number].stop)
        return {"own": self.fitted.restricted(positions).self_influence()}


def own_elsewhere(fitted: Restrictable, executor: Executor | None) -> Tensor:
    """Self-influence of all training examples, `[n]`, worked out by `executor`."""
    columns = tuple(stretches(len(fitted.train)))
    names = [f"examples-{each.start:09d}" for each in columns]
    work = _Own(fitted.on(None), columns)
    return torch.cat([r["own"] for r in results(work, names, "self-influence", executor=executor)])
