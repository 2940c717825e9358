"""The exact derivative of further training with respect to an example's weight."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from forebear.data import Data, map_tensors, naming, require_finite
from forebear.errors import NonFiniteError
from forebear.executors import Executor
from forebear.methods.fitted import Fitted, Piece
from forebear.progress import track
from forebear.stream import BATCH
from forebear.task import Task
from forebear.training import schedule
from forebear.training.continuation import Continuation, steps_at
from forebear.training.further import FurtherTraining
from forebear.training.stacked import WORKSPACE, Call, State, gathered, state_of
from forebear.types import require_choices


@dataclass(frozen=True, kw_only=True)
class Unrolled:
    """Derivative of measurements along further training (Wei et al. 2025).

    The final model is trained on by SGD. How its weights at the end would differ, had an example
    weighed a little less, follows from the curvature of every batch on the way. Nothing else is
    approximated: it is the response to the removal of a small part of the example's weight, per
    whole example.

    Attributes:
        learning_rate: of the further training.
        epochs: how long.
        batch_size: the largest size of a training batch.
        scheme: `"every"` takes the example's share out of every step, `"mask"` takes it out of its
            own batches.
        seed: of the order of the examples.
        double: compute in double precision.
        direction: `"forward"` carries the change of the weights for every example, `"backward"`
            the gradient of every query; `"auto"` chooses the fewer. Both give the same scores.
    """

    name: str = "unrolled"
    learning_rate: float = 0.01
    epochs: float = 5
    batch_size: int = 64
    scheme: Literal["every", "mask"] = "every"
    seed: int = 0
    double: bool = True
    direction: Literal["auto", "forward", "backward"] = "auto"

    def __post_init__(self) -> None:
        require_choices(self)
        _ = self.training

    @property
    def training(self) -> FurtherTraining:
        """The further training along which derivatives are taken."""
        return FurtherTraining(
            learning_rate=self.learning_rate,
            amounts=(self.epochs,),
            batch_size=self.batch_size,
            scheme=self.scheme,
            seeds=1,
            max_seeds=None,
            seed=self.seed,
            double=self.double,
        )

    def fit(
        self,
        task: Task,
        train: Any,
        *,
        ids: Any = None,
        batch_size: int = BATCH,
        executor: Executor | None = None,
    ) -> "FittedUnrolled":
        """Train the model on, and remember points of the way.

        A step needs the one before it, so nothing of this is spread: it is done in this process.
        """
        data = Data.of(train, ids=ids, collate=task.collate)
        fitted = FittedUnrolled(self, task, data, batch_size=batch_size, executor=executor)
        fitted.path = Path(self, task, data)
        return fitted

    def restore(self, task: Task, train: Data, tensors: dict[str, Tensor]) -> "FittedUnrolled":
        """Trains on again, which is a small part of the work."""
        return self.fit(task, train)


class FittedUnrolled(Fitted):
    """The way from the final model through its further training."""

    units = "removal"
    path: "Path"
    _changes: Tensor | None = None

    @property
    def coverage(self) -> float:
        """Share of the trainable parameters that a gradient reaches: all that are trained on."""
        trainable = sum(p.numel() for p in self.task.model.parameters() if p.requires_grad)
        return self.path.size / trainable

    def pieces(self, queries: Data) -> Iterator[Piece]:
        """Products of the queries' gradients at the end with the changes of the weights."""
        gradients = self.path.measurement_gradients(queries)  # [q, P]
        everything = slice(0, len(queries)), slice(0, len(self.train))
        if self._forward(len(queries)):
            yield *everything, -gradients @ self._all_changes().T
        else:
            yield *everything, self.path.backward(gradients)

    def self_influence(self) -> Tensor:
        """Derivative of each example's measurement with respect to its own weight."""
        gradients = self.path.measurement_gradients(self.train)
        if self._forward(len(self.train)):
            return -(gradients * self._all_changes()).sum(1)
        return self.path.backward(gradients).diagonal().clone()

    def tensors(self) -> dict[str, Tensor]:
        """Nothing that could not be computed again: the number of steps."""
        return {"steps": torch.tensor(self.path.steps)}

    def details(self) -> dict[str, Any]:
        """Steps, the horizon η·T, and what was not trained."""
        return {
            "steps": self.path.steps,
            "horizon": self.method.learning_rate * self.path.steps,
            "excluded": self.path.excluded,
        }

    def _forward(self, count: int) -> bool:
        if self.method.direction != "auto":
            return self.method.direction == "forward"
        fits = len(self.train) * self.path.size <= WORKSPACE
        return fits and (self._changes is not None or count >= len(self.train))

    def _all_changes(self) -> Tensor:
        if self._changes is None:
            self._changes = self.path.forward()
        return self._changes


