"""Unlearning of a query, and the losses of training examples before and after it.

Both are pure functions of weights: the model of the task is never changed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from forebear.blocks import Plan
from forebear.data import Data, map_tensors, naming, require_finite
from forebear.differentiation import dense_gradients, only_these_need_gradients
from forebear.errors import DataError, NonFiniteError
from forebear.task import Loss, Task, per_example
from forebear.tasks.diffusion import Denoising, DenoisingTraining
from forebear.tasks.images import require_batch
from forebear.tasks.noise import moments
from forebear.training.stacked import Call, State

BLOCK = 64
"""Training examples whose losses are computed together, whatever the batch size.

Products of matrices of other shapes round in other ways. With blocks that are always as long, an
example's loss has the same bits in any batch, order and subset.
"""

ROWS = 512
"""Noisy images that go through the network at once: several points of a block."""

QUERIES = 2**32
"""First visit of a query, so that its noise is not that of an example with the same key."""


Box = tuple[int, int, int, int]
"""First row, first column, and the row and column after the last."""


@dataclass(frozen=True)
class Visits:
    """The training loss at a random level and noise for each numbered visit of an example.

    Batches are numbers, not examples: a few bytes for each visit, however large an image is.

    Attributes:
        data: the examples.
        loss: with a random level and noise for each `moment`.
        seed: of both.
    """

    data: Data
    loss: DenoisingTraining
    seed: int

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss `[b]` of the visits `{"position": [b], "visit": [b]}`."""
        rows = batch["position"].cpu()
        real = map_tensors(lambda t: t.to(batch["visit"].device), self.data.batch(rows))
        moment = moments(real["key"], self.seed, batch["visit"])
        with naming(self.data, rows):
            require_batch(real)
        values = self.loss(model, {**real, "moment": moment})
        with naming(self.data, rows):
            require_finite(values.detach(), "loss")
        return values

    def numbered(self, visits: int) -> Data:
        """So many visits of every example."""
        positions, numbers = torch.arange(len(self.data)), torch.arange(visits)
        return Data(
            {
                "position": positions.repeat(visits),
                "visit": numbers.repeat_interleave(len(positions)),
            }
        )


