"""Rewards that steer the noise a model sees, and gradients of following them.

For a reward r of noisy images `x_t` the loss `‖sg[ε + δ] − ε‖² / pixels` with `δ = −∇r` moves the
noise ε that the model sees by δ: the model learns to say what leads to more reward. `sg` stops the
gradient, which is `−2 Jᵀδ / pixels` with J the Jacobian of ε in the parameters. Training images and
queries have rewards of their own and everything else in common, so signs cannot come apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from forebear.capture import Capture, Gradients
from forebear.data import Batch, map_tensors, naming, require_finite
from forebear.differentiation import Function, only_these_need_gradients
from forebear.gradients import squared_norms
from forebear.layers import Factors, is_one, vector
from forebear.methods.unit_points import added, times
from forebear.progress import track
from forebear.sharding import require_whole
from forebear.stream import Stream
from forebear.tasks.diffusion import Denoising
from forebear.tasks.images import require_batch
from forebear.tasks.noise import moments
from forebear.tasks.sampling import Guided, Sampler
from forebear.tasks.schedules import Level

Rows = dict[str, Any]
"""`noisy` `[b, p, ...]`, `level` `[b, p]`, `shift` `[b, p, ...]` and `condition` `[b, p, ...]`."""


class Reward(Protocol):
    """What steers the noise of every example at some points."""

    @property
    def points(self) -> int:
        """How many noisy images there are of an example."""
        ...

    def rows(self, model: nn.Module, batch: Any) -> Rows:
        """Noisy images, and where the model's prediction is to move."""
        ...


@dataclass(frozen=True)
class Posterior:
    """Training images: the reward of `x_t` is minus the distance `‖x̂₀(x_t) − x‖²` to the image.

    What diffusion posterior sampling follows to end at x. Its gradient goes through the network.

    Attributes:
        objective: the task's loss at the levels and draws to be used.
        inversion: takes noisy images from the way of the image itself back to noise; None adds
            noise as in training.
    """

    objective: Denoising
    inversion: Sampler | None = None

    @property
    def points(self) -> int:
        """Of an image."""
        if self.inversion is None:
            return len(self.objective.points)
        return len(stops(self.inversion))

    def rows(self, model: nn.Module, batch: Any) -> Rows:
        """Noisy images and shifts at every point."""
        states = list(self.states(model, batch))
        shifts = [self._shift(model, noisy, level, batch) for level, noisy in states]
        return _rows(batch["condition"], states, shifts)

    def states(self, model: nn.Module, batch: Any) -> Iterator[tuple[Level, Tensor]]:
        """Levels and noisy images `[b, ...]` of every point."""
        require_batch(batch)
        if self.inversion is None:
            for point in self.objective.points:
                yield point.level, self.objective.noisy(batch, point)
            return
        guided = Guided(model, self.objective, batch["condition"])
        chosen = stops(self.inversion)
        path = unclipped(self.inversion).inversion(guided, batch["image"])
        yield from (state for step, state in enumerate(path) if step in chosen)

    def _shift(self, model: nn.Module, noisy: Tensor, level: Level, batch: Any) -> Tensor:
        """Gradient of the distance in the noisy images, in units of predictions."""
        with torch.enable_grad(), only_these_need_gradients(model, ()):
            here = noisy.detach().requires_grad_()
            said = self.objective.predicted(model, here, level, batch)
            clean = self.objective.clean(here, said, level)
            distance = (clean - batch["image"]).square().sum()
            (slope,) = torch.autograd.grad(distance, here)
        return rate(self.objective, level) * slope


