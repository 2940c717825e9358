"""Baselines that every other method has to beat: similarity of representations, and chance."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from forebear.data import Data, batch_length, map_tensors
from forebear.errors import TaskError
from forebear.executors import Executor, results
from forebear.methods.fitted import Fitted, Piece, warn_about_zeros
from forebear.progress import track
from forebear.stream import BATCH, Result, is_elsewhere, stretches
from forebear.task import Task
from forebear.types import require_choices


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Similarity of last hidden states: what the last linear layer gets to see.

    Scores say what looks alike to the model, not what taught it; labels play no part. For
    sequences the hidden states are averaged over positions, those that the batch's
    `attention_mask` leaves out excepted.

    Attributes:
        metric: `"cosine"` or `"dot"`.
        layer: take the input of this layer instead.
    """

    name: str = "similarity"
    metric: Literal["cosine", "dot"] = "cosine"
    layer: str | None = None

    def __post_init__(self) -> None:
        require_choices(self)

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
        """From saved embeddings."""
        fitted = FittedSimilarity(self, task, train, batch_size=BATCH)
        fitted.embeddings = tensors["embeddings"]
        return fitted


class FittedSimilarity(Fitted):
    """Embeddings of the training set, `[n, d]`."""

    embeddings: Tensor

    def pieces(self, queries: Data) -> Iterator[Piece]:
        """Products of embeddings."""
        embedded = self.embed(queries, "queries")
        for start in range(0, len(self.embeddings), 8192):
            columns = slice(start, min(start + 8192, len(self.embeddings)))
            yield slice(0, len(queries)), columns, embedded @ self.embeddings[columns].T

    def restricted(self, positions: Tensor) -> Self:
        """The embeddings at `positions`."""
        part = self.on(None)
        part.train = self.train.select(positions)
        part.embeddings = self.embeddings[positions]
        return part

    def self_influence(self) -> Tensor:
        """Squared length of each embedding: one for all with the cosine, which ranks nothing."""
        return self.embeddings[:].square().sum(1)

    def tensors(self) -> dict[str, Tensor]:
        """The embeddings."""
        return {"embeddings": self.embeddings[:]}  # [:] reads those that are in a store

    def embed(self, data: Data, description: str) -> Tensor:
        """Last hidden states `[m, d]`, of unit length for the cosine."""
        return self._scaled(self.states(data, description))

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
        """Last hidden states `[m, d]`, in float32 or better."""
        name = self.method.layer or _last_linear(self.task.model)
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen.append(args[0].detach())

        handle = self.task.model.get_submodule(name).register_forward_hook(keep)
        rows = []
        try:
            with self.task.evaluation(), torch.no_grad():
                steps = -(-len(data) // self.batch_size)
                for _, batch in track(data.batches(self.batch_size), description, total=steps):
                    seen.clear()
                    moved = map_tensors(lambda t: t.to(self.task.device), batch)
                    look = partial(_look, self.task, moved)
                    self.task.in_step("states", look, look)
                    size = batch_length(moved)
                    states = seen[-1].reshape(size, -1, seen[-1].shape[-1])  # [b, t, d]
                    rows.append(_mean_state(states, moved).cpu())
        finally:
            handle.remove()
        states = torch.cat(rows)
        return states if states.dtype == torch.float64 else states.float()

    def _scaled(self, embedded: Tensor) -> Tensor:
        if self.method.metric == "dot":
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


def _look(task: Task, batch: Any) -> None:
    """A forward pass, for hooks to see."""
    with task.evaluation(), torch.no_grad():
        task.losses(task.model, batch)


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
