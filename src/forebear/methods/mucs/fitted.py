"""What answers queries: losses of the training images before, and copies that forgot a query."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from forebear.data import Data, map_tensors, naming, require_finite
from forebear.errors import DataError, NumericalWarning
from forebear.executors import Executor
from forebear.methods.fitted import Fitted, Piece, require_same_columns
from forebear.methods.mucs.forgetting import Forgotten, Mirrored, Visits, forget, weights_of
from forebear.methods.mucs.scales import Scales, seen
from forebear.progress import track
from forebear.task import Task
from forebear.tasks.diffusion import Denoising
from forebear.tasks.noise import gaussian
from forebear.training.recipe import Recipe, seeded
from forebear.training.stacked import Call, State
from forebear.types import Scores, TopK

if TYPE_CHECKING:
    from forebear.methods.mucs.method import MUCS

BANK, BEFORE, AFTER = 14.0, 15.0, 16.0
"""What of a level is drawn: the noise that all images share, or noise of each image's own."""

SMALL = 1e-3
"""Keeps the ratio of losses from dividing by zero."""

FEW_STEPS = 20
"""A query that is forgotten in fewer steps was forgotten in too large ones."""

NULL_BATCHES = 200
"""Batches that the loss of an untrained network is averaged over."""

TOGETHER = 16
"""Queries unlearned together."""


@dataclass(frozen=True, eq=False)
class Unlearned:
    """How unlearning went, query by query.

    Attributes:
        query_ids: `[q]`.
        steps: `[q]` until the query was forgotten.
        converged: `[q]`, whether its loss reached the bound.
        forgotten: `[q]` its loss in the end, mean over the last batches.
        retained: `[q]` loss of training examples in the end, likewise.
    """

    query_ids: np.ndarray
    steps: Tensor
    converged: Tensor
    forgotten: Tensor
    retained: Tensor


