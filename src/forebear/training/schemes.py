"""What it means to train without an example: three schemes, as rows and weights of each batch."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from forebear.errors import DataError, TaskError
from forebear.training import schedule

Scheme = Literal["every", "mask", "shift"]

Weighted = tuple[Tensor, Tensor]
"""Positions `[m, width]` (or `[width]`, shared by all members) and weights `[m, width]`."""


class Removals:
    """Runs over one training set, each without a group of examples, with common batches.

    `"every"`: each step minimises the mean loss of its batch minus `fraction / n` times the losses
    of the group, the removal as it stands in the risk. `"mask"`: the group drops out of its own
    batches, whose other weights are renormalised. `"shift"`: the group is deleted from the order of
    the examples, and the batches after it slide.

    Args:
        n: training examples.
        groups: positions that each run lacks; an empty one is training on everything.
        scheme: one of the three.
        batch_size: the largest size of a batch.
        fraction: of the group's weight that is removed.
        short_last: cut batches as torch's `DataLoader` does, instead of evenly.
    """

    def __init__(
        self,
        n: int,
        groups: Sequence[Tensor],
        *,
        scheme: Scheme,
        batch_size: int,
        fraction: float = 1.0,
        short_last: bool = False,
    ) -> None:
        if scheme == "shift" and fraction != 1:
            raise TaskError(
                f"fraction is {fraction} and the scheme is 'shift', which deletes whole examples: "
                "use 'every' or 'mask'"
            )
        self.n = n
        self.groups = groups
        self.scheme = scheme
        self.batch_size = batch_size
        self.fraction = fraction
        self.short_last = short_last
        # One width for all runs: random numbers of a batch then belong to the same places.
        self._width = max(len(group) for group in groups)

    def __len__(self) -> int:
        return len(self.groups)

    def steps(self, run: int) -> int:
        """Steps of an epoch of a run."""
        size = self.n - len(self.groups[run]) if self.scheme == "shift" else self.n
        return schedule.steps_per_epoch(size, self.batch_size)

    def epochs(self, runs: Sequence[int], orders: Iterator[Tensor]) -> Iterator[Weighted]:
        """The batches of some runs with equal numbers of steps, epoch after epoch.

        Args:
            runs: positions in `groups`.
            orders: the permutation `[n]` of each epoch.
        """
        if self.scheme == "shift":
            return self._shifted(runs, orders)
        return self._masked(runs, orders) if self.scheme == "mask" else self._every(runs, orders)

    def _shifted(self, runs: Sequence[int], orders: Iterator[Tensor]) -> Iterator[Weighted]:
        cut = self.batch_size if self.short_last else None
        kept = ~self._members(runs)
        batches = schedule.StackedBatches(kept, self.steps(runs[0]), cut)
        for order in orders:
            rows = batches.epoch(order.expand(len(runs), -1))
            yield from zip(rows, batches.weights, strict=True)

    def _masked(self, runs: Sequence[int], orders: Iterator[Tensor]) -> Iterator[Weighted]:
        weights = 1.0 - self.fraction * self._members(runs).double()  # [m, n]
        for order in orders:
            for rows in self._batches(order):
                own = weights[:, rows]
                total = own.sum(1, keepdim=True)
                empty = torch.nonzero(total[:, 0] <= 0)[:, 0].tolist()
                if empty:
                    raise DataError(
                        f"a batch of {len(rows)} examples is empty without the group "
                        f"{self.groups[runs[empty[0]]].tolist()}: use larger batches or "
                        "scheme='every'"
                    )
                yield rows, own / total

    def _every(self, runs: Sequence[int], orders: Iterator[Tensor]) -> Iterator[Weighted]:
        extra = torch.zeros(len(runs), self._width, dtype=torch.long)
        weights = torch.zeros(len(runs), self._width, dtype=torch.float64)
        for place, run in enumerate(runs):
            group = self.groups[run]
            extra[place, : len(group)] = group
            weights[place, : len(group)] = -self.fraction / self.n
        for order in orders:
            for rows in self._batches(order):
                own = rows.expand(len(runs), -1)
                mean = torch.full(own.shape, 1 / len(rows), dtype=torch.float64)
                yield torch.cat([own, extra], 1), torch.cat([mean, weights], 1)

    def _batches(self, order: Tensor) -> Sequence[Tensor]:
        if self.short_last:
            return order.split(self.batch_size)
        everything = torch.ones(len(order), dtype=torch.bool)
        return list(schedule.epoch_batches(order, everything, self.batch_size))

    def _members(self, runs: Sequence[int]) -> Tensor:
        """Which examples are in the groups of `runs`, bool `[m, n]`."""
        masks = torch.zeros(len(runs), self.n, dtype=torch.bool)
        for mask, run in zip(masks, runs, strict=True):
            mask[self.groups[run]] = True
        return masks
