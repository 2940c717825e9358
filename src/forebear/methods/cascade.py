"""A cascade: a cheap method looks at everything, an expensive one at what the cheap one kept."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from forebear.data import Data
from forebear.errors import DataError, TaskError
from forebear.executors import Executor
from forebear.methods.baselines import FittedSimilarity
from forebear.methods.fitted import Fitted, Method
from forebear.methods.pixels import FittedPixels
from forebear.methods.settings import settings_of
from forebear.search import RunningTop
from forebear.stream import BATCH
from forebear.task import Task
from forebear.types import TopK, check_k


@dataclass(frozen=True)
class Cascade:
    """Methods in the order of their cost; each scores only what the one before it kept.

    `Cascade([Similarity(), TRAK(), EKFAC()], keep=[10_000, 500])` keeps the 10,000 most similar
    examples of each query, of these the 500 that TRAK puts first, and lets EK-FAC put those in
    order. Every method is fitted once, to the whole training set: its scores of the candidates are
    those that it would give without a cascade. What a cheap method drops stays dropped;
    `FittedCascade.recall` measures how much of the expensive method's own answer that is.

    Attributes:
        stages: two or more methods, the cheapest first.
        keep: how many candidates of each query every stage but the last hands on, descending; a
            number above that of the training examples keeps them all.
        together: queries whose candidates are put into one set for the next stage. Few make sets
            small, many share the work that examples cost.

    Raises:
        TaskError: numbers do not fit the stages.
    """

    stages: Sequence[Method]
    keep: Sequence[int]
    together: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "keep", tuple(self.keep))
        _require_fit(len(self.stages), self.keep, self.together)

    @property
    def name(self) -> str:
        """What results are called."""
        return "cascade"

    def fit(
        self,
        task: Task,
        train: Any,
        *,
        ids: Any = None,
        batch_size: int = BATCH,
        executor: Executor | None = None,
    ) -> "FittedCascade":
        """Fit every stage to the whole training set.

        `executor` is where they are fitted and where the first stage scores; the candidates of
        the others are few and are scored in this process.
        """
        data = Data.of(train, ids=ids, collate=task.collate)
        stages = [
            stage.fit(task, data, batch_size=batch_size, executor=executor) for stage in self.stages
        ]
        return FittedCascade(stages, self.keep, together=self.together)


@dataclass(frozen=True)
class CascadeRecall:
    """How much of the last stage's answer over all examples a cascade keeps.

    Attributes:
        k: length of the answers that were compared.
        after: `[stages - 1, q]` share of the full answer that is left after each stage but the
            last, which is also the share that the cascade finds.
        query_ids: `[q]`.
    """

    k: int
    after: Tensor
    query_ids: np.ndarray

    @property
    def mean(self) -> float:
        """Mean over queries of what is left in the end."""
        return self.after[-1].mean().item()

    def __str__(self) -> str:
        left = ", then ".join(f"{share:.1%}" for share in self.after.mean(1).tolist())
        least = self.after[-1].min().item()
        return (
            f"of the full top {self.k}, {left} is left after the stages (mean of "
            f"{len(self.query_ids)} queries, least {least:.1%})"
        )


class FittedCascade:
    """Fitted stages, which may be saved and loaded one by one, and asked for top-k lists.

    Args:
        stages: fitted methods with one training set, the cheapest first.
        keep: candidates that every stage but the last hands on.
        together: queries whose candidates are put into one set.

    Raises:
        TaskError: numbers do not fit the stages.
        MismatchError: the stages have other training sets or models.
    """

    def __init__(
        self, stages: Sequence[Fitted], keep: Sequence[int], *, together: int = 16
    ) -> None:
        _require_fit(len(stages), keep, together)
        self.stages = tuple(stages)
        self.keep = tuple(min(number, len(stages[0].train)) for number in keep)
        self.together = together
        self.train = stages[-1].train
        last = stages[-1]._provenance(self.train)
        for stage in stages[:-1]:
            stage._provenance(self.train).require_same(last, ("model", "train"))
            if not np.array_equal(stage.train.ids, self.train.ids):
                raise DataError("the stages have other ids: fit them with the same ids=")

    def top(self, queries: Any, k: int = 10, *, opponents: bool = False, ids: Any = None) -> TopK:
        """The `k` strongest proponents (or opponents) among the candidates of each query.

        For opponents every stage keeps its own opponents, except that similarity hands on the
        most similar examples all the same: those with another label are among them.

        Raises:
            DataError: `k` is above the number of candidates.
        """
        check_k(k, len(self.train))
        if k > self.keep[-1]:
            raise DataError(
                f"k is {k} and {self.keep[-1]} candidates reach the last stage: choose a smaller "
                "k, or a larger keep="
            )
        data = self.stages[-1]._queries(queries, ids)
        *_, (positions, values) = self._through(data, k, opponents)
        last = self.stages[-1]._provenance(data)
        settings = {
            "stages": [
                settings_of(stage.method) | stage.details() | stage.told(data)
                for stage in self.stages
            ],
            "keep": list(self.keep),
            "together": self.together,
        }
        return TopK(
            ids=self.train.ids[positions],
            values=torch.from_numpy(values),
            query_ids=data.ids,
            opponents=opponents,
            provenance=replace(last, method="cascade", settings=settings),
        )

    def recall(
        self, queries: Any, k: int = 10, *, opponents: bool = False, ids: Any = None
    ) -> CascadeRecall:
        """Compare with the last stage's own top `k` over all examples, on a sample of queries.

        This costs what the last stage costs without a cascade: choose few queries.
        """
        data = self.stages[-1]._queries(queries, ids)
        full = self.stages[-1].top(data, k, opponents=opponents).ids
        after = []
        for positions, _ in self._through(data, min(k, self.keep[-1]), opponents):
            kept = self.train.ids[positions]
            found = [np.isin(mine, left).mean() for mine, left in zip(full, kept, strict=True)]
            after.append(torch.tensor(found, dtype=torch.float64))
        return CascadeRecall(k=k, after=torch.stack(after[:-1]), query_ids=data.ids)

    def self_influence(self) -> Tensor:
        """That of the last stage, `[n]`: there is no query to choose candidates for."""
        return self.stages[-1].self_influence()

    def score(self, queries: Any, *, ids: Any = None) -> NoReturn:
        """Refused: most pairs have no score.

        Raises:
            TaskError: always.
        """
        raise TaskError(
            "a cascade scores only the candidates of each query: ask for top(queries, k), or score "
            "with its last stage alone, stages[-1].score(queries)"
        )

    def _through(
        self, data: Data, k: int, opponents: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Positions and scores `[q, keep]` that each stage hands on; the last one has `k`."""
        lowest = [opponents and not _is_blind(stage) for stage in self.stages[:-1]] + [opponents]
        first = self.stages[0].top(data, self.keep[0], opponents=lowest[0])
        positions = _positions(self.train.ids, first.ids)
        yield positions, first.values.cpu().numpy()
        numbers = (*self.keep[1:], k)
        for stage, number, low in zip(self.stages[1:], numbers, lowest[1:], strict=True):
            sign = -1.0 if low else 1.0
            kept = []
            for start in range(0, len(data), self.together):
                rows = slice(start, start + self.together)
                group = data.slice(slice(start, min(start + self.together, len(data))))
                kept.append(_best_of(stage, group, positions[rows], number, sign))
            positions = np.concatenate([some for some, _ in kept])
            values = sign * np.concatenate([some for _, some in kept])
            yield positions, values


