"""Copies of a diffusion model that each forget one image and keep the rest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from forebear.data import Data, map_tensors
from forebear.errors import NonFiniteError
from forebear.methods.mucs.scales import Levels, Scales, seen
from forebear.tasks.noise import gaussian, uniform
from forebear.training.stacked import Call, Stack, State, repeated, warn_of_loop

LEVELS, PIXELS, ROWS = 11.0, 12.0, 13.0
"""What of a step is drawn: keeps levels, noise and the choice of examples apart."""


@dataclass(frozen=True)
class Unlearning:
    """How a query is forgotten; see `forebear.MUCS` for the fields."""

    learning_rate: float
    weight_decay: float
    batch_size: int
    forget: float
    stop: float
    window: int
    max_steps: int
    retain: bool
    clamp: bool
    location: float
    spread: float
    seed: int


class Visit(NamedTuple):
    """A step's training examples, and levels and noise `[2b, ...]` of these and of the query."""

    retained: dict[str, Tensor]
    levels: Levels
    noise: Tensor


@dataclass(frozen=True)
class Visits:
    """What the steps see. It belongs to the seed and the step: all queries see the same.

    Attributes:
        unlearning: batch size, distribution of noise scales and seed.
        scales: levels.
        data: the training set.
        order: positions `[n]` by key, so that the order of the training set plays no part.
        device: where the model is.
    """

    unlearning: Unlearning
    scales: Scales
    data: Data
    order: Tensor
    device: torch.device

    def at(self, step: int) -> Visit:
        """Of one step."""
        settings, count = self.unlearning, self.unlearning.batch_size
        slots = torch.arange(2 * count)
        chosen = uniform(slots[:count], settings.seed, ROWS, step) * len(self.order)
        batch = self.data.batch(self.order[chosen.ceil().long() - 1])
        batch = map_tensors(lambda t: t.to(self.device), seen(batch))
        image = batch["image"]
        noise = gaussian(
            slots, tuple(image.shape[1:]), settings.seed, PIXELS, step, dtype=image.dtype
        )
        drawn = gaussian(slots, (1,), settings.seed, LEVELS, step, dtype=image.dtype)[:, 0]
        scales = (settings.location + settings.spread * drawn).exp()
        return Visit(batch, self.scales.levels(scales.to(self.device)), noise.to(self.device))


class Mirrored:
    """Loss of what is retained minus a share of the bounded loss of what is forgotten.

    Args:
        unlearning: the share, and whether there are a bound and something to retain.
        scales: the loss.
        model: the architecture, with the weights that stay.
        null: the bound.
    """

    def __init__(
        self, unlearning: Unlearning, scales: Scales, model: nn.Module, null: float
    ) -> None:
        self._settings = unlearning
        self._null = null
        self._call = Call(model, lambda model, visit: scales.losses(model, *visit))
        self._stacks = True

    def __call__(self, copies: State, visit: Visit, queries: Any) -> tuple[State, Tensor, Tensor]:
        """Gradients `[m, *shape]` by name, and losses `[m]` of what is retained and forgotten.

        Args:
            copies: weights `[m, *shape]` by name.
            visit: of a step.
            queries: what each copy forgets, tensors `[m, ...]`.
        """
        if self._stacks:
            try:
                each = vmap(grad_and_value(self._value, has_aux=True), in_dims=(0, None, 0))
                gradients, (_, (retained, forgotten)) = each(copies, visit, queries)
                return gradients, retained, forgotten
            except RuntimeError as error:
                warn_of_loop("unlearned", str(error))
                self._stacks = False
        count = len(next(iter(copies.values())))
        found = [self._alone(copies, visit, queries, member) for member in range(count)]
        gradients = {name: torch.stack([one[0][name] for one in found]) for name in copies}
        losses = torch.stack([torch.stack(one[1]) for one in found])
        return gradients, losses[:, 0], losses[:, 1]

    def _alone(
        self, copies: State, visit: Visit, queries: Any, member: int
    ) -> tuple[State, tuple[Tensor, Tensor]]:
        own = {name: value[member].detach().requires_grad_() for name, value in copies.items()}
        with torch.enable_grad():
            value, losses = self._value(own, visit, map_tensors(lambda t: t[member], queries))
            found = torch.autograd.grad(value, list(own.values()))
        return dict(zip(own, found, strict=True)), (losses[0].detach(), losses[1].detach())

    def _value(self, copy: State, visit: Visit, query: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        settings = self._settings
        count = settings.batch_size
        both = {
            key: torch.cat([value, query[key].expand(value.shape)])
            for key, value in visit.retained.items()
        }
        losses = self._call.at(copy, (both, visit.levels, visit.noise))
        retained, asked = losses[:count].mean(), losses[count:]
        # Where the bound is reached there is no gradient: the ascent has an end.
        forgotten = (asked.clamp(max=self._null) if settings.clamp else asked).mean()
        value = -settings.forget * forgotten
        return retained + value if settings.retain else value, (retained, forgotten)


class Copies(Stack):
    """Copies of a model's weights under AdamW, which may finish one by one."""

    def __init__(self, start: State, count: int, unlearning: Unlearning) -> None:
        def optimizer(tensors: list[Tensor], **options: Any) -> torch.optim.Optimizer:
            rate, decay = unlearning.learning_rate, unlearning.weight_decay
            return torch.optim.AdamW(tensors, lr=rate, weight_decay=decay, **options)

        super().__init__(repeated(start, count), start, optimizer)

    def step_along(self, gradients: State) -> None:
        """One step of all copies."""
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name].contiguous()
        self.optimizer.step()

    def keep(self, members: Tensor) -> None:
        """Drop the other copies, with what the optimizer remembers of them."""
        (group,) = self.optimizer.param_groups
        for place, (name, before) in enumerate(self.parameters.items()):
            after = before[members]
            memory = self.optimizer.state.pop(before)
            self.optimizer.state[after] = {
                key: value[members] if value.shape == before.shape else value
                for key, value in memory.items()
            }
            group["params"][place] = self.state[name] = self.parameters[name] = after