@dataclass(frozen=True)
class Slider:
    """Queries: the reward leads from the condition without the concept to that with it.

    `δ = strength · (ε(x_t, condition) − ε(x_t, without))` at steps of the model's own way to images
    (a concept slider), equally many at each of the steps.

    Attributes:
        objective: how the model is called.
        sampler: how images are drawn.
        draws: noisy images of a query.
        strength: factor of δ.
        scope: whose way it is: `"global"`: from fresh noise; `"local"`: from the noise that belongs
            to the query's key; `"image"`: from that which the query's image came from.
        seed: of noise.
        shape: of an image.
        dtype: of images.
    """

    objective: Denoising
    sampler: Sampler
    draws: int
    strength: float
    scope: str
    seed: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def points(self) -> int:
        """Of a query."""
        return self.draws

    def rows(self, model: nn.Module, batch: Any) -> Rows:
        """Noisy images and shifts at every draw."""
        chosen = stops(self.sampler)
        start = self._inverted(model, batch) if self.scope == "image" else None
        whole: list[Rows] = []
        for place, stop in enumerate(chosen):
            draws = torch.arange(self.draws, device=batch["key"].device)[place :: len(chosen)]
            if len(draws):
                whole.append(self._at_stop(model, batch, stop, draws, start))
        return {name: torch.cat([part[name] for part in whole], 1) for name in whole[0]}

    @torch.no_grad()
    def _at_stop(
        self, model: nn.Module, batch: Any, stop: int, draws: Tensor, start: Tensor | None
    ) -> Rows:
        """Rows of some draws after so many steps."""
        size, count = len(batch["key"]), len(draws)
        told, untold = (
            batch[name].repeat_interleave(count, 0) for name in ("condition", "without")
        )
        keys = self._keys(batch["key"], draws).flatten()
        if start is not None:
            begun = start.repeat_interleave(count, 0)
        else:
            own = keys if self.scope == "global" else batch["key"].repeat_interleave(count, 0)
            begun = self.sampler.start(self.objective, own, self.shape).to(self.dtype)
        path = self.sampler.path(Guided(model, self.objective, told), begun, keys)
        level, noisy = next(state for step, state in enumerate(path, start=1) if step == stop)
        with_it = self.objective.predicted(model, noisy, level, {"condition": told})
        apart = with_it - self.objective.predicted(model, noisy, level, {"condition": untold})
        # Once for the noise that a prediction amounts to, once for what that does to a prediction.
        shift = self.strength * rate(self.objective, level) ** 2 * apart
        around = (size, count)
        return {
            "noisy": noisy.view(*around, *noisy.shape[1:]),
            "level": noisy.new_full(around, level),
            "shift": shift.view(*around, *shift.shape[1:]),
            "condition": told.view(*around, *told.shape[1:]),
        }

    def _keys(self, keys: Tensor, draws: Tensor) -> Tensor:
        """Keys of the noise of draws, `[b, draws]`; globally the same for all queries."""
        own = torch.zeros_like(keys) if self.scope == "global" else keys
        return moments(own[:, None].expand(-1, len(draws)), draws[None], self.seed)

    def _inverted(self, model: nn.Module, batch: Any) -> Tensor:
        """The noise that images came from."""
        guided = Guided(model, self.objective, batch["condition"])
        *_, (_, state) = unclipped(self.sampler).inversion(guided, batch["image"])
        return state


