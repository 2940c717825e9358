"""What answers queries: losses of the training images before, and copies that forgot a query."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from forebear.data import Data, map_tensors, naming, require_finite
from forebear.errors import NumericalWarning
from forebear.executors import Executor, Pieces, results
from forebear.methods.fitted import Fitted, Piece, block_name, prints_of, unlearning_of
from forebear.methods.mucs.forgetting import Forgotten, Mirrored, Visits, forget, weights_of
from forebear.methods.mucs.scales import Scales, seen
from forebear.stream import Result, stretches
from forebear.task import Task
from forebear.tasks.diffusion import Denoising
from forebear.tasks.images import require_batch
from forebear.tasks.noise import gaussian
from forebear.training.recipe import Recipe, seeded
from forebear.training.stacked import Call, State

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

Wanted = Literal["scores", "own", "nothing"]

OUTCOME = ("steps", "known", "converged", "forgotten", "retained")
"""What is told of a query."""


@dataclass(frozen=True, eq=False)
class Unlearned:
    """How unlearning went, query by query.

    Attributes:
        query_ids: `[q]`.
        steps: `[q]` until the query was forgotten.
        known: `[q]`, whether its loss began below the bound. Where it did not, the model does no
            better on the query than one that knows nothing: there is nothing to forget, no step
            is taken, and all scores are zero.
        converged: `[q]`, whether its loss reached the bound by steps.
        forgotten: `[q]` its loss in the end, mean over the last batches.
        retained: `[q]` loss of training examples in the end, likewise.
    """

    query_ids: np.ndarray
    steps: Tensor
    known: Tensor
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
        self._outcomes: dict[str, dict[str, Any]] = {}  # of each query, by its content

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

    def told(self, queries: Data) -> dict[str, Any]:
        """Steps and losses of every query, as `unlearning`."""
        return unlearning_of(queries, self._outcomes)

    def unlearn(self, queries: Any, *, ids: Any = None) -> Unlearned:
        """Unlearn queries, and say how it went, without looking at the training images."""
        data = self._queries(queries, ids)
        found = [result for _, result in self._results(data, "nothing")]
        told = {name: torch.cat([result[name] for result in found]) for name in OUTCOME}
        return Unlearned(query_ids=data.ids, **told)

    def pieces(self, queries: Data) -> Iterator[Piece]:
        """Scores of queries that were unlearned together."""
        yield from self.blocks(queries)

    def blocks(self, queries: Data, kept: Pieces | None = None) -> Iterator[Piece]:
        """The same, from wherever they are worked out; what is kept is not unlearned again."""
        for rows, result in self._results(queries, "scores", kept):
            yield rows, slice(0, len(self.train)), result["scores"]

    def self_influence(self) -> Tensor:
        """Score of each training image for itself, `[n]`: what unlearning it does to its loss.

        Every training image is unlearned, which takes as long as so many queries.
        """
        return torch.cat([result["scores"] for _, result in self._results(self.train, "own")])

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

    def skew(self, changed: State) -> Tensor:
        """Scores `[n]` of a query that was unlearned into these weights."""
        rows = stretches(len(self.train))
        after = torch.cat([self.losses(changed, AFTER, each) for each in rows])
        rise = after - self.before
        if self.method.ratio:
            rise = rise / (after + self.before + SMALL)
        return rise.mean(1)

    def find_losses(self) -> None:
        """Losses of the training images as they are, from wherever they are worked out."""
        rows = tuple(stretches(len(self.train)))
        names = [f"examples-{each.start:09d}" for each in rows]
        work = Before(self.on(None), rows)
        found = results(work, names, f"{self.method.name}, losses", executor=self.executor)
        self.before = torch.cat([result["losses"] for result in found])

    @torch.no_grad()
    def losses(self, changed: State, moment: float, rows: slice) -> Tensor:
        """Losses `[b, levels]` of a stretch of training images where some weights are others.

        Args:
            changed: weights by name.
            moment: whose fresh noise it is, where noise is not consistent.
            rows: the stretch.
        """
        found, part = [], self.train.slice(rows)
        call = Call(self.task.model, lambda model, visit: self.scales.losses(model, *visit))
        with self.task.evaluation():
            for some, batch in part.batches(self.batch_size):
                batch = map_tensors(lambda t: t.to(self.task.device), batch)
                losses = torch.stack([*self._at_levels(call, changed, batch, moment)], 1)
                with naming(part, some):
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

    def _visits(self) -> Visits:
        return Visits(
            self.method.unlearning, self.scales, self.retained, self.order, self.task.device
        )

    def _results(
        self, queries: Data, wanted: Wanted, kept: Pieces | None = None
    ) -> Iterator[tuple[slice, Result]]:
        """Positions and result of every group of queries, from wherever it is worked out."""
        size = len(queries)
        groups = [slice(i, min(i + TOGETHER, size)) for i in range(0, size, TOGETHER)]
        names = [block_name(rows, slice(0, len(self.train))) for rows in groups]
        work = Groups(self.on(None), queries, tuple(groups), wanted)
        description = f"{self.method.name}, queries"
        found = results(work, names, description, pieces=kept, executor=self.executor)
        for rows, result in zip(groups, found, strict=True):
            self._warn(result, queries.ids[rows])
            for place, key in enumerate(prints_of(queries.slice(rows))):
                self._outcomes[key] = {name: result[name][place].item() for name in OUTCOME}
            yield rows, result

    def forgotten(self, queries: Data, rows: slice) -> Forgotten:
        """Queries unlearned together."""
        mirrored = Mirrored(self.method.unlearning, self.scales, self.task.model, self.null)
        start = weights_of(self.task.model, self.names)
        asked = queries.batch(rows)
        with self.task.evaluation(), naming(queries, rows):
            require_batch(asked)
            batch = map_tensors(lambda t: t.to(self.task.device), seen(asked))
            return forget(mirrored, self._visits(), start, batch, null=self.null)

    def _warn(self, found: Result, ids: np.ndarray) -> None:
        method, converged, known = self.method, found["converged"], found["known"]
        if not known.all():
            least = found["forgotten"][~known].min().item()
            warnings.warn(
                f"the model does no better on queries {_shown(ids, ~known)} than one that knows "
                f"nothing: their loss is {least:.3g} or more before the first step, and "
                f"unlearning ends at {method.stop * self.null:.3g}. There is nothing to forget, "
                "and all their scores are zero, which ranks nothing: look whether images and "
                "conditions are as in training and prediction= is the network's, or give null=",
                NumericalWarning,
                stacklevel=4,
            )
        unfinished = known & ~converged
        if unfinished.any():
            warnings.warn(
                f"queries {_shown(ids, unfinished)} were not forgotten in {method.max_steps} "
                f"steps: their loss is below {method.stop:g} of that of a network that knows "
                "nothing; raise learning_rate or max_steps",
                NumericalWarning,
                stacklevel=4,
            )
        short = converged & (found["steps"] < FEW_STEPS)
        if short.any():
            warnings.warn(
                f"queries {_shown(ids, short)} were forgotten in fewer than {FEW_STEPS} steps, "
                "which makes ranks worse: lower learning_rate",
                NumericalWarning,
                stacklevel=4,
            )


@dataclass(frozen=True)
class Groups:
    """Groups of queries unlearned together, by number; goes to other processes.

    Attributes:
        fitted: the method.
        queries: all of them.
        rows: positions of each group.
        wanted: scores of all pairs, of training images for themselves, or none.
    """

    fitted: FittedMUCS
    queries: Data
    rows: tuple[slice, ...]
    wanted: Wanted

    def __call__(self, number: int) -> Result:
        """What `Unlearned` has, and `"scores"` `[q, n]` or `[q]`."""
        rows = self.rows[number]
        run = self.fitted.forgotten(self.queries, rows)
        found = {name: getattr(run, name) for name in OUTCOME}
        if self.wanted == "scores":
            found["scores"] = torch.stack([*self._scores(run, [self.fitted] * len(run.steps))])
        elif self.wanted == "own":
            places = range(rows.start, rows.stop)
            faced = [self.fitted.restricted(torch.tensor([i])) for i in places]
            found["scores"] = torch.cat([*self._scores(run, faced)])
        return found

    def _scores(self, run: Forgotten, faced: Sequence[FittedMUCS]) -> Iterator[Tensor]:
        """Of each query for the images that it faces, `[n]`."""
        for fitted, state, known in zip(faced, _each(run), run.known.tolist(), strict=True):
            # Zero where nothing was unlearned; fresh noise would make numbers that look like more.
            yield fitted.skew(state) if known else fitted.before.new_zeros(len(fitted.before))


@dataclass(frozen=True)
class Before:
    """Losses of the training images as they are, by stretch; goes to other processes."""

    fitted: FittedMUCS
    rows: tuple[slice, ...]

    def __call__(self, number: int) -> Result:
        """`"losses"` `[b, levels]`."""
        return {"losses": self.fitted.losses({}, BEFORE, self.rows[number])}


def _each(run: Forgotten) -> Iterator[State]:
    """The changed weights of each query."""
    for member in range(len(run.steps)):
        # A copy of its own: where a tensor begins in memory may change the last bits of products.
        yield {name: value[member].clone() for name, value in run.state.items()}


def _shown(ids: np.ndarray, which: Tensor) -> str:
    shown = ids[which.numpy()]
    return ", ".join(map(str, shown[:5])) + (" …" if len(shown) > 5 else "")
