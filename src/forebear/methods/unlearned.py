"""What answers queries by unlearning them: in the limit of small steps, or step by step."""

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

from forebear.blocks import Plan
from forebear.curvature.base import QUERY_BYTES
from forebear.curvature.kronecker import FittedKronecker, PreparedBlock
from forebear.data import Data
from forebear.differentiation import Function
from forebear.errors import NumericalWarning, TaskError
from forebear.executors import Pieces
from forebear.gradients import QuerySide, materialise
from forebear.methods.fitted import Candidates, Piece, prints_of, unlearning_of, warn_about_zeros
from forebear.methods.fitted_influence import FittedInfluence
from forebear.methods.unlearning_step import (
    BLOCK,
    PairedLosses,
    Query,
    Visits,
    changed,
    flipped,
    weights_of,
)
from forebear.stream import Stream
from forebear.task import Task
from forebear.tasks.diffusion import Denoising, DenoisingTraining
from forebear.training.stacked import State

if TYPE_CHECKING:
    from forebear.methods.abu import Unlearning

FEW = 4
"""Up to so many queries `mode="auto"` makes a step for each."""

KEPT_BYTES = 2**28
"""Gradients of the training set up to 256 MB are kept for later queries."""

ROUNDING = 30.0
"""Rises of losses below so many times what rounding changes are not to be trusted."""


@dataclass(frozen=True)
class Forgotten:
    """Queries after unlearning.

    Attributes:
        changes: of the weights, `[q, P]`.
        alphas: how many times each was unlearned, `[q]`; 0 where its gradient is zero.
    """

    changes: Tensor
    alphas: Tensor


