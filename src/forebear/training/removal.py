"""What removing the strongest proponents really does: retrain without them and measure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebear.data import Data
from forebear.errors import DataError
from forebear.task import Loss
from forebear.training.recipe import Recipe
from forebear.types import Scores


@dataclass(frozen=True, kw_only=True)
class RemovalOutcomes:
    """Measurements after examples were removed and the model retrained, mean over seeds.

    Attributes:
        fractions: `[k]` share of the training examples removed.
        highest: `[k, q]` without the examples that score highest.
        lowest: `[k, q]` without those that score lowest.
        random: `[k, q]` without random ones.
        full: `[q]` with everything.
    """

    fractions: np.ndarray
    highest: np.ndarray
    lowest: np.ndarray
    random: np.ndarray
    full: np.ndarray


def removal_outcomes(
    recipe: Recipe,
    train: Any,
    queries: Any,
    scores: Any,
    *,
    fractions: Sequence[float] = (0.05, 0.1, 0.2, 0.4),
    seeds: int | Sequence[int] = 2,
    measure: Loss | None = None,
    draws: int = 2,
) -> RemovalOutcomes:
    """Retrain without the examples whose total score over the queries is highest.

    The same number of lowest-scoring and of random examples are removed for comparison. All
    retrainings run as one ensemble.

    Args:
        recipe: how to train.
        train: training set, n examples.
        queries: what is measured, q of them.
        scores: `[q, n]` or `Scores`.
        fractions: shares of the training set to remove, each above 0 and below 1.
        seeds: how many retrainings of each set, or which.
        measure: minus the loss when left out.
        draws: random sets for each fraction, averaged.

    Raises:
        DataError: scores have another shape, or a fraction removes nothing or everything.
    """
    train, queries = Data.of(train), Data.of(queries)
    values = torch.as_tensor(scores.values if isinstance(scores, Scores) else scores)
    n, q = len(train), len(queries)
    if values.shape != (q, n):
        raise DataError(f"scores have shape {tuple(values.shape)}: [query, train] is {(q, n)}")
    counts = [round(fraction * n) for fraction in fractions]
    if not counts or min(counts) < 1 or max(counts) >= n:
        raise DataError(f"fractions {tuple(fractions)} of {n} examples remove none or all of them")
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(int(s) for s in seeds)
    masks = _masks(values.double().sum(0), counts, draws)
    function = measure or (lambda model, batch: -recipe.loss(model, batch))
    pairs = [(mask, seed) for mask in masks for seed in chosen]
    models = recipe.train_many(train, torch.stack([m for m, _ in pairs]), [s for _, s in pairs])
    outcomes = models.evaluate(function, queries).cpu().double()
    means = outcomes.reshape(len(masks), len(chosen), q).mean(1).numpy()  # [1 + k (2 + draws), q]
    each = means[1:].reshape(len(counts), 2 + draws, q)
    return RemovalOutcomes(
        fractions=np.asarray(counts) / n,
        highest=each[:, 0],
        lowest=each[:, 1],
        random=each[:, 2:].mean(1),
        full=means[0],
    )


def _masks(total: Tensor, counts: list[int], draws: int) -> list[Tensor]:
    """Everything; then for each count without the highest, the lowest, and random draws."""
    if draws < 1:
        raise DataError(f"draws is {draws}: at least one random set is needed for comparison")
    n = len(total)
    falling = torch.argsort(total, descending=True, stable=True)
    generator = torch.Generator().manual_seed(0)
    # Nested: a random order is cut at each count, as the ranking is.
    orders = [falling, falling.flip(0)]
    orders += [torch.randperm(n, generator=generator) for _ in range(draws)]
    masks = [torch.ones(n, dtype=torch.bool)]
    for count in counts:
        for order in orders:
            mask = torch.ones(n, dtype=torch.bool)
            mask[order[:count]] = False
            masks.append(mask)
    return masks
