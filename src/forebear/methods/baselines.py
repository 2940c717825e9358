"""Baselines that every other method has to beat: similarity of representations, and chance."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from forebear.data import Data, batch_length, map_tensors, naming, require_finite
from forebear.descriptions import Described
from forebear.errors import FormatError, MismatchError, TaskError
from forebear.executors import Executor, results
from forebear.methods.fitted import Fitted, Piece, warn_about_zeros
from forebear.methods.pixels import distances, pictures
from forebear.progress import track
from forebear.stream import BATCH, Result, is_elsewhere, stretches
from forebear.task import Loss, Task, per_example
from forebear.tasks.diffusion import Denoising
from forebear.tasks.schedules import Level
from forebear.types import require_choices

HIDDEN = "hidden"
"""Features that are hidden states of the task's model."""


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Similarity of last hidden states: what the last linear layer gets to see.

    Scores say what looks alike to the model, not what taught it; labels play no part. For
    sequences the hidden states are averaged over positions, those that the batch's
    `attention_mask` leaves out excepted. A denoising network sees an image once, with the noise of
    one level: where there is much, its hidden states say more of the noise than of the image.

    With an encoder as `features` images are compared by what that makes of them, and the model
    plays no part: `Similarity(features=forebear.adapters.encoders.clip(folder))`.

    Attributes:
        features: `"hidden"`, or a function from images `[b, ...]` to features `[b, d]`.
        metric: `"cosine"`, `"dot"`, or `"distance"`, minus the Euclidean one.
        layer: take the input of this layer instead.
        level: of noise, for denoising tasks; the least noisy one of the loss when None.
    """

    name: str = "similarity"
    features: str | Callable[[Tensor], Tensor] = "hidden"
    metric: Literal["cosine", "dot", "distance"] = "cosine"
    layer: str | None = None
    level: Level | None = None

    def __post_init__(self) -> None:
        require_choices(self)
        if callable(self.features):
            if self.layer is not None or self.level is not None:
                raise TaskError(
                    "layer and level say which hidden states are compared, and features is a "
                    "function of images: leave them out"
                )
        elif isinstance(self.features, Described):
            raise FormatError(
                f"the features were made by {self.features.about}, which is not saved: pass the "
                "configuration itself with method="
            )
        elif self.features != HIDDEN:
            raise TaskError(
                f"features is {self.features!r}: it is 'hidden', or a function of images, such as "
                "an encoder of forebear.adapters.encoders; for pixels use fb.Pixels()"
            )

    def fit(
        self,
        task: Task,
        train: Any,
        *,
        ids: Any = None,
        batch_size: int = BATCH,
        executor: Executor | None = None,
    ) -> "FittedSimilarity":
        """Embed the training set; one forward pass.

        `executor` embeds; scores are products of what is in memory then, in this process.
        """
        data = Data.of(train, ids=ids, collate=task.collate)
        fitted = FittedSimilarity(self, task, data, batch_size=batch_size, executor=executor)
        fitted.embeddings = fitted.embed_training()
        return fitted

    def restore(self, task: Task, train: Data, tensors: dict[str, Tensor]) -> "FittedSimilarity":
        """From saved embeddings.

        Raises:
            MismatchError: `features` is another function than the one they were made with.
        """
        fitted = FittedSimilarity(self, task, train, batch_size=BATCH)
        fitted.embeddings = tensors["embeddings"]
        if callable(self.features):
            fitted.require_same_features()
        return fitted


class FittedSimilarity(Fitted):
    """Embeddings of the training set, `[n, d]`."""

    embeddings: Tensor

    def pieces(self, queries: Data) -> Iterator[Piece]:
        """Products of embeddings."""
        embedded = self.embed(queries, "queries")
        for start in range(0, len(self.embeddings), 8192):
            columns = slice(start, min(start + 8192, len(self.embeddings)))
            yield slice(0, len(queries)), columns, self._compared(embedded, columns)

    def restricted(self, positions: Tensor) -> Self:
        """The embeddings at `positions`."""
        part = self.on(None)
        part.train = self.train.select(positions)
        part.embeddings = self.embeddings[positions]
        return part

    def self_influence(self) -> Tensor:
        """Squared length of each embedding: one for all with the cosine, which ranks nothing.

        So does the distance, which is zero for all.
        """
        if self.method.metric == "distance":
            return torch.zeros(len(self.embeddings), dtype=self.embeddings[:1].dtype)
        return self.embeddings[:].square().sum(1)

    def tensors(self) -> dict[str, Tensor]:
        """The embeddings."""
        return {"embeddings": self.embeddings[:]}  # [:] reads those that are in a store

    def embed(self, data: Data, description: str) -> Tensor:
        """Features `[m, d]`, of unit length for the cosine."""
        return self._scaled(self.states(data, description))

    def require_same_features(self) -> None:
        """Raise `MismatchError` unless the first training example still has its embedding."""
        now, kept = self.embed(self.train.slice(slice(0, 1)), "check"), self.embeddings[:1]
        # What it is computed together with may change the last digits.
        if now.shape != kept.shape or (now - kept).abs().max() > 1e-3 * kept.abs().max():
            raise MismatchError(
                "the saved features are those of another function: give features= as it was, or "
                "fit again"
            )

    def embed_training(self) -> Tensor:
        """Those of the training set, `[n, d]`, piece by piece where the executor says."""
        if not is_elsewhere(self.executor):
            return self.embed(self.train, "training set")
        rows = stretches(len(self.train))
        names = [f"examples-{each.start:09d}" for each in rows]
        compute = partial(_states_of, self.on(None), rows)
        found = results(compute, names, "training set", executor=self.executor)
        return self._scaled(torch.cat([one["states"] for one in found]))

    def states(self, data: Data, description: str) -> Tensor:
        """Features `[m, d]`, in float32 or better."""
        found = self._encoded if callable(self.method.features) else self._hidden
        states = torch.cat(found(data, description))
        return states if states.dtype == torch.float64 else states.float()

    def _encoded(self, data: Data, description: str) -> list[Tensor]:
        """What the method's function makes of images, batch by batch."""
        found, steps = [], -(-len(data) // self.batch_size)
        with torch.no_grad():
            for rows, batch in track(data.batches(self.batch_size), description, total=steps):
                with naming(data, rows):
                    image = pictures(batch)
                    features = self.method.features(image)
                    shape = tuple(getattr(features, "shape", ()))
                    if not isinstance(features, Tensor) or shape[:1] != image.shape[:1]:
                        raise TaskError(
                            f"features= gives a {type(features).__name__} of shape {shape} for "
                            f"{len(image)} images: it must give a tensor [b, d]"
                        )
                    require_finite(features, "feature")
                found.append(features.detach().flatten(1).cpu())
        return found

    def _hidden(self, data: Data, description: str) -> list[Tensor]:
        """Last hidden states, batch by batch."""
        name = self.method.layer or _last_linear(self.task.model)
        loss = _seen_by(self.task, self.method.level)
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen.append(args[0].detach())

        handle = self.task.model.get_submodule(name).register_forward_hook(keep)
        found = []
        try:
            with self.task.evaluation(), torch.no_grad():
                steps = -(-len(data) // self.batch_size)
                for rows, batch in track(data.batches(self.batch_size), description, total=steps):
                    seen.clear()
                    moved = map_tensors(lambda t: t.to(self.task.device), batch)
                    look = partial(_look, self.task, loss, moved)
                    with naming(data, rows):
                        self.task.in_step("states", look, look)
                    size = batch_length(moved)
                    states = seen[-1].reshape(size, -1, seen[-1].shape[-1])  # [b, t, d]
                    found.append(_mean_state(states, moved).cpu())
        finally:
            handle.remove()
        return found

    def _compared(self, embedded: Tensor, columns: slice) -> Tensor:
        if self.method.metric == "distance":
            return distances(embedded, self.embeddings[columns]).to(embedded.dtype)
        return embedded @ self.embeddings[columns].to(embedded.dtype).T

    def _scaled(self, embedded: Tensor) -> Tensor:
        if self.method.metric != "cosine":
            return embedded
        lengths = embedded.norm(dim=1, keepdim=True)
        warn_about_zeros(lengths, "embeddings")
        return embedded / lengths.clamp_min(torch.finfo(embedded.dtype).tiny)


@dataclass(frozen=True, kw_only=True)
class Random:
    """Independent normal scores: the floor of every metric. Each pair's score is its own."""

    name: str = "random"
    seed: int = 0

    def fit(
        self,
        task: Task,
        train: Any,
        *,
        ids: Any = None,
        batch_size: int = BATCH,
        executor: Executor | None = None,
    ) -> "FittedRandom":
        """Nothing to do, here or elsewhere."""
        data = Data.of(train, ids=ids, collate=task.collate)
        return FittedRandom(self, task, data, batch_size=batch_size, executor=executor)

    def restore(self, task: Task, train: Data, tensors: dict[str, Tensor]) -> "FittedRandom":
        """Nothing was saved."""
        return FittedRandom(self, task, train, batch_size=BATCH)


class FittedRandom(Fitted):
    """A generator for each query."""

    def pieces(self, queries: Data) -> Iterator[Piece]:
        """One row at a time; the same query position gives the same scores."""
        for row in range(len(queries)):
            generator = torch.Generator().manual_seed(self.method.seed * 1_000_003 + row + 1)
            values = torch.randn(1, len(self.train), generator=generator)
            yield slice(row, row + 1), slice(0, len(self.train)), values

    def self_influence(self) -> Tensor:
        """Random too."""
        generator = torch.Generator().manual_seed(self.method.seed * 1_000_003)
        return torch.randn(len(self.train), generator=generator)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing."""
        return {"seed": torch.tensor(self.method.seed)}


def _states_of(fitted: FittedSimilarity, rows: list[slice], number: int) -> Result:
    return {"states": fitted.states(fitted.train.slice(rows[number]), "training set")}


def _look(task: Task, loss: Loss, batch: Any) -> None:
    """A forward pass, for hooks to see."""
    with task.evaluation(), torch.no_grad():
        per_example(loss(task.model, batch), batch_length(batch), "the loss")


def _seen_by(task: Task, level: Level | None) -> Loss:
    """The loss whose forward pass is looked at: of a denoising task, at one level of noise.

    Raises:
        TaskError: a level is named and the task has none, or not that one.
    """
    if isinstance(task.loss, Denoising):
        return task.loss.at((task.loss.clearest if level is None else level,), draws=1)
    if level is not None:
        raise TaskError(
            f"level is {level} and the task's loss has no levels of noise: leave it out, or use "
            "fb.losses.Denoising"
        )
    return task.loss


def _mean_state(states: Tensor, batch: Any) -> Tensor:
    """Mean of `[b, t, d]` over the positions that the batch's attention mask does not leave out."""
    mask = batch.get("attention_mask") if hasattr(batch, "get") else None
    if mask is None or mask.shape != states.shape[:2]:
        return states.mean(1)
    weights = mask.to(states.dtype)[..., None]
    return (states * weights).sum(1) / weights.sum(1).clamp_min(1)


def _last_linear(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise TaskError(
            f"{type(model).__name__} has no linear layer to take hidden states from: name one with "
            "Similarity(layer=...)"
        )
    return names[-1]
