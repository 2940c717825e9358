"""A recipe: how a model was trained, so that it can be trained again on other data."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from forebear.data import Data, batch_length, map_tensors, naming
from forebear.descriptions import describe
from forebear.errors import NonFiniteError, TaskError, unknown_name
from forebear.task import Checkpoint, Loss, per_example, state_hash
from forebear.tasks.noise import moments
from forebear.training.schedule import (
    SCHEDULES,
    epoch_batches,
    epoch_orders,
    rate_factor,
    steps_per_epoch,
)
from forebear.training.subsets import subset_mask

if TYPE_CHECKING:
    from forebear.training.ensemble import Ensemble

OPTIMIZERS = ("adam", "adamw", "sgd")


@dataclass(frozen=True)
class Recipe:
    """How a model was trained: build, loss, optimizer, schedule.

    Each step follows the gradient of the mean loss of a mini-batch. One seed fixes the initial
    weights and the order of the examples; the global random state is left as it was.

    Attributes:
        build: makes an untrained model.
        loss: `loss(model, batch) -> [b]`, the training loss of each example.
        optimizer: `"sgd"`, `"adam"` or `"adamw"`, as in `torch.optim`.
        learning_rate: at the start.
        momentum: of SGD.
        betas: of Adam and AdamW.
        epsilon: of Adam and AdamW.
        weight_decay: as the optimizer of that name understands it, on all parameters.
        epochs: passes over the data.
        batch_size: the largest size of a batch; the batches of an epoch differ by at most one.
        schedule: `"constant"`, or down to zero as `"cosine"` or `"linear"`, step by step.
    """

    build: Callable[[], nn.Module]
    loss: Loss
    _: KW_ONLY
    learning_rate: float
    epochs: int
    batch_size: int
    optimizer: str = "sgd"
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = "constant"

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise unknown_name("optimizer", self.optimizer, OPTIMIZERS)
        if self.schedule not in SCHEDULES:
            raise unknown_name("schedule", self.schedule, SCHEDULES)
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise TaskError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not self.learning_rate > 0:
            raise TaskError(f"learning_rate is {self.learning_rate}: it must be above 0")

    def train(self, data: Any, subset: Any = None, seed: int = 0) -> nn.Module:
        """A model trained on `data`, or on a subset of it, in evaluation mode.

        Args:
            data: any map-style dataset, or a tuple or dict of tensors.
            subset: boolean mask `[n]` or positions; everything when left out.
            seed: of initial weights and

        Raises:
            NonFiniteError: training diverged.
        """
        with seeded(seed):
            model = self.build()
            for _ in self._steps(model, Data.of(data), subset, seed):
                pass
        return _finished(model, seed)

    def train_with_checkpoints(
        self, data: Any, *, seed: int = 0, count: int = 5
    ) -> tuple[nn.Module, tuple[Checkpoint, ...]]:
        """A trained model and `count` checkpoints spread evenly over training, the last its end.

        The learning rate of a checkpoint is the mean over the steps since the one before it,
        which it stands for: at its own step a cosine schedule would give the last one no weight.
        """
        data = Data.of(data)
        total = self.epochs * steps_per_epoch(len(data), self.batch_size)
        if not 1 <= count <= total:
            raise TaskError(f"count is {count}: training has {total} steps, choose 1 to {total}")
        ends = {total * (k + 1) // count for k in range(count)}
        checkpoints: list[Checkpoint] = []
        rates: list[float] = []
        with seeded(seed):
            model = self.build()
            for step, rate in enumerate(self._steps(model, data, None, seed), start=1):
                rates.append(rate)
                if step in ends:
                    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
                    checkpoints.append(Checkpoint(state, sum(rates) / len(rates)))
                    rates = []
        return _finished(model, seed), tuple(checkpoints)

    def further_train(
        self,
        model: nn.Module,
        data: Any,
        *,
        epochs: int,
        learning_rate: float | None = None,
        subset: Any = None,
        seed: int = 0,
    ) -> nn.Module:
        """A copy of `model` trained on, with a fresh optimizer and a constant learning rate."""
        changes = {"epochs": epochs, "schedule": "constant"}
        if learning_rate is not None:
            changes["learning_rate"] = learning_rate
        again = self.with_settings(**changes)
        with seeded(seed):
            model = copy.deepcopy(model)
            for _ in again._steps(model, Data.of(data), subset, seed):
                pass
        return _finished(model, seed)

    def train_many(self, data: Any, subsets: Any, seeds: int | Sequence[int]) -> "Ensemble":
        """Many models at once, one for each subset; the same as `train` on each, but faster.

        Args:
            data: any map-style dataset, or a tuple or dict of tensors.
            subsets: boolean masks `[m, n]`.
            seeds: one for each subset, or one for all.
        """
        from forebear.training.ensemble import train_ensemble

        return train_ensemble(self, Data.of(data), subsets, seeds)

    def with_settings(self, **changes: Any) -> "Recipe":
        """The same recipe with other settings."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "_"}
        return Recipe(**{**fields, **changes})

    def make_optimizer(
        self, parameters: list[Any], *, fused: bool | None = None
    ) -> torch.optim.Optimizer:
        """The torch optimizer of this recipe; `fused` makes an update in one pass over memory."""
        return optimizer_of(self, parameters, fused=fused)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings, ready for JSON; functions and losses described."""
        named = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("_", "build", "loss")
        }
        named["betas"] = list(self.betas)
        return {"build": describe(self.build), "loss": describe(self.loss), **named}

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the settings, the initial weights at seed 0 and the version of forebear."""
        with seeded(0):
            initial = state_hash(self.build().state_dict())
        text = json.dumps([self.settings, initial, version("forebear")], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _steps(self, model: nn.Module, data: Data, subset: Any, seed: int) -> Iterator[float]:
        """Train in place; yields the learning rate of each step after it was made."""
        mask = subset_mask(subset, len(data))
        parameters = [p for p in model.parameters() if p.requires_grad]
        device = next(model.parameters()).device
        optimizer = self.make_optimizer(parameters)
        total = self.epochs * steps_per_epoch(int(mask.sum()), self.batch_size)
        model.train()
        step = 0
        for epoch, permutation in enumerate(epoch_orders(len(data), self.epochs, seed)):
            for rows in epoch_batches(permutation, mask, self.batch_size):
                rate = self.learning_rate * rate_factor(self.schedule, step, total)
                optimizer.param_groups[0]["lr"] = rate
                batch = map_tensors(lambda t: t.to(device), data.batch(rows))
                with naming(data, rows):
                    batch = stamped(batch, self.loss, seed, epoch)
                optimizer.zero_grad()
                losses = per_example(self.loss(model, batch), batch_length(batch), "the loss")
                losses.mean().backward()
                optimizer.step()
                step += 1
                yield rate


def stamped(batch: Any, loss: Loss, seed: int | Tensor, epoch: int) -> Any:
    """The batch with the moment of each example's visit, for losses that draw random numbers.

    Such a loss has an attribute `random` that is true, and its examples have a `key`. It may have a
    `check(batch)` that refuses examples, which inside a stack of models it could not look at.
    """
    if not getattr(loss, "random", False):
        return batch
    if not hasattr(batch, "keys") or "key" not in batch:
        raise TaskError(
            f"{name_of(loss)} draws noise that belongs to examples, and they have no 'key': make "
            "the dataset with forebear.tasks.diffusion.images"
        )
    check = getattr(loss, "check", None)
    if check is not None:
        last = batch["key"].ndim - 1  # members of a stack come first
        check(map_tensors(lambda t: t.flatten(0, last) if t.ndim > last else t, batch))
    return {**batch, "moment": moments(batch["key"], seed, epoch)}


def optimizer_of(
    settings: Any, parameters: list[Any], *, fused: bool | None = None
) -> torch.optim.Optimizer:
    """The torch optimizer of settings that name it as a `Recipe` does."""
    common = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay, "fused": fused}
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=settings.momentum, **common)
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, betas=settings.betas, eps=settings.epsilon, **common)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's global random state seeded inside the block and restored afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def name_of(function: Any) -> str:
    """A readable name of a function or of a callable object."""
    name = getattr(function, "name", None) or getattr(function, "__qualname__", None)
    return str(name or type(function).__qualname__)


def diverged(seeds: Sequence[int], what: str) -> NonFiniteError:
    """The error for models with weights that are not finite."""
    shown = ", ".join(map(str, sorted(set(seeds))))
    return NonFiniteError(
        f"training diverged: {what} has weights that are NaN or infinite (seed {shown}); lower "
        "learning_rate or look for NaN in the data"
    )


def _finished(model: nn.Module, seed: int) -> nn.Module:
    tensors: Iterator[Tensor] = model.parameters()
    if not all(bool(torch.isfinite(p).all()) for p in tensors):
        raise diverged([seed], "the model")
    return model.eval()