def _is_blind(stage: Fitted) -> bool:
    """Whether the scores do not know labels: opponents are then as alike as proponents."""
    return isinstance(stage, FittedSimilarity | FittedPixels)


def _best_of(
    stage: Fitted, queries: Data, candidates: np.ndarray, k: int, sign: float
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and signed scores `[q, k]` of the strongest candidates `[q, c]` of each query."""
    union = np.unique(candidates)
    member = np.zeros((len(queries), len(union)), bool)
    member[np.arange(len(queries))[:, None], np.searchsorted(union, candidates)] = True
    running = RunningTop.empty(k, len(queries))
    for rows, columns, values in scores_of(stage, queries, union):
        stage.require_finite(values, queries.ids[rows])
        keys, inside = member[rows, columns].nonzero()
        scores = sign * values.cpu().numpy()[keys, inside]
        running = running.add(keys + rows.start, union[columns][inside], scores)
    return running.positions.reshape(-1, k), running.values.reshape(-1, k)


def scores_of(
    fitted: Fitted, queries: Data, positions: np.ndarray
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Scores of some training examples only, piece by piece; columns count `positions` `[m]`.

    Methods that compare gradients or embeddings look at those examples and no others. Any other
    method scores all of them, and the rest is dropped.
    """
    part = fitted.restricted(torch.from_numpy(positions))
    if part is not None:
        yield from part.pieces(queries)
        return
    for rows, columns, values in fitted.pieces(queries):
        first, last = np.searchsorted(positions, (columns.start, columns.stop))
        inside = torch.from_numpy(positions[first:last]) - columns.start
        yield rows, slice(int(first), int(last)), values[:, inside.to(values.device)]


def _positions(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where `wanted` ids, of any shape, stand in `ids`."""
    order = np.argsort(ids, kind="stable")
    return order[np.searchsorted(ids, wanted, sorter=order)]


def _require_fit(stages: int, keep: Sequence[int], together: int) -> None:
    if stages < 2 or len(keep) != stages - 1:
        raise TaskError(
            f"a cascade has {stages} stages and {len(keep)} numbers to keep: it needs two stages "
            "or more, and a number for each but the last"
        )
    if min(keep) < 1 or list(keep) != sorted(keep, reverse=True):
        raise TaskError(f"keep is {list(keep)}: numbers must be at least 1 and must not grow")
    if together < 1:
        raise TaskError(f"together is {together}: it must be at least 1")
