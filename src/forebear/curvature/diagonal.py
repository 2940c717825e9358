"""Diagonal curvature: each parameter by itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from forebear.blocks import Block, Plan
from forebear.capture import Function, Gradients
from forebear.curvature.base import GradientStream
from forebear.curvature.basis import Basis
from forebear.curvature.damping import Damping
from forebear.curvature.kronecker import EigenBlocks, FittedKronecker
from forebear.curvature.roots import root_gradients
from forebear.curvature.sampled import Sampled
from forebear.errors import TaskError
from forebear.gradients import Precision
from forebear.stream import Stream
from forebear.types import require_choices


@dataclass(frozen=True, kw_only=True)
class Diagonal:
    """The diagonal of the curvature: mean squares of gradients, parameter by parameter.

    It is K-FAC's form with the parameters themselves for a basis. With one position an example the
    squares come from factors, `mean (left²)ᵀ (right²)`, and no gradient is written out.

    Attributes:
        targets: `"sampled"` from the model's prediction, `"exact"`: the Gauss-Newton matrix's own
            diagonal, in a pass for each output, or `"empirical"`: the training labels.
        precision: of the products of all pairs; `"bfloat16"` adds up in float32.
    """

    targets: Literal["sampled", "exact", "empirical"] = "sampled"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        require_choices(self)

    def fit(
        self, stream: GradientStream, function: Function, damping: Damping, seed: int
    ) -> FittedKronecker:
        """Add up squares in one pass."""
        bases = {name: parameters_themselves(block) for name, block in stream.plan.blocks.items()}
        squares: dict[str, Tensor] = {}
        for gradients in self._parts(stream, function, seed):
            for name, basis in bases.items():
                block, terms = basis.block, gradients[name]
                if name not in squares:
                    squares[name] = terms[0].right.new_zeros(block.rows, block.cols)
                basis.add_squares(squares[name], terms)
        eigenvalues = {name: total / len(stream.data) for name, total in squares.items()}
        return self._blocks(stream, bases, eigenvalues).with_damping(damping)

    def restore(
        self, stream: GradientStream, function: Function, tensors: dict[str, Tensor]
    ) -> FittedKronecker:
        """From the saved diagonal."""
        bases, eigenvalues, used, inverses = {}, {}, {}, {}
        for name, block in stream.plan.blocks.items():
            bases[name] = parameters_themselves(block)
            eigenvalues[name] = tensors[f"{name}/eigenvalues"]
            inverses[name] = tensors[f"{name}/inverse"]
            used[name] = tensors[f"{name}/damping"].item()
        return self._blocks(stream, bases, eigenvalues).inverted(used, inverses)

    def _blocks(
        self, stream: GradientStream, bases: dict[str, Basis], eigenvalues: dict[str, Tensor]
    ) -> EigenBlocks:
        plan: Plan = stream.plan
        return EigenBlocks(
            plan, bases, eigenvalues, len(stream.data), rank=None, precision=self.precision
        )

    def _parts(self, stream: GradientStream, function: Function, seed: int) -> Iterator[Gradients]:
        if self.targets == "exact":
            if not isinstance(stream, Stream):
                raise TaskError(
                    "the Gauss-Newton matrix of projected gradients is not known: use "
                    "targets='empirical'"
                )
            yield from (gradients for _, _, gradients in root_gradients(stream))
            return
        if self.targets == "sampled":
            function = Sampled(stream.task, seed)
        for _, _, gradients in stream.gradients(function, "diagonal"):
            yield gradients


def parameters_themselves(block: Block) -> Basis:
    """The basis in which every parameter is its own eigenvector."""
    return Basis(block, None, None, torch.ones(block.rows), torch.ones(block.cols))
