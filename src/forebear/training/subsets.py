"""Subsets of a training set, as boolean masks `[count, n]`: True means trained on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebear.errors import DataError

ATTEMPTS = 100
"""Draws for each wanted subset before the request for distinct ones is called impossible."""


def half_subsets(
    n: int, count: int, *, fraction: float = 0.5, seed: int = 0, paired: bool = False
) -> Tensor:
    """Random subsets of one size, all different, bool `[count, n]`.

    Args:
        n: number of training examples.
        count: number of subsets.
        fraction: share of the examples in each; the size is rounded to the nearest integer.
        seed: of the draw.
        paired: every second subset is the complement of the one before it, which cancels part of
            the sampling noise; needs an even `count` and a size of exactly n / 2.

    Raises:
        DataError: the size is 0 or n, or there are not that many distinct subsets.
    """
    size = round(fraction * n)
    if count < 1:
        raise DataError(f"count is {count}: ask for at least one subset")
    if not 0 < size < n:
        raise DataError(
            f"fraction {fraction} of {n} examples is {size}: a subset must leave at least one "
            "example in and one out"
        )
    if paired and (count % 2 or 2 * size != n):
        raise DataError(
            f"paired subsets need an even count (it is {count}) and exactly half of the examples "
            f"(it is {size} of {n})"
        )
    generator = torch.Generator().manual_seed(seed)
    masks: dict[bytes, Tensor] = {}
    for _ in range(ATTEMPTS * count):
        mask = torch.zeros(n, dtype=torch.bool)
        mask[torch.randperm(n, generator=generator)[:size]] = True
        drawn = (mask, ~mask) if paired else (mask,)
        for one in drawn:
            masks.setdefault(np.packbits(one.numpy()).tobytes(), one)
        if len(masks) >= count:
            return torch.stack(list(masks.values())[:count])
    raise DataError(
        f"found only {len(masks)} distinct subsets of {size} out of {n} examples and {count} were "
        "asked for: ask for fewer"
    )


def leave_one_out_subsets(n: int, rows: Sequence[int] | Tensor | np.ndarray) -> Tensor:
    """All examples but one, for each of `rows`, bool `[len(rows), n]`.

    Raises:
        DataError: a row is out of range or stands twice, or there is none.
    """
    return leave_group_out(n, _positions(rows, n)[:, None])


def leave_group_out(n: int, groups: Sequence[Any] | Tensor | np.ndarray) -> Tensor:
    """All examples but those of a group, for each group of positions, bool `[len(groups), n]`.

    Raises:
        DataError: there is no group, or one is empty, holds a position twice or one out of range,
            or leaves nothing to train on.
    """
    if len(groups) == 0:
        raise DataError("no group to leave out was given")
    masks = torch.ones(len(groups), n, dtype=torch.bool)
    for mask, group in zip(masks, groups, strict=True):
        mask[_positions(group, n)] = False
    empty = torch.nonzero(~masks.any(1))[:, 0].tolist()
    if empty:
        raise DataError(f"leaving out group {empty[0]} removes all {n} examples")
    return masks


def subset_mask(subset: Any, n: int) -> Tensor:
    """A boolean mask `[n]` of a mask or of positions; None is everything.

    Raises:
        DataError: a mask of another length, an unusable position, or an empty subset.
    """
    if subset is None:
        return torch.ones(n, dtype=torch.bool)
    given = torch.as_tensor(subset)
    if given.dtype == torch.bool:
        if given.shape != (n,):
            raise DataError(f"the subset mask has shape {tuple(given.shape)} for {n} examples")
        mask = given.cpu()
    else:
        mask = torch.zeros(n, dtype=torch.bool)
        mask[_positions(given, n)] = True
    if not mask.any():
        raise DataError("the subset is empty: there is nothing to train on")
    return mask


def subset_masks(subsets: Any, n: int) -> Tensor:
    """Boolean masks `[m, n]` of masks given as an array or as a list.

    Raises:
        DataError: the shape or type is another, or a subset is empty.
    """
    masks = torch.as_tensor(np.asarray(subsets) if not isinstance(subsets, Tensor) else subsets)
    if masks.ndim != 2 or masks.shape[1] != n or masks.dtype != torch.bool:
        raise DataError(
            f"subsets are {masks.dtype} of shape {tuple(masks.shape)}: they must be boolean masks "
            f"[m, {n}], one row a subset and one column a training example"
        )
    if not len(masks):
        raise DataError("no subset was given")
    empty = torch.nonzero(~masks.any(1))[:, 0].tolist()
    if empty:
        raise DataError(f"subset {empty[0]} is empty: there is nothing to train on")
    return masks.cpu()


def _positions(rows: Any, n: int) -> Tensor:
    positions = torch.as_tensor(rows).cpu()
    if positions.ndim != 1 or not len(positions) or positions.is_floating_point():
        raise DataError(
            f"positions have shape {tuple(positions.shape)} and type {positions.dtype}: give a "
            "non-empty list of integers"
        )
    bad = positions[(positions < 0) | (positions >= n)]
    if len(bad):
        raise DataError(f"position {int(bad[0])} is out of range: there are {n} training examples")
    values, counts = positions.unique(return_counts=True)
    if int(counts.max()) > 1:
        raise DataError(f"position {int(values[counts.argmax()])} stands more than once")
    return positions.long()
