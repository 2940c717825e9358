"""Classification with softmax cross-entropy."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forebear.tasks.objective import Objective, draw_classes


class CrossEntropy(Objective):
    """Softmax cross-entropy of `model(x) -> [b, c]` against labels `y` `[b]`; batch is `(x, y)`."""

    name = "cross_entropy"

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Logits `[b, c]`."""
        return model(batch[0])

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Cross-entropy of each example, `[b]`."""
        return F.cross_entropy(outputs, batch[1], reduction="none")

    def sample(
        self, outputs: Tensor, batch: Any, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Labels `[b]` and weights `[b]`; see `draw_classes`."""
        return draw_classes(outputs, generator)

    def loss_at(self, outputs: Tensor, batch: Any, targets: Tensor, weights: Tensor) -> Tensor:
        """Weighted cross-entropy of each example at other labels, `[b]`."""
        return weights * F.cross_entropy(outputs, targets, reduction="none")
