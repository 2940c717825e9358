"""What every method shares: the shape of a configuration and of its fitted state."""

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from forebear.data import Data
from forebear.errors import DataError, MismatchError, NonFiniteError, NumericalWarning
from forebear.executors import Executor, Pieces
from forebear.methods.belonging import facts_of, saved_facts
from forebear.methods.settings import settings_of
from forebear.stream import BATCH
from forebear.task import Task
from forebear.types import Provenance, Scores, TopK, check_k, write_json

if TYPE_CHECKING:
    from forebear.methods.blocks import ScoreBlocks

NO_MODEL = "none"
"""Hash of the model where there is none."""

Piece = tuple[slice, slice, Tensor]
"""Query positions, training positions, and their scores `[q, b]`."""

Candidates = tuple[slice, Tensor, Tensor]
"""Query positions, scores `[q, m]`, and the training positions of each, ascending where equal."""


class Method(Protocol):
    """A frozen configuration of a method."""

    @property
    def name(self) -> str:
        """The registered name."""
        ...

    def fit(
        self,
        task: Task,
        train: Any,
        *,
        ids: Any = None,
        batch_size: int = BATCH,
        executor: Executor | None = None,
    ) -> "Fitted":
        """Do all work that depends only on the model and the training set.

        Args:
            task: what was trained and what is asked.
            train: any map-style dataset, or a tuple or dict of tensors.
            ids: a stable id for each example; positions when left out.
            batch_size: examples at a time; changes no score beyond rounding. By default up to 512,
                and fewer where the gradients of so many would take more than 256 MB.
            executor: where to work, now and when scores are asked for; in this process when None.
                What cannot be spread is done in this process all the same.
        """
        ...

    def restore(self, task: Task, train: Data, tensors: dict[str, Tensor]) -> "Fitted":
        """The fitted state that was saved as `tensors`."""
        ...