class Path:
    """The weights along the further training, `θ_0` to `θ_T`, and derivatives along it.

    Weights are flat vectors of the `size` parameters that are trained. Of T steps about √T points
    are kept, and those between them are computed again.

    Attributes:
        steps: T.
        size: number of trained parameters P.
        excluded: names of parameters that no gradient reaches.

    Raises:
        NonFiniteError: the training diverged.
    """

    def __init__(self, method: Unrolled, task: Task, data: Data) -> None:
        nothing = torch.empty(0, dtype=torch.long)
        settings = method.training
        removals = settings.removals(len(data), [nothing])
        run = Continuation(settings, task, data, removals, loop=False)
        self.task, self.rate, self.scheme = task, method.learning_rate, method.scheme
        self.data, self.cast, self.excluded = run.data, run.cast, run.excluded
        self._losses = Call(run.template, task.losses)
        self._measure = Call(run.template, task.measurements)
        state = state_of(run.template)
        self._rest = {name: v for name, v in state.items() if name not in run.trained}
        self._shapes = {name: state[name].shape for name in run.trained}
        start = torch.cat([state[name].reshape(-1) for name in run.trained])
        self.size = len(start)
        per_epoch = removals.steps(0)
        self.steps = steps_at(method.epochs, per_epoch)
        orders = schedule.epoch_orders(len(data), -(-self.steps // per_epoch), method.seed)
        everything = torch.ones(len(data), dtype=torch.bool)
        batches = (schedule.epoch_batches(o, everything, method.batch_size) for o in orders)
        self.batches = list(chain.from_iterable(batches))[: self.steps]
        self._interval = math.isqrt(self.steps - 1) + 1
        self._points: dict[int, Tensor] = {}
        for step, weights in self._walk(0, start, self.steps):
            if step % self._interval == 0:
                self._points[step] = weights
            self.end = weights
        if not bool(torch.isfinite(self.end).all()):
            raise NonFiniteError(
                f"further training diverged within {self.steps} steps: lower learning_rate"
            )

    def measurement_gradients(self, queries: Data) -> Tensor:
        """Gradients of the measurements at the end of the training, `[q, P]`.

        Raises:
            NonFiniteError: with the ids of the queries.
        """

        def single(weights: Tensor, example: Any) -> Tensor:
            one = map_tensors(_alone, example)
            return self._measure.at(self._state(weights), one)[0]

        rows, asked = [], self.cast(queries)
        with self.task.evaluation():
            for part, batch in asked.batches(self._columns()):
                batch = _moved(batch, self.end)
                with naming(asked, part):
                    rows.append(_each(grad(single), self.end, batch))
                    require_finite(rows[-1], "gradient of the measurement")
        return torch.cat(rows)

    def forward(self) -> Tensor:
        """Change of the weights at the end by the removal of each example, `[n, P]`.

        `δ ← δ − η (H_B(θ_t) δ − g(θ_t) w)`, from zero, with w the example's weight in the step.
        """
        changes = self.end.new_zeros(len(self.data), self.size)
        for step, weights in track(self._walk(0, self._points[0], self.steps), "trajectory"):
            if step == self.steps:
                break
            batch = self._batch(self.batches[step])
            moved = self._curved(weights, batch, changes)
            changes = changes.sub_(moved, alpha=self.rate)
            self._add_sources(changes, weights, step)
        return changes

    def backward(self, gradients: Tensor) -> Tensor:
        """Scores `[q, n]` from the gradients `[q, P]` of the measurements at the end.

        With `v` the gradient of the measurement with respect to `θ_{t+1}`, a step of the training
        adds `−η v·g(θ_t) w` to each score and takes v to `v − η H_B(θ_t) v`.
        """
        scores = gradients.new_zeros(len(gradients), len(self.data))
        vectors = gradients
        for step, weights in track(self._backwards(), "trajectory", total=self.steps):
            rows = self.batches[step]
            if self.scheme == "every":
                scores.sub_(self._slopes(weights, vectors), alpha=self.rate / len(self.data))
            else:
                slopes = self._slopes(weights, vectors, rows)
                slopes = slopes - slopes.mean(1, keepdim=True)
                scores[:, rows] -= slopes * (self.rate / len(rows))
            vectors = vectors - self.rate * self._curved(weights, self._batch(rows), vectors)
        return scores

    def _walk(self, step: int, weights: Tensor, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Steps and weights from `step` to `stop`, both included."""
        yield step, weights
        for at in range(step, stop):
            batch = self._batch(self.batches[at])
            weights = weights - self.rate * grad(self._mean_loss)(weights, batch)
            yield at + 1, weights

    def _backwards(self) -> Iterator[tuple[int, Tensor]]:
        """Steps T − 1 to 0 and the weights before each."""
        for start in reversed(range(0, self.steps, self._interval)):
            stop = min(start + self._interval, self.steps) - 1
            yield from reversed(list(self._walk(start, self._points[start], stop)))

    def _curved(self, weights: Tensor, batch: Any, vectors: Tensor) -> Tensor:
        """Products `[k, P]` of the Hessian of the batch's mean loss with `vectors` `[k, P]`."""
        # Linearised once: every vector then costs one transposed pass.
        transposed = vjp(lambda at: grad(self._mean_loss)(at, batch), weights)[1]
        parts = vectors.split(self._columns())
        return torch.cat([vmap(lambda v: transposed(v)[0])(part) for part in parts])

    def _slopes(self, weights: Tensor, vectors: Tensor, rows: Tensor | None = None) -> Tensor:
        """Inner products `[k, b]` of `vectors` with the loss gradients of examples."""
        return torch.cat([vectors @ g.T for _, g in self._gradients(weights, rows)], 1)

    def _add_sources(self, changes: Tensor, weights: Tensor, step: int) -> None:
        """Add `η w g(θ_t)` of every example to its change."""
        if self.scheme == "every":
            for part, gradients in self._gradients(weights):
                changes[part].add_(gradients, alpha=self.rate / len(self.data))
            return
        rows = self.batches[step]
        gradients = torch.cat([g for _, g in self._gradients(weights, rows)])
        changes[rows] += (gradients - gradients.mean(0)) * (self.rate / len(rows))

    def _gradients(
        self, weights: Tensor, rows: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Loss gradients `[b, P]` of the examples at `rows`, or of all, some at a time.

        Written out, which for more than a few vectors costs less than a product with each.
        """

        def single(at: Tensor, example: Any) -> Tensor:
            return self._losses.at(self._state(at), map_tensors(_alone, example))[0]

        count = len(self.data) if rows is None else len(rows)
        for start in range(0, count, self._columns()):
            part = slice(start, min(start + self._columns(), count))
            batch = self.data.batch(part if rows is None else rows[part])
            yield part, _each(grad(single), weights, _moved(batch, weights))

    def _mean_loss(self, weights: Tensor, batch: Any) -> Tensor:
        return self._losses.at(self._state(weights), batch).mean()

    def _state(self, weights: Tensor) -> State:
        sizes = [shape.numel() for shape in self._shapes.values()]
        parts = zip(self._shapes.items(), weights.split(sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts} | self._rest

    def _batch(self, rows: Tensor) -> Any:
        return gathered(self.data, rows, self.end.device)

    def _columns(self) -> int:
        """Vectors or examples whose weights are in memory at a time."""
        return max(1, min(BATCH, WORKSPACE // (8 * self.size)))


def _each(function: Callable[[Tensor, Any], Tensor], weights: Tensor, batch: Any) -> Tensor:
    """`function(weights, example)` of every example of a batch."""
    return vmap(function, in_dims=(None, 0))(weights, batch)


def _alone(example: Tensor) -> Tensor:
    return example[None]


def _moved(batch: Any, like: Tensor) -> Any:
    return map_tensors(lambda t: t.to(like.device), batch)