class FittedUnlearning(FittedInfluence):
    """The Fisher matrix, and gradients or losses of the training set once they were needed."""

    def __init__(
        self, method: "Unlearning", task: Task, train: Data, plan: Plan, *, batch_size: int
    ) -> None:
        super().__init__(method, task, train, plan, batch_size=batch_size)
        # Shared with copies that have another executor or damping: both are facts about the model.
        self._kept: dict[str, Tensor] = {}
        self._outcomes: dict[str, dict[str, Any]] = {}  # of each query, by its content

    @property
    def options(self) -> "Unlearning":
        """The configuration."""
        return cast("Unlearning", self.method)

    def fisher(self) -> tuple[Any, Function]:
        """A stream and the function whose gradients have F as their second moment."""
        loss, targets = self.task.loss, getattr(self.options.curvature, "targets", "")
        if not isinstance(loss, Denoising) or targets != "empirical":
            return self.training[0], self.training_function()
        visits = Visits(self.train, self._training(loss), self.options.seed)
        data = visits.numbered(self.options.fisher_draws)
        return Stream(self.task, self.plan, data, self.batch_size, self.executor), visits

    def pieces(self, queries: Data) -> Iterator[Piece]:
        """Scores of all pairs, a group of queries and a batch of examples at a time."""
        return super(FittedUnlearning, self._decided(queries)).pieces(queries)

    def blocks(self, queries: Data, kept: Pieces | None = None) -> Iterator[Piece]:
        """Scores of all pairs, a group of queries and a stretch of examples at a time."""
        return super(FittedUnlearning, self._decided(queries)).blocks(queries, kept)

    def candidates(self, queries: Data, k: int, sign: float) -> Iterator[Candidates]:
        """The `k` largest scores of every stretch, where those are worked out elsewhere."""
        return super(FittedUnlearning, self._decided(queries)).candidates(queries, k, sign)

    def told(self, queries: Data) -> dict[str, Any]:
        """In `mode="step"` how far each query was unlearned, and its losses, as `unlearning`."""
        if self._decided(queries).options.mode == "linear":
            return {}
        return unlearning_of(queries, self._outcomes)

    def restricted(self, positions: Tensor) -> Self:
        """The same curvature, with the examples at `positions` only."""
        part = super().restricted(positions)
        part._kept = {name: value[:, positions] for name, value in self._kept.items()}
        return part

    def against_training(
        self, prepared: list[tuple[Any, Tensor]]
    ) -> Iterator[tuple[slice, Tensor]]:
        """Training positions and scores `[q, b]` of prepared queries, batch by batch."""
        ((ready, _),) = prepared
        several = self._stepped(ready) if isinstance(ready, Forgotten) else self._linear(ready)
        for columns, values in several:  # [views, q, b]
            yield columns, values.amax(0) if self.options.flips == "max" else values.mean(0)

    @property
    def _computes(self) -> bool:
        """Whether there is work for other processes: not where gradients are kept."""
        return self.options.mode == "step" or "gradients" not in self._kept

    @property
    def _views(self) -> tuple[bool, ...]:
        """Whether images are mirrored, for each way to look at them."""
        return (False,) if self.options.flips == "none" else (False, True)

    @property
    def _size(self) -> int:
        return sum(block.size for block in self.plan.blocks.values())

    def _decided(self, queries: Data) -> Self:
        """Itself, with the mode for so many queries."""
        if self.options.mode != "auto":
            return self
        again = copy.copy(self)
        mode = "step" if len(queries) <= FEW else "linear"
        again.method = replace(self.options, mode=mode)
        return again

    def _groups(self, queries: Data) -> Iterator[slice]:
        """Positions of as many queries as fit into memory once written out."""
        entry = next(self.task.model.parameters()).element_size()
        step = max(1, QUERY_BYTES // (2 * entry * self._size))  # and the weights that they lead to
        for start in range(0, len(queries), step):
            yield slice(start, min(start + step, len(queries)))

    def forgotten(self, queries: Any, *, ids: Any = None) -> Forgotten:
        """How the weights change when each query is unlearned, whatever the mode.

        What `mode="step"` works with, all queries at a time.
        """
        return self._forget(self._queries(queries, ids))

    def _prepare(self, i: int, group: Data) -> tuple[Any, Tensor]:
        """Directions of the queries in the weights, or the weights' changes."""
        if self.options.mode == "linear":
            return self._sides(self._solver().solve(self._query().gradients(group))), torch.ones(())
        forgotten = self._forget(group)
        self._look_back(group, forgotten)
        return forgotten, torch.ones(())

    def _forget(self, group: Data) -> Forgotten:
        solver, query, steps = self._solver(), self._query(), self.options.steps
        directions = solver.solve(query.gradients(group))
        rates = self._rates(directions)  # [q], α / n
        changes = rates[:, None] * directions
        for round in range(1, steps):
            directions = solver.solve(query.gradients(group, changes, round))
            changes = changes + rates[:, None] * directions
        self._require_representable(changes)
        return Forgotten(changes, rates * self.examples * steps)

    def _look_back(self, group: Data, forgotten: Forgotten) -> None:
        """Keep what became of each query, and warn of those that were not forgotten."""
        query = self._query()
        before, after = query.losses(group), query.losses(group, forgotten.changes)
        told = (forgotten.alphas, before, after, after > before)
        for place, key in enumerate(prints_of(group)):
            self._outcomes[key] = dict(
                zip(
                    ("alpha", "before", "after", "forgotten"),
                    (values[place].item() for values in told),
                    strict=True,
                )
            )
        kept = (after <= before) & (forgotten.alphas.cpu() > 0)
        if kept.any():
            shown = ", ".join(map(str, group.ids[kept.numpy()][:5]))
            warnings.warn(
                f"unlearning did not raise the loss of queries {shown}: the step is too long, or "
                "lost in rounding; choose another change= or alpha=, more query_draws=, or "
                "mode='linear'",
                NumericalWarning,
                stacklevel=4,
            )

    def _query(self) -> Query:
        chosen = self.options
        loss = self.task.loss
        training = self._training(loss) if isinstance(loss, Denoising) else None
        draws, box = chosen.query_draws, chosen.box
        return Query(self.task, self.plan, training, draws, box, chosen.seed)

    def _training(self, loss: Denoising) -> DenoisingTraining:
        """The loss at random levels of noise, as in training."""
        return loss.training(location=self.options.location, spread=self.options.spread)

    def _solver(self) -> FittedKronecker:
        fit = self.curvatures[0]
        assert isinstance(fit, FittedKronecker)
        return fit

    def _sides(self, directions: Tensor) -> dict[str, PreparedBlock]:
        pieces = directions.split([block.size for block in self.plan.blocks.values()], 1)
        sides = {}
        for piece, (name, block) in zip(pieces, self.plan.blocks.items(), strict=True):
            side = QuerySide(matrix=piece.reshape(-1, block.rows, block.cols))
            sides[name] = PreparedBlock([side], None)
        if self._solver().precision == "bfloat16":
            sides = {name: one.narrowed() for name, one in sides.items()}
        return sides

    def _rates(self, directions: Tensor) -> Tensor:
        """Length of each query's steps in its direction, `[q]`; 0 for a zero gradient."""
        lengths = directions.norm(dim=1)
        warn_about_zeros(lengths, "queries")
        if self.options.alpha is not None:
            return (lengths > 0).to(lengths) * (self.options.alpha / self.examples)
        weights = weights_of(self.task, self.plan).values()
        whole = torch.stack([value.double().square().sum() for value in weights]).sum().sqrt()
        if whole == 0:
            raise TaskError(
                f"change={self.options.change} is relative to the weights, and all that would "
                "change are zero: give alpha instead"
            )
        step = self.options.change * whole.item() / self.options.steps
        return torch.where(lengths > 0, step / lengths.clamp_min(1e-300), 0.0).to(lengths)

    def _require_representable(self, changes: Tensor) -> None:
        """Warn where the change of the weights is lost in their own rounding."""
        weights = weights_of(self.task, self.plan)
        lost = torch.zeros((), dtype=torch.float64)
        after = changed(weights, changes[0], self.plan)
        exact = changed({k: v.double() for k, v in weights.items()}, changes[0].double(), self.plan)
        for name, value in after.items():
            lost = lost + (value.double() - exact[name]).square().sum().cpu()
        share = lost.sqrt().item() / max(changes[0].double().norm().item(), 1e-300)
        if changes[0].any() and share > 0.1:
            warnings.warn(
                f"the step is no longer than rounding of the weights ({share:.0%} of it is lost): "
                "use mode='linear', a larger change=, or weights in a higher precision",
                NumericalWarning,
                stacklevel=3,
            )

    def _linear(self, prepared: dict[str, PreparedBlock]) -> Iterator[tuple[slice, Tensor]]:
        """Products of directions with gradients, `[views, q, b]`."""
        fit, entry = self.curvatures[0], next(self.task.model.parameters()).element_size()
        room = entry * self._size * len(self.train) * len(self._views) <= KEPT_BYTES
        if room and "gradients" not in self._kept:
            self._kept["gradients"] = self._all_gradients()
        if "gradients" in self._kept:
            matrices = [block.sides[0].matrix for block in prepared.values()]
            rows = torch.cat([m.flatten(1) for m in matrices if m is not None], 1)
            for start in range(0, len(self.train), self.batch_size):
                columns = slice(start, min(start + self.batch_size, len(self.train)))
                some = self._kept["gradients"][:, columns].to(rows)
                yield columns, rows @ some.mT / self.examples
            return
        for columns, gradients in self._passes():
            found = [fit.products(prepared, each) for each in gradients]
            yield columns, torch.stack(found) / self.examples

    def _passes(self) -> Iterator[tuple[slice, list[Any]]]:
        """Training positions and gradients for each view."""
        stream = self.training[0]
        for columns, _ in stream.batches("gradients"):
            each = [stream.at(columns, _View(self.task, mirrored)) for mirrored in self._views]
            yield columns, [gradients for _, gradients in each]

    def _all_gradients(self) -> Tensor:
        """Gradients of all examples, written out, `[views, n, P]`."""
        kept: Tensor | None = None
        for columns, several in self._passes():
            for view, gradients in enumerate(several):
                written = [
                    materialise(gradients[name], block).flatten(1)
                    for name, block in self.plan.blocks.items()
                ]
                if kept is None:
                    kept = written[0].new_empty(len(several), len(self.train), self._size)
                kept[view, columns] = torch.cat(written, 1)
        assert kept is not None
        return kept

    def _stepped(self, forgotten: Forgotten) -> Iterator[tuple[slice, Tensor]]:
        """Losses after the change minus those before, for one α, `[views, q, b]`."""
        weights = weights_of(self.task, self.plan)
        states = [changed(weights, change, self.plan) for change in forgotten.changes]
        losses, alphas = PairedLosses(self.task), forgotten.alphas.double()
        if "before" not in self._kept:
            once = [values[:, 0] for _, values in losses.at([weights], self.train, self._views)]
            self._kept["before"] = torch.cat(once, 1)
        before = self._kept["before"]  # [views, n]
        squares, dtype = torch.zeros_like(alphas), forgotten.changes.dtype
        # A query without a gradient changes nothing: zero, not zero over zero.
        by = torch.where(alphas > 0, alphas, 1.0)[:, None]
        for columns, after in losses.at(states, self.train, self._views):
            rises = after - before[:, None, columns]
            squares += rises.square().mean(0).sum(1)
            yield columns, (rises / by).to(dtype)
        unit = self._rounding(losses, weights)
        self._warn_of_rounding((squares / len(self.train)).sqrt(), unit)

    def _warn_of_rounding(self, rises: Tensor, unit: float) -> None:
        """Warn where losses rise, `[q]`, by no more than rounding."""
        lost = int(((rises > 0) & (rises < ROUNDING * unit)).sum())
        if lost:
            warnings.warn(
                f"losses rise by {rises.min().item():.1e} where rounding is about {unit:.1e}, for "
                f"{lost} of {len(rises)} queries: use a larger change= or alpha=, or mode='linear'",
                NumericalWarning,
                stacklevel=4,
            )

    def _rounding(self, losses: PairedLosses, weights: State) -> float:
        """By how much losses differ when every weight is rounded in another way."""
        generator = torch.Generator().manual_seed(0)
        nudged = {}
        for name, value in weights.items():
            up = torch.rand(value.shape, generator=generator).to(value.device) < 0.5
            away = torch.where(up, torch.inf, -torch.inf).to(value)
            nudged[name] = torch.nextafter(value, away)
        few = self.train.slice(slice(0, BLOCK))
        ((_, values),) = losses.at([weights, nudged], few)
        return (values[0, 1] - values[0, 0]).square().mean().sqrt().item()


@dataclass(frozen=True)
class _View:
    """The loss of training images as they are, or mirrored."""

    task: Task
    mirrored: bool

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return self.task.losses(model, flipped(batch) if self.mirrored else batch)