@dataclass(frozen=True)
class Query:
    """What is unlearned: the loss at many random levels and noises, or minus what is measured.

    Attributes:
        task: whose queries they are.
        plan: blocks of the weights that change.
        training: the denoising loss at random levels and noises, where there is noise.
        draws: so many of these.
        box: pixels that count; all when None.
        seed: of levels and noises.
    """

    task: Task
    plan: Plan
    training: DenoisingTraining | None
    draws: int
    box: Box | None
    seed: int

    def gradients(self, queries: Data, changes: Tensor | None = None, round: int = 0) -> Tensor:
        """Gradient of each query in the weights, `[q, P]`.

        Args:
            queries: some.
            changes: `[q, P]` of the weights, other for each query.
            round: has noise of its own.

        Raises:
            NonFiniteError: a gradient is NaN or infinite.
        """
        start, found = weights_of(self.task, self.plan), []
        with self.task.evaluation():
            for i in range(len(queries)):
                state = start if changes is None else changed(start, changes[i], self.plan)
                one = queries.slice(slice(i, i + 1))
                batch = self._moved(one.batch(slice(0, 1)))
                if self.training is not None:
                    with naming(one, slice(0, 1)):
                        self.training.check(batch)
                row = self._gradient(batch, state, round)
                if not torch.isfinite(row).all():
                    raise NonFiniteError(
                        f"the gradient of query {one.ids[0]} is NaN or infinite: repair the query, "
                        "or raise the precision of the model"
                    )
                found.append(row)
        return torch.stack(found)

    def _gradient(self, batch: Any, state: State, round: int) -> Tensor:
        loss = self._loss()
        if not isinstance(loss, DenoisingTraining):
            return self._summed(self._function(loss), batch, state)
        total = 0.0
        for first in range(0, self.draws, ROWS):
            several = self._visited(batch, round * self.draws + first, self.draws - first)
            total = total + self._summed(self._function(loss), several, state)
        assert isinstance(total, Tensor)
        return total / self.draws

    @torch.no_grad()
    def losses(self, queries: Data, changes: Tensor | None = None) -> Tensor:
        """Loss of each query, the mean over some of its levels and noises, `[q]`.

        Args:
            queries: some.
            changes: `[q, P]` of the weights, other for each query.
        """
        start, found = weights_of(self.task, self.plan), []
        loss = self._loss()
        call = Call(self.task.model, self._function(loss))
        with self.task.evaluation():
            for i in range(len(queries)):
                state = start if changes is None else changed(start, changes[i], self.plan)
                batch = self._moved(queries.batch(slice(i, i + 1)))
                if isinstance(loss, DenoisingTraining):
                    batch = self._visited(batch, 0, self.draws)
                found.append(call.at(state, batch).double().mean())
        return torch.stack(found).cpu()

    def _visited(self, batch: Any, first: int, left: int) -> Any:
        """A query over and over, at numbered levels and noises, up to as many as are left."""
        count = min(ROWS, left)
        several = map_tensors(lambda t: t.expand(count, *t.shape[1:]) if t.ndim else t, batch)
        visits = QUERIES + first + torch.arange(count)
        moment = moments(several["key"], self.seed, visits.to(several["key"].device))
        return {**several, "moment": moment}

    def _loss(self) -> Loss:
        """With random noise, where there is noise and no measurement of the user's own."""
        if self.task.measure is None and self.training is not None:
            return self.training
        return self._forgotten

    def _forgotten(self, model: nn.Module, batch: Any) -> Tensor:
        return -self.task.measurements(model, batch)

    def _function(self, loss: Loss) -> Loss:
        if self.box is None or not isinstance(loss, DenoisingTraining):
            return loss

        def inside(model: nn.Module, batch: Any) -> Tensor:
            weight, squares = loss.squares(model, batch)
            return weight * within(squares, self.box).flatten(1).mean(1)

        return inside

    def _summed(self, function: Loss, batch: Any, state: State) -> Tensor:
        """Gradient of the sum over a batch, written out, `[P]`."""
        call = Call(self.task.model, function)
        with torch.enable_grad(), only_these_need_gradients(self.task.model, ()):
            leaves = {name: value.detach().requires_grad_() for name, value in state.items()}
            values = call.at(leaves, batch)
            size = len(batch["moment"]) if "moment" in batch else 1
            values = per_example(values, size, "the loss")
            grads = dense_gradients(values.sum(), list(leaves.values()))
        named = dict(zip(leaves, grads, strict=True))
        rows = [block.matrix(named).flatten() for block in self.plan.blocks.values()]
        row = torch.cat(rows)
        return row.float() if row.dtype in (torch.float16, torch.bfloat16) else row

    def _moved(self, batch: Any) -> Any:
        return map_tensors(lambda t: t.detach().to(self.task.device), batch)


@dataclass(frozen=True)
class PairedLosses:
    """Losses of training examples at several weights, with the same noise for all of them.

    Attributes:
        task: whose loss it is.
    """

    task: Task

    def at(
        self, states: list[State], data: Data, views: tuple[bool, ...] = (False,)
    ) -> Iterator[tuple[slice, Tensor]]:
        """Positions and losses `[views, m, b]` in double precision, block by block.

        Args:
            states: m sets of weights by name; others are those of the model.
            data: examples.
            views: whether images are turned around, each time with the same noise.

        Raises:
            NonFiniteError: with the ids of the examples.
        """
        call, size = Call(self.task.model, self._function()), len(data)
        for first in range(0, size, BLOCK):
            rows = slice(first, min(first + BLOCK, size))
            with self.task.evaluation(), only_these_need_gradients(self.task.model, ()):
                found = []
                for mirrored in views:
                    batch = self._block(data, rows, mirrored=mirrored)
                    found.append(torch.stack([call.at(state, batch) for state in states]))
            losses = torch.stack(found)[:, :, : rows.stop - first].detach()
            with naming(data, rows):
                require_finite(losses.permute(2, 0, 1), "loss")
            yield rows, losses

    def _block(self, data: Data, rows: slice, *, mirrored: bool) -> Any:
        """A whole block, its last example several times where there are too few."""
        positions = torch.arange(rows.start, rows.start + BLOCK).clamp_max(rows.stop - 1)
        batch = map_tensors(lambda t: t.detach().to(self.task.device), data.batch(positions))
        loss = self.task.loss
        if not isinstance(loss, Denoising):
            return flipped(batch) if mirrored else batch
        with naming(data, positions):
            require_batch(batch)
        return _Noisy.of(loss, flipped(batch) if mirrored else batch)

    def _function(self) -> Loss:
        if isinstance(self.task.loss, Denoising):
            return _noisy_losses
        return lambda model, batch: self.task.losses(model, batch).double()


