"""Where in a query a training image matters, and where in the training image that comes from."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forebear.methods.nda.patches import Rows, Window, canvas, kept_sum, training_patches

WEIGHT_BYTES = 2**26
"""Weights of single training patches at a time."""


@dataclass(frozen=True, eq=False)
class Maps:
    """Where in each query its top training images matter.

    Attributes:
        query_ids: `[q]`.
        ids: `[q, m]` of the training images, highest score first.
        values: `[q, m, h, w]` weight of each image at each position of the query; over all training
            images they add up to one.
        entropy: `[q, h, w]` of the weights of all training images, in nats: its exponential is how
            many images stand behind a position. Flat backgrounds have many.
    """

    query_ids: np.ndarray
    ids: np.ndarray
    values: Tensor
    entropy: Tensor


@dataclass(frozen=True, eq=False)
class Sources:
    """Where in its top training images a query finds what it needs.

    Attributes:
        query_ids: `[q]`.
        ids: `[q, m]` of the training images, highest score first.
        values: `[q, m, h, w]` weight of each position of the training image, summed over the
            query's positions.
        best: `[q, m, h, w, 2]` row and column in the training image of the patch with the largest
            weight, for each position of the query.
    """

    query_ids: np.ndarray
    ids: np.ndarray
    values: Tensor
    best: Tensor


@dataclass(frozen=True, eq=False)
class Places:
    """Maps of one query: `here` and `there` `[m, h, w]`, `best` `[m, h, w, 2]`."""

    here: Tensor
    there: Tensor
    best: Tensor


def places(
    parts: list[Rows],
    normaliser: Tensor,
    query: int,
    images: Tensor,
    window: Window,
    keep: int | None,
) -> Places:
    """Weights of some training images for one query, position by position.

    Args:
        parts: query positions, group by group.
        normaliser: `[t, q, h, w]`, logarithms of the sums of exponentials over all images.
        query: which.
        images: `[m, c, h, w]`, centred.
        window: the patch.
        keep: see `NDA`.
    """
    levels, queries, *extent = normaliser.shape
    painted = canvas(images, window)
    here = painted.new_zeros(len(images), *extent)
    there = torch.zeros_like(here)
    best = torch.zeros(len(images), *extent, 2, dtype=torch.long, device=images.device)
    for part in parts:
        group = part.group
        v = group.positions
        trained = training_patches(painted, group, window)  # [d + 2, v, m]
        coefficients = part.coefficients.view(levels, queries, v, -1)[:, query].clone()
        place = part.place.view(levels, queries, v)[:, query]
        coefficients[..., -1] = -normaliser.flatten()[place].to(coefficients.dtype)
        seen, given, chosen = _weigh(coefficients, trained, keep)
        box = (..., slice(group.rows.start, group.rows.stop),
               slice(group.columns.start, group.columns.stop))  # fmt: skip
        size = (len(images), len(group.rows), len(group.columns))
        here[box] = seen.T.reshape(size)
        there[box] = given.T.reshape(size)
        row = group.rows.start + chosen // len(group.columns)
        column = group.columns.start + chosen % len(group.columns)
        best[*box, :] = torch.stack([row.T, column.T], -1).reshape(*size, 2)
    return Places(here, there, best)


def _weigh(
    coefficients: Tensor, trained: Tensor, keep: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over training positions `[u, m]`, over query positions `[v, m]`, and arg-maxima."""
    levels, positions, _ = coefficients.shape
    _, v, m = trained.shape
    given = trained.new_zeros(v, m)
    seen, chosen = [], []
    step = max(1, WEIGHT_BYTES // (levels * v * m * trained.element_size()))
    for start in range(0, positions, step):
        some = coefficients[:, start : start + step]
        logits = (some @ trained.flatten(1)).view(levels, -1, v, m)
        # By logits: weights that vanish are all the same.
        chosen.append(logits.logsumexp(0).argmax(1))
        weights = logits.exp_()
        seen.append(kept_sum(weights.transpose(2, 3), keep).mean(0))
        given += weights.mean(0).sum(0)
    return torch.cat(seen), given, torch.cat(chosen)