class FittedMUCS(Fitted):
    """Losses `[n, levels]` of the training images under the model as it is.

    Attributes:
        before: these losses.
        order: positions of the whole training set by key, `[n]`.
        deviation: standard deviation of the data.
        null: loss of a network that knows nothing.
    """

    before: Tensor
    order: Tensor
    deviation: float
    null: float

    def __init__(
        self,
        method: "MUCS",
        task: Task,
        train: Data,
        names: tuple[str, ...],
        *,
        batch_size: int,
        executor: Executor | None = None,
    ) -> None:
        super().__init__(method, task, train, batch_size=batch_size, executor=executor)
        self.method: MUCS = method
        self.names = names
        self.retained = train  # what is gone on with, also where only some examples are faced
        self._outcomes: dict[str, Unlearned] = {}

    @cached_property
    def scales(self) -> Scales:
        """The loss that is compared."""
        assert isinstance(self.task.loss, Denoising)
        return Scales(self.task.loss, self.deviation)

    @property
    def coverage(self) -> float:
        """Share of the selected layers' parameters that unlearning changes: all but biases."""
        chosen = self.task if self.method.layers is None else self.task.select(self.method.layers)
        selected = chosen.selected_parameters()
        changed = sum(selected[name].numel() for name in self.names)
        return changed / sum(p.numel() for p in selected.values())

    def details(self) -> dict[str, Any]:
        """The bound, the deviation, and what unlearning changes."""
        return {"bound": self.null, "data_deviation": self.deviation, "changed": list(self.names)}

    def score(self, queries: Any, *, ids: Any = None) -> Scores:
        """As of every method; the record has steps and losses of every query as `unlearning`."""
        scores = super().score(queries, ids=ids)
        return replace(scores, provenance=self._recorded(scores.provenance))

    def top(self, queries: Any, k: int = 10, *, opponents: bool = False, ids: Any = None) -> TopK:
        """As of every method; the record has steps and losses of every query as `unlearning`."""
        found = super().top(queries, k, opponents=opponents, ids=ids)
        return replace(found, provenance=self._recorded(found.provenance))

    def unlearn(self, queries: Any, *, ids: Any = None) -> Unlearned:
        """Unlearn queries, and say how it went, without looking at the training images."""
        data = self._queries(queries, ids)
        return self._outcome(data, [run for _, run in self._runs(data)])

    def pieces(self, queries: Data) -> Iterator[Piece]:
        """Scores of queries that were unlearned together, a batch of training images at a time."""
        runs = []
        for rows, run in self._runs(queries):
            after = [self.losses(one, AFTER) for one in _each(run)]
            yield rows, slice(0, len(self.train)), torch.stack([*map(self._skew, after)])
            runs.append(run)
        self._outcomes[queries.fingerprint] = self._outcome(queries, runs)

    def self_influence(self) -> Tensor:
        """Score of each training image for itself, `[n]`: what unlearning it does to its loss.

        Every training image is unlearned, which takes as long as so many queries.
        """
        own = []
        for rows, run in self._runs(self._queries(self.train, None)):
            for place, state in zip(range(rows.start, rows.stop), _each(run), strict=True):
                part = self.restricted(torch.tensor([place]))
                own.append(part._skew(part.losses(state, AFTER)))
        return torch.cat(own)

    def tensors(self) -> dict[str, Tensor]:
        """The losses, and what they were computed with."""
        numbers = {"deviation": self.deviation, "null": self.null}
        kept = {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}
        return {"before": self.before, "order": self.order, **kept}

    def restricted(self, positions: Tensor) -> Self:
        """The losses at `positions`; unlearning goes on with the whole training set."""
        part = self.on(None)
        part.train = self.train.select(positions)
        part.before = self.before[positions]
        return part

    @torch.no_grad()
    def losses(self, changed: State, moment: float) -> Tensor:
        """Losses `[n, levels]` of the training images where some weights are others.

        Args:
            changed: weights by name.
            moment: whose fresh noise it is, where noise is not consistent.
        """
        found = []
        call = Call(self.task.model, lambda model, visit: self.scales.losses(model, *visit))
        with self.task.evaluation():
            for rows, batch in self.train.batches(self.batch_size):
                batch = map_tensors(lambda t: t.to(self.task.device), batch)
                losses = torch.stack([*self._at_levels(call, changed, batch, moment)], 1)
                with naming(self.train, rows):
                    require_finite(losses, "loss of training images")
                found.append(losses.cpu())
        return torch.cat(found)

    def untrained_loss(self, mean_square: float) -> float:
        """The bound of the loss, as the method says.

        Args:
            mean_square: of the training pixels.
        """
        null = self.method.null
        if null is None:
            return self.scales.null(mean_square, self.method.location, self.method.spread)
        if not isinstance(null, Recipe):
            return float(null)
        with seeded(self.method.seed):
            model = null.build().to(self.task.device).eval()
        visits, count = self._visits(), self.method.batch_size
        total = 0.0
        with torch.no_grad():
            for step in range(NULL_BATCHES):
                batch, levels, noise = visits.at(step)
                first = type(levels)(*(part[:count] for part in levels))
                total += self.scales.losses(model, batch, first, noise[:count]).mean().item()
        return total / NULL_BATCHES

    def _at_levels(self, call: Call, changed: State, batch: Any, moment: float) -> Iterator[Tensor]:
        """Losses `[b]` of a batch, level by level."""
        method, image = self.method, batch["image"]
        keys = image.new_zeros(1).long() if method.consistent else batch["key"]
        which = BANK if method.consistent else moment
        draw = partial(gaussian, keys, tuple(image.shape[1:]), method.seed, dtype=image.dtype)
        for number, scale in enumerate(self.scales.grid(method.levels, method.keep)):
            levels = self.scales.levels(image.new_full((len(image),), scale))
            yield call.at(changed, (seen(batch), levels, draw(which, number)))

    def _skew(self, after: Tensor) -> Tensor:
        """Scores `[n]` from losses `[n, levels]`."""
        rise = after - self.before
        if self.method.ratio:
            rise = rise / (after + self.before + SMALL)
        return rise.mean(1)

    def _visits(self) -> Visits:
        return Visits(
            self.method.unlearning, self.scales, self.retained, self.order, self.task.device
        )

    def _runs(self, queries: Data) -> Iterator[tuple[slice, Forgotten]]:
        """Queries unlearned together, so many at a time."""
        mirrored = Mirrored(self.method.unlearning, self.scales, self.task.model, self.null)
        visits = self._visits()
        start = weights_of(self.task.model, self.names)
        for first in track(range(0, len(queries), TOGETHER), "mucs, queries"):
            rows = slice(first, min(first + TOGETHER, len(queries)))
            batch = map_tensors(lambda t: t.to(self.task.device), seen(queries.batch(rows)))
            with self.task.evaluation(), naming(queries, rows):
                run = forget(mirrored, visits, start, batch, null=self.null)
            self._warn(run, queries.ids[rows])
            yield rows, run

    def _warn(self, run: Forgotten, ids: np.ndarray) -> None:
        method = self.method
        if not run.converged.all():
            warnings.warn(
                f"queries {_shown(ids, ~run.converged)} were not forgotten in {method.max_steps} "
                f"steps: their loss is below {method.stop:g} of that of a network that knows "
                "nothing; raise learning_rate or max_steps",
                NumericalWarning,
                stacklevel=4,
            )
        short = run.converged & (run.steps < FEW_STEPS)
        if short.any():
            warnings.warn(
                f"queries {_shown(ids, short)} were forgotten in fewer than {FEW_STEPS} steps, "
                "which makes ranks worse: lower learning_rate",
                NumericalWarning,
                stacklevel=4,
            )

    def _outcome(self, queries: Data, runs: list[Forgotten]) -> Unlearned:
        parts = ("steps", "converged", "forgotten", "retained")
        found = {name: torch.cat([getattr(run, name) for run in runs]) for name in parts}
        return Unlearned(query_ids=queries.ids, **found)

    def _recorded(self, provenance: Any) -> Any:
        told = self._outcomes[provenance.queries]
        unlearning = {
            "steps": told.steps.tolist(),
            "converged": told.converged.tolist(),
            "forgotten": told.forgotten.tolist(),
            "retained": told.retained.tolist(),
        }
        return replace(provenance, settings={**provenance.settings, "unlearning": unlearning})

    def _queries(self, queries: Any, ids: Any) -> Data:
        data = Data.of(queries, ids=ids, collate=self.task.collate)
        require_same_columns(self.train, data)
        first, own = _first(data), _first(self.retained)
        for key in ("image", "condition"):
            if (key in first) != (key in own):
                has, lacks = ("queries", "training set")[:: 1 if key in first else -1]
                raise DataError(f"the {has} have {key!r} and the {lacks} has none: give both one")
            if key in own and first[key].shape[1:] != own[key].shape[1:]:
                raise DataError(
                    f"{key!r} of the queries has shape {tuple(first[key].shape[1:])}, the training "
                    f"set's has {tuple(own[key].shape[1:])}: prepare both in the same way"
                )
        return data


def _each(run: Forgotten) -> Iterator[State]:
    """The changed weights of each query."""
    for member in range(len(run.steps)):
        # A copy of its own: where a tensor begins in memory may change the last bits of products.
        yield {name: value[member].clone() for name, value in run.state.items()}


def _first(data: Data) -> dict[str, Tensor]:
    batch = data.batch(slice(0, 1))
    return seen(batch) if hasattr(batch, "keys") else {}


def _shown(ids: np.ndarray, which: Tensor) -> str:
    shown = ids[which.numpy()]
    return ", ".join(map(str, shown[:5])) + (" …" if len(shown) > 5 else "")