@dataclass(frozen=True)
class _Noisy:
    """A block with its noise, which is the dear part and the same for all weights."""

    loss: Denoising
    parts: list[tuple[Tensor, Tensor, Tensor, Any]]  # noisy, levels, target, conditions
    weights: Tensor  # [points]

    @classmethod
    def of(cls, loss: Denoising, batch: Any) -> "_Noisy":
        step, parts = max(1, ROWS // len(batch["image"])), []
        for first in range(0, len(loss.points), step):
            points = loss.points[first : first + step]
            noise = [loss.noise_of(batch, point) for point in points]
            pairs = list(zip(points, noise, strict=True))
            noisy = torch.cat([loss.noisy(batch, point, each) for point, each in pairs])
            target = [loss.target(batch["image"], each, point.level) for point, each in pairs]
            levels = noisy.new_tensor([point.level for point in points])
            condition = batch.get("condition")
            told = {} if condition is None else {"condition": torch.cat([condition] * len(points))}
            levels = levels.repeat_interleave(len(batch["image"]))
            parts.append((noisy, levels, torch.cat(target), told))
        weights = [loss.schedule.weight(point.level) for point in loss.points]
        return cls(loss, parts, batch["image"].new_tensor(weights, dtype=torch.float64))


def _noisy_losses(model: nn.Module, batch: _Noisy) -> Tensor:
    """Loss of each example, `[b]`, added up in double precision."""
    errors = []
    for noisy, levels, target, told in batch.parts:
        said = batch.loss.predicted(model, noisy, levels, told)
        errors.append((said - target).double().square().flatten(1).mean(1))
    by_point = torch.cat(errors).view(len(batch.weights), -1)
    return (batch.weights[:, None] * by_point).mean(0)


def weights_of(task: Task, plan: Plan) -> State:
    """The weights of a plan's blocks by name."""
    named = dict(task.model.named_parameters())
    names = [name for block in plan.blocks.values() for name in block.parameters]
    return {name: named[name].detach() for name in names}


def changed(weights: State, change: Tensor, plan: Plan) -> State:
    """Weights after a change `[P]`."""
    pieces = change.split([block.size for block in plan.blocks.values()])
    after: State = {}
    for piece, block in zip(pieces, plan.blocks.values(), strict=True):
        for name, value in block.split(piece.view(block.rows, block.cols)).items():
            own = weights[name]
            after[name] = (own.to(value) + value.view_as(own)).to(own.dtype)
    return after


def flipped(batch: Any) -> Any:
    """Images turned around from left to right."""
    return {**batch, "image": batch["image"].flip(-1)}


def within(pixels: Tensor, box: Box | None) -> Tensor:
    """The pixels of images `[b, ..., h, w]` that are in a box.

    Raises:
        DataError: the box is not in the images.
    """
    if box is None:
        return pixels
    top, left, bottom, right = box
    if pixels.ndim < 3 or bottom > pixels.shape[-2] or right > pixels.shape[-1]:
        raise DataError(
            f"box={box} does not lie in images of shape {tuple(pixels.shape[1:])}: give the first "
            "row and column, and those after the last, of images [..., h, w]"
        )
    return pixels[..., top:bottom, left:right]
