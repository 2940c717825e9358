"""In which order examples are seen and how large each step is.

The batches of an epoch differ in size by at most one example, so that no example weighs much more
than another, as those of a short last batch would. All subsets trained with one seed share their
random numbers: a subset sees its examples in the order in which the whole training set would be
seen. The difference between two retrainings is then due to the examples and less to luck.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

SCHEDULES = ("constant", "cosine", "linear")


def rate_factor(schedule: str, step: int, steps: int) -> float:
    """What the learning rate is multiplied by at `step` of `steps`, counted from zero."""
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / steps))
    if schedule == "linear":
        return 1 - step / steps
    return 1.0


def steps_per_epoch(size: int, batch_size: int) -> int:
    """Number of batches for `size` examples."""
    return -(-size // batch_size)


def epoch_orders(n: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """A permutation of all n examples for each epoch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield torch.randperm(n, generator=generator)


def epoch_batches(order: Tensor, mask: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Positions of the examples of each batch of one epoch over the subset `mask`."""
    rows = order[mask[order]]
    yield from rows.tensor_split(_bounds(len(rows), steps_per_epoch(len(rows), batch_size)))


def _bounds(size: int, steps: int) -> tuple[int, ...]:
    return tuple(step * size // steps for step in range(1, steps))


class StackedBatches:
    """The batches of several members at once, padded to one width.

    All members have the same number of steps an epoch; their subsets may differ in size. With
    `batch_size` batches are cut as torch's `DataLoader` does, full ones and a short last one.

    Attributes:
        steps: number of steps in an epoch.
        weights: `[steps, m, width]`, one over the size of the member's batch, zero where padded.
        padded: whether any weight is zero.
    """

    def __init__(self, masks: Tensor, steps: int, batch_size: int | None = None) -> None:
        self.masks = masks
        self.steps = steps
        sizes = masks.sum(1)  # [m]
        ends = torch.arange(steps + 1)[:, None]
        even = batch_size is None
        bounds = ends * sizes // steps if even else torch.minimum(ends * batch_size, sizes)
        counts = bounds[1:] - bounds[:-1]  # [steps, m]
        place = torch.arange(int(counts.max()))
        real = place < counts[:, :, None]  # [steps, m, width]
        offsets = sizes.cumsum(0) - sizes
        self._places = (bounds[:-1] + offsets)[:, :, None] + torch.where(real, place, 0)
        self.weights = real.double() / counts[:, :, None]
        self.padded = not bool(real.all())

    def epoch(self, orders: Tensor) -> Tensor:
        """Positions `[steps, m, width]` of one epoch.

        Args:
            orders: `[m, n]`, the permutation of each member.
        """
        rows = orders[self.masks.gather(1, orders)]  # all subsets, one after the other
        return rows[self._places]