class Fitted(ABC):
    """A method fitted to a task and a training set: a value that answers queries.

    Subclasses supply scores piece by piece; everything else is here. Pieces come grouped by query
    and, within a group, in the order of the training set.
    """

    units = "ranking"

    def __init__(
        self,
        method: Any,
        task: Task,
        train: Data,
        *,
        batch_size: int,
        executor: Executor | None = None,
    ) -> None:
        self.method = method
        self.task = task
        self.train = train
        self.batch_size = batch_size
        self.executor = executor

    @abstractmethod
    def pieces(self, queries: Data) -> Iterator[Piece]:
        """Scores of all pairs, in memory bounded by a batch."""

    def blocks(self, queries: Data, kept: Pieces | None = None) -> Iterator[Piece]:
        """Scores of all pairs from wherever they are worked out, larger pieces for longer ways.

        Args:
            queries: what is asked about.
            kept: a folder for each block, as `"scores"`; what is there need not be computed.
        """
        for rows, columns, values in self.pieces(queries):
            if kept is not None:
                kept.write(block_name(rows, columns), {"scores": values})
            yield rows, columns, values

    def candidates(self, queries: Data, k: int, sign: float) -> Iterator[Candidates]:
        """Scores times `sign` among which the `k` largest of each query are."""
        for rows, columns, values in self.pieces(queries):
            self.require_finite(values, queries.ids[rows])
            positions = torch.arange(columns.start, columns.stop).expand(values.shape)
            yield rows, sign * values.cpu(), positions

    @abstractmethod
    def self_influence(self) -> Tensor:
        """Score of each training example for itself, `[n]`, in one pass.

        High values mark examples the model had to memorise: wrong labels come first.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The fitted state."""

    def on(self, executor: Executor | None) -> Self:
        """The same state, whose scores are worked out somewhere else; None is this process."""
        again = copy.copy(self)
        again.executor = executor
        return again

    def restricted(self, positions: Tensor) -> Self | None:
        """The same state facing the training examples at `positions` `[m]` only, ascending.

        Its scores are those of the whole method for these examples: the curvature and the number
        of examples that a removal is one of stay those of the whole training set. It works in this
        process. None where a method has to look at all examples.
        """
        return None

    @property
    def coverage(self) -> float | None:
        """Share of the trainable parameters seen; None for methods that use no gradients."""
        return None

    def details(self) -> dict[str, Any]:
        """What was found while fitting and belongs into the record, such as the damping used."""
        return {}

    def told(self, queries: Data) -> dict[str, Any]:
        """What was found while these queries were answered, and belongs into the record."""
        return {}

    @cached_property
    def model_hash(self) -> str:
        """Hash of the model's weights when first asked for."""
        return self.task.model_hash()

    def score(self, queries: Any, *, ids: Any = None) -> Scores:
        """Scores of all pairs as one matrix `[query, train]`; positive = proponent.

        Raises:
            NonFiniteError: a score is NaN or infinite.
        """
        data = self._queries(queries, ids)
        values: Tensor | None = None
        for rows, columns, piece in self.blocks(data):
            if values is None:
                values = torch.empty(len(data), len(self.train), dtype=piece.dtype)
            values[rows, columns] = piece.cpu()
        assert values is not None
        self.require_finite(values, data.ids)
        return Scores(
            values=values,
            query_ids=data.ids,
            train_ids=self.train.ids,
            provenance=self._provenance(data),
        )

    def top(self, queries: Any, k: int = 10, *, opponents: bool = False, ids: Any = None) -> TopK:
        """The `k` strongest proponents (or opponents) of each query; the matrix never exists.

        Ties fall to the earlier example, as in `Scores.top`.
        """
        check_k(k, len(self.train))
        data = self._queries(queries, ids)
        sign = -1.0 if opponents else 1.0
        values, positions = strongest(self.candidates(data, k, sign), k)
        return TopK(
            ids=self.train.ids[positions.numpy()],
            values=sign * values,
            query_ids=data.ids,
            opponents=opponents,
            provenance=self._provenance(data),
        )

    def score_to(self, queries: Any, folder: str | Path, *, ids: Any = None) -> "ScoreBlocks":
        """Scores of all pairs in a folder, block by block, where the matrix is too large.

        What is there is not computed again, so that what was stopped halfway goes on.

        Raises:
            MismatchError: the folder holds scores of another model, loss, method, or other data.
            NonFiniteError: a score is NaN or infinite.
        """
        from forebear.methods.blocks import score_blocks

        return score_blocks(self, self._queries(queries, ids), folder)

    def save(self, folder: str | Path) -> None:
        """Write `fitted.json` and `fitted.safetensors`; `forebear.load` reads them."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: value.contiguous() for key, value in self.tensors().items()}
        save_file(tensors, folder / "fitted.safetensors")
        write_json(
            folder / "fitted.json",
            {
                "method": self.method.name,
                "settings": settings_of(self.method),
                "model": self.model_hash,
                "train": self.train.fingerprint,
                "train_ids": self.train.ids.tolist(),
                **saved_facts(self.method, self.task),
                "batch_size": self.batch_size,
                "details": self.details(),
            },
        )

    def _queries(self, queries: Any, ids: Any) -> Data:
        data = Data.of(queries, ids=ids, collate=self.task.collate)
        require_same_columns(self.train, data)
        return data

    def _provenance(self, queries: Data) -> Provenance:
        asked = facts_of(self.method, self.task)
        return Provenance(
            method=self.method.name,
            settings=settings_of(self.method) | self.details() | self.told(queries),
            units=self.units,
            coverage=self.coverage,
            model=self.model_hash,
            train=self.train.fingerprint,
            queries=queries.fingerprint,
            seed=getattr(self.method, "seed", None),
            version=version(),
            loss=asked["loss"],
            measure=asked["measure"],
        )

    def require_finite(self, values: Tensor, ids: np.ndarray) -> None:
        """Raise `NonFiniteError` with the `ids` `[q]` of queries that have no finite scores."""
        if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
            bad = ~torch.isfinite(values).all(1)
            shown = ", ".join(map(str, ids[bad.cpu().numpy()][:5]))
            raise NonFiniteError(
                f"{self.method.name} gave scores that are NaN or infinite for queries {shown}: "
                "their gradients overflow; score them in float64 or raise the damping"
            )


def block_name(rows: slice, columns: slice) -> str:
    """What the file of a block of scores is called."""
    return f"queries-{rows.start:06d}-examples-{columns.start:09d}"


def prints_of(data: Data) -> list[str]:
    """A fingerprint of each example alone."""
    return [data.slice(slice(i, i + 1)).fingerprint for i in range(len(data))]


def unlearning_of(queries: Data, outcomes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How unlearning of queries went, for the record; nothing unless all of them were unlearned.

    Args:
        queries: that were asked about.
        outcomes: facts about a query by name, by its fingerprint.
    """
    each = [outcomes.get(one) for one in prints_of(queries)] if outcomes else [None]
    known = [outcome for outcome in each if outcome is not None]
    if len(known) < len(each):
        return {}
    return {"unlearning": {name: [one[name] for one in known] for name in known[0]}}


def warn_about_zeros(norms: Tensor, what: str) -> None:
    """A zero gradient has no direction: its normalised score is zero, and that is said."""
    zeros = int((norms == 0).sum())
    if zeros:
        warnings.warn(
            f"{zeros} {what} have a zero gradient: their scores are zero",
            NumericalWarning,
            stacklevel=4,
        )


