"""Streams of projected gradients, computed as they pass or kept in memory."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from forebear.blocks import Block, Plan
from forebear.capture import Gradients
from forebear.data import Data
from forebear.differentiation import Function
from forebear.executors import Executor
from forebear.layers import vector
from forebear.projections.base import PreparedProjection
from forebear.stream import Stream
from forebear.task import Task


def projected_plan(sizes: dict[str, int], coverage: float) -> Plan:
    """A plan whose blocks are the parts of the projected gradient, vectors."""
    blocks = {
        name: Block(name, size, 1, (name,), (torch.Size([size]),)) for name, size in sizes.items()
    }
    return Plan(blocks, (), coverage=coverage, verified=True)


@dataclass(frozen=True)
class ProjectedStream:
    """A stream whose gradients are projected batch by batch."""

    stream: Stream
    projection: PreparedProjection
    plan: Plan

    @property
    def task(self) -> Task:
        """The task of the stream."""
        return self.stream.task

    @property
    def data(self) -> Data:
        """The data of the stream."""
        return self.stream.data

    @property
    def executor(self) -> Executor | None:
        """Where the stream's passes are made."""
        return self.stream.executor

    def gradients(
        self, function: Function, description: str
    ) -> Iterator[tuple[slice, Tensor, Gradients]]:
        """Positions, values `[b]` and projected gradients."""
        for rows, values, gradients in self.stream.gradients(function, description):
            yield rows, values, as_blocks(self.projection.features(gradients), self.plan)

    def at(self, rows: slice, function: Function) -> tuple[Tensor, Gradients]:
        """Values and projected gradients of one batch."""
        values, gradients = self.stream.at(rows, function)
        return values, as_blocks(self.projection.features(gradients), self.plan)

    def batches(self, description: str) -> Iterator[tuple[slice, object]]:
        """Positions and batches."""
        return self.stream.batches(description)

    def part(self, rows: slice) -> "ProjectedStream":
        """The stream of some examples."""
        return replace(self, stream=self.stream.part(rows))


@dataclass(frozen=True)
class KeptStream:
    """Projected gradients `[n, k]` of a dataset in memory, and one weight `[n]` for each.

    It has the face of a stream, whatever function is asked for: features belong to the one they
    were made with. Passes over it are made here, where the features are.
    """

    task: Task
    data: Data
    plan: Plan
    features: Tensor
    weights: Tensor
    step: int = 16384  # rows are views: long products cost nothing but their result

    def gradients(
        self, function: Function, description: str
    ) -> Iterator[tuple[slice, Tensor, Gradients]]:
        """Positions, weights `[b]` and features."""
        for start in range(0, len(self.features), self.step):
            rows = slice(start, min(start + self.step, len(self.features)))
            yield rows, *self.at(rows, function)

    def at(self, rows: slice, function: Function) -> tuple[Tensor, Gradients]:
        """Weights and features of some rows."""
        return self.weights[rows], as_blocks(self.features[rows], self.plan)

    def batches(self, description: str) -> Iterator[tuple[slice, object]]:
        """Positions; the batches themselves are not needed."""
        for start in range(0, len(self.features), self.step):
            yield slice(start, min(start + self.step, len(self.features))), None

    @property
    def executor(self) -> None:
        """In this process."""
        return None

    def part(self, rows: slice) -> "KeptStream":
        """The features of some examples."""
        data, features, weights = self.data.slice(rows), self.features[rows], self.weights[rows]
        return replace(self, data=data, features=features, weights=weights)

    def select(self, data: Data, positions: Tensor) -> "KeptStream":
        """The features at `positions` `[m]`, which are those of `data`."""
        features, weights = self.features[positions], self.weights[positions]
        return replace(self, data=data, features=features, weights=weights)


def as_blocks(features: Tensor, plan: Plan) -> Gradients:
    """Vectors `[b, k]` as gradients whose blocks are their parts."""
    parts = features.split([block.size for block in plan.blocks.values()], 1)
    return {name: [vector(part)] for name, part in zip(plan.blocks, parts, strict=True)}
