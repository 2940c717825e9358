"""A dense Gaussian projection: the reference, for few parameters."""

from dataclasses import dataclass

import torch
from torch import Tensor

from forebear.blocks import Plan
from forebear.capture import Gradients
from forebear.errors import TaskError
from forebear.gradients import materialise

LARGEST = 2**28


@dataclass(frozen=True)
class Gaussian:
    """Independent normal entries with variance `1 / dimension` (Johnson & Lindenstrauss 1984)."""

    dimension: int = 2048

    def prepare(self, plan: Plan, seed: int) -> "PreparedGaussian":
        """Draw one matrix `[size, dimension]` a block.

        Raises:
            TaskError: the matrices would be larger than 1 GB.
        """
        size = sum(block.size for block in plan.blocks.values())
        if size * self.dimension > LARGEST:
            raise TaskError(
                f"a dense projection of {size} parameters to {self.dimension} dimensions takes "
                f"{size * self.dimension * 4 / 2**30:.1f} GB: use projection=TensorSketch(...)"
            )
        generator = torch.Generator().manual_seed(seed)
        return PreparedGaussian(
            plan,
            {
                name: torch.randn(block.size, self.dimension, generator=generator)
                / self.dimension**0.5
                for name, block in plan.blocks.items()
            },
        )


@dataclass(frozen=True)
class PreparedGaussian:
    """The drawn matrices by block."""

    plan: Plan
    matrices: dict[str, Tensor]

    @property
    def sizes(self) -> dict[str, int]:
        """One part."""
        return {"projected": next(iter(self.matrices.values())).shape[1]}

    def features(self, gradients: Gradients) -> Tensor:
        """Projected gradients, `[b, dimension]`."""
        parts = []
        for name, matrix in self.matrices.items():
            written = materialise(gradients[name], self.plan.blocks[name]).flatten(1)
            parts.append(written @ matrix.to(written))
        return torch.stack(parts).sum(0)