def require_same_columns(train: Data, queries: Data) -> None:
    """Refuse queries whose tensors have another shape than the training set's.

    Sequences of other lengths are fine, so only the number of axes and, for more than two axes
    or floating-point rows, their sizes are compared. Images must have one shape, and either all
    have conditions or none.
    """
    asked = _picture(queries)
    own = _picture(train) if "image" in asked else {}
    if "image" in own:
        _require_same_pictures(own, asked)
    if not (isinstance(train.columns, tuple) and isinstance(queries.columns, tuple)):
        return
    if len(train.columns) != len(queries.columns):
        raise DataError(
            f"queries have {len(queries.columns)} columns and the training set has "
            f"{len(train.columns)}: both must be what the loss takes"
        )
    for i, (a, b) in enumerate(zip(train.columns, queries.columns, strict=True)):
        if a.is_floating_point() and a.shape[1:] != b.shape[1:]:
            raise DataError(
                f"column {i} of the queries has rows of shape {tuple(b.shape[1:])}, the training "
                f"set has {tuple(a.shape[1:])}: prepare both in the same way"
            )


def _picture(data: Data) -> dict[str, Any]:
    """The images of a dataset of images, or the first of them, and their conditions."""
    if getattr(data.dataset, "absent", False):  # its rows are in a store, and it is not here
        return {}
    first = data.batch(slice(0, 1)) if data.columns is None else data.columns
    if not hasattr(first, "keys"):
        return {}
    return {key: first[key] for key in ("image", "condition") if key in first}


def _require_same_pictures(own: dict[str, Any], asked: dict[str, Any]) -> None:
    for key in ("image", "condition"):
        if (key in asked) != (key in own):
            sides = (f"the queries have {key!r}", "the training set has none")
            if key in own:
                sides = (f"the training set has {key!r}", "the queries have none")
            raise DataError(f"{' and '.join(sides)}: give it to both, or to neither")
        theirs, mine = asked.get(key), own.get(key)
        if not (isinstance(theirs, Tensor) and isinstance(mine, Tensor)):
            continue
        shape, expected = tuple(theirs.shape[1:]), tuple(mine.shape[1:])
        if shape != expected:
            raise DataError(
                f"{key!r} of the queries has shape {shape}, the training set's has {expected}: "
                "prepare both in the same way"
            )


def require_same_state(about: dict[str, Any], task: Task | None, train: Data | None) -> None:
    """Refuse to load a state that belongs to another model or training set."""
    own = NO_MODEL if task is None else task.model_hash()
    if about["model"] != own:
        if NO_MODEL in (about["model"], own):
            has, remedy = (
                ("to no model and there is a task", "pass task=None")
                if own != NO_MODEL
                else (f"to model {about['model']} and there is no task", "pass the task")
            )
            raise MismatchError(f"this state was fitted {has}: {remedy}, or fit again")
        raise MismatchError(
            f"this state was fitted to model {about['model']} and the task's model is {own}: load "
            "the weights it was fitted to, or fit again"
        )
    if train is not None and about["train"] != train.fingerprint:
        raise MismatchError(
            f"this state was fitted to training set {about['train']} and train= is "
            f"{train.fingerprint}: pass the same examples in the same order"
        )


def version() -> str:
    """The installed version of forebear."""
    from importlib.metadata import version as installed

    return installed("forebear")


def strongest(candidates: Iterable[Candidates], k: int) -> tuple[Tensor, Tensor]:
    """Values and positions `[q, k]` of the largest of each query, ties to the earlier one.

    Candidates come grouped by query and, within a group, in the order of their positions.
    """
    kept_values: list[Tensor] = []
    kept_rows: list[Tensor] = []
    current: slice | None = None
    for rows, values, positions in candidates:
        if rows != current:
            current = rows
            kept_values.append(values[:, :0])
            kept_rows.append(positions[:, :0])
        kept_values[-1], kept_rows[-1] = best_of(
            torch.cat([kept_values[-1], values], 1), torch.cat([kept_rows[-1], positions], 1), k
        )
    return torch.cat(kept_values), torch.cat(kept_rows)


def best_of(values: Tensor, positions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest values of each row, largest first, ties to the left, and their positions."""
    k = min(k, values.shape[1])
    found, order = values.topk(k, dim=1)
    if ((values >= found[:, -1:]).sum(1) > k).any() or (found[:, 1:] == found[:, :-1]).any():
        order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
    return values.gather(1, order), positions.gather(1, order)