@dataclass(frozen=True)
class Forgotten:
    """Copies of a model that have forgotten a query each.

    Attributes:
        state: changed weights by name, `[m, *shape]`.
        steps: `[m]` until each stopped.
        known: `[m]`, whether the query's loss began below the bound, so that there was something
            to forget.
        converged: `[m]`, whether its loss reached the bound by steps.
        forgotten: `[m]` loss of the query in the end, mean over the last batches.
        retained: `[m]` loss of training examples, likewise.
    """

    state: State
    steps: Tensor
    known: Tensor
    converged: Tensor
    forgotten: Tensor
    retained: Tensor


@torch.no_grad()
def forget(
    mirrored: Mirrored, visits: Visits, start: State, queries: Any, *, null: float
) -> Forgotten:
    """Unlearn queries, each in a copy of its own, all together.

    Args:
        mirrored: what is lowered.
        visits: what the steps see.
        start: the weights that change, by name.
        queries: tensors `[m, ...]`.
        null: the loss of a network that knows nothing.

    Raises:
        NonFiniteError: a loss is NaN or infinite; with the positions of the queries.
    """
    settings = visits.unlearning
    count = len(queries["image"])
    copies = Copies(start, count, settings)
    final = repeated(start, count)
    steps = torch.zeros(count, dtype=torch.long)
    found = torch.zeros(count, 2, dtype=torch.float64)  # retained, forgotten
    known = torch.ones(count, dtype=torch.bool)
    active, recent = torch.arange(count), []
    for step in range(settings.max_steps + 1):
        gradients, *losses = mirrored(copies.parameters, visits.at(step), queries)
        recent = [*recent, torch.stack(losses, 1).double().cpu()][-settings.window :]
        means = torch.stack(recent).mean(0)  # [active, 2]
        _require_finite(means, active)
        done = means[:, 1] >= settings.stop * null
        if step == 0:
            known = ~done
        if step == settings.max_steps:
            done[:] = True
        found[active], steps[active] = means, step
        for name, value in copies.parameters.items():
            final[name][active[done]] = value[done]
        if done.all():
            break
        copies.step_along(gradients)
        if done.any():
            rest = torch.nonzero(~done)[:, 0]
            copies.keep(rest)
            active, recent = active[rest], [losses[rest] for losses in recent]
            queries = map_tensors(lambda t, rest=rest: t[rest], queries)
    reached = found[:, 1] >= settings.stop * null
    return Forgotten(final, steps, known, reached & known, found[:, 1], found[:, 0])


def _require_finite(losses: Tensor, active: Tensor) -> None:
    bad = ~torch.isfinite(losses).all(1)
    if bad.any():
        error = NonFiniteError(
            f"the loss while unlearning is NaN or infinite for {bad.sum()} queries"
        )
        error.rows = active[bad]
        raise error


def weights_of(model: nn.Module, names: Sequence[str]) -> State:
    """Parameters by name, detached."""
    own = dict(model.named_parameters())
    return {name: own[name].detach() for name in names}
