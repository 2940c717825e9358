"""Diagonal curvature: each parameter by itself."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from forebear.blocks import Block, Plan
from forebear.curvature.accumulate import Targets
from forebear.curvature.base import GradientStream
from forebear.curvature.basis import Basis
from forebear.curvature.damping import Damping
from forebear.curvature.kronecker import EigenBlocks, FittedKronecker
from forebear.differentiation import Function
from forebear.errors import TaskError
from forebear.gradients import Precision
from forebear.stream import Stream, summed
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
        if self.targets == "exact" and not isinstance(stream, Stream):
            raise TaskError(
                "the Gauss-Newton matrix of projected gradients is not known: use "
                "targets='empirical'"
            )
        targets = Targets(self.targets, 1, function, seed)
        squares = summed(stream, partial(_squares, targets), "diagonal")
        bases = {name: parameters_themselves(block) for name, block in stream.plan.blocks.items()}
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


def _squares(targets: Targets, stream: GradientStream, piece: int) -> dict[str, Tensor]:
    """Squared gradients summed over a piece, `[rows, cols]` of every block."""
    squares: dict[str, Tensor] = {}
    for several in targets.gradients(stream, piece, "diagonal"):
        for gradients in several:
            for name, block in stream.plan.blocks.items():
                terms = gradients[name]
                if name not in squares:
                    squares[name] = terms[0].right.new_zeros(block.rows, block.cols)
                parameters_themselves(block).add_squares(squares[name], terms)
    return squares


def parameters_themselves(block: Block) -> Basis:
    """The basis in which every parameter is its own eigenvector."""
    return Basis(block, None, None, torch.ones(block.rows), torch.ones(block.cols))