@dataclass(frozen=True)
class SteeredStream(Stream):
    """A stream of gradients of following a reward, averaged over points.

    It has the face of a stream, whatever function is asked for.

    Attributes:
        reward: what is followed.
        unit: gradients of single points get unit length before they are averaged.
        sign: of the gradients.
    """

    reward: Reward | None = None
    unit: bool = False
    sign: float = 1.0

    def gradients(
        self, function: Function, description: str
    ) -> Iterator[tuple[slice, Tensor, Gradients]]:
        """Positions, values `[b]` and factored gradients, batch by batch.

        Raises:
            NonFiniteError: with the ids of the examples.
        """
        with Capture(self.task, self.plan) as capture:
            for rows, batch in self.batches(description):
                with naming(self.data, rows):
                    found = self._averaged(capture, batch)
                yield rows, *found

    def at(self, rows: slice, function: Function) -> tuple[Tensor, Gradients]:
        """Values and gradients of one batch."""
        with Capture(self.task, self.plan) as capture, naming(self.data, rows):
            return self._averaged(capture, self.data.batch(rows))

    def batches(self, description: str) -> Iterator[tuple[slice, Batch]]:
        """Positions and batches, so small that all points of a batch fit."""
        assert self.reward is not None
        size = max(1, self.step // self.reward.points)
        return track(self.data.batches(size), description, total=-(-len(self.data) // size))

    def _averaged(self, capture: Capture, batch: Batch) -> tuple[Tensor, Gradients]:
        assert self.reward is not None
        require_whole(self.task.model)
        batch = map_tensors(lambda t: t.detach().to(self.task.device), batch)
        rows = self.reward.rows(self.task.model, batch)
        size, points = rows["level"].shape
        require_finite(rows["shift"].flatten(1), "shift of a reward")
        step = max(1, self.step // size)  # one example may have more points than fit
        values, found = [], []
        for first in range(0, points, step):
            some = {name: x[:, first : first + step] for name, x in rows.items()}
            value, gradients = capture.gradients(
                Following(self.task.objective), {k: x.flatten(0, 1) for k, x in some.items()}
            )
            scale = torch.full_like(value, self.sign / points)
            if self.unit:
                scale = scale * self._inverse_lengths(gradients)
            values.append(value.view(size, -1))
            found.append({n: folded(times(g, scale), size) for n, g in gradients.items()})
        return torch.cat(values, 1).mean(1), added(found) if len(found) > 1 else found[0]

    def _inverse_lengths(self, gradients: Gradients) -> Tensor:
        """Of each gradient `[b]`; zero where it is zero."""
        squares = [squared_norms(gradients[n], block) for n, block in self.plan.blocks.items()]
        lengths = torch.stack(squares).sum(0).sqrt()
        return torch.where(lengths > 0, 1 / lengths, 0.0)


@dataclass(frozen=True)
class Following:
    """The loss of following a reward, `[b]`, on rows that have its shifts."""

    objective: Any

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """`‖sg[ε + δ] − ε‖² / pixels`, up to a factor that is free of the parameters."""
        noisy = batch["noisy"]
        said = self.objective.predicted(model, noisy, batch["level"], batch)
        return (said.detach() + batch["shift"] - said).square().flatten(1).mean(1)


def stops(sampler: Sampler) -> range:
    """Steps after which noisy images are looked at: every tenth part of the way."""
    every = max(1, sampler.steps // 10)
    return range(every, sampler.steps, every)


def unclipped(sampler: Sampler) -> Sampler:
    """For the way back: a clipped guess cannot be undone, and the way ends in no noise."""
    return replace(sampler, clip=False)


def rate(objective: Denoising, level: Level) -> float:
    """Derivative of the noise that a prediction amounts to in the prediction."""
    signal, strength = objective.schedule.at(level)
    return {"epsilon": 1.0, "v": signal, "x0": -signal / strength}[objective.prediction]


def folded(terms: list[Factors], size: int) -> list[Factors]:
    """Gradients of points `[b * p]` as those of `size` examples, summed over points."""
    return [_folded(term, size) for term in terms]


def _folded(term: Factors, size: int) -> Factors:
    left, right = term
    if is_one(right) and left.shape[1] == 1:
        return vector(left.view(size, -1, left.shape[2]).sum(1))
    right = right.expand(*left.shape[:2], right.shape[2])
    return Factors(left.reshape(size, -1, *left.shape[2:]), right.reshape(size, -1, right.shape[2]))


def _rows(condition: Tensor, states: list[tuple[Level, Tensor]], shifts: list[Tensor]) -> Rows:
    noisy = torch.stack([state for _, state in states], 1)
    levels = noisy.new_tensor([level for level, _ in states])
    told = condition[:, None].expand(-1, len(states), *condition.shape[1:])
    return {
        "noisy": noisy,
        "level": levels.expand(len(noisy), -1),
        "shift": torch.stack(shifts, 1),
        "condition": told,
    }
