"""What a ready task knows about its loss beyond the value."""

from typing import Any

import torch
from torch import Tensor, nn

from forebear.data import require_finite


class Objective:
    """A loss `objective(model, batch) -> [b]` taken apart into model outputs and a loss on them.

    Curvature needs targets drawn from the model (`sample`), the exact Gauss-Newton matrix needs
    the outputs, and TRAK needs a model output function (`link`). A plain callable
    `(model, batch) -> [b]` is a valid loss too; methods that need more say so.
    """

    name: str = "objective"

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """What the model says, `[b, ..., c]`."""
        raise NotImplementedError

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Loss of each example, `[b]`."""
        raise NotImplementedError

    def sample(self, outputs: Tensor, batch: Any, generator: torch.Generator) -> Any:
        """The batch with its targets replaced by draws from the model's own prediction."""
        raise NotImplementedError

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss of each example, `[b]`."""
        return self.loss(self.outputs(model, batch), batch)

    def sampled(self, model: nn.Module, batch: Any, generator: torch.Generator) -> Tensor:
        """Loss `[b]` at targets drawn from the model: its gradients have the true Fisher matrix."""
        outputs = self.outputs(model, batch)
        require_finite(outputs.detach(), "model's output")
        return self.loss(outputs, self.sample(outputs.detach(), batch, generator))

    def link(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """TRAK's model output `f` `[b]` and its weight `−dℓ/df` `[b]`.

        For a negative log-likelihood ℓ = −log p the output is the log odds `log(p / (1 − p))`
        and the weight is `1 − p` (Park et al. 2023, section 3).
        """
        loss = self(model, batch)
        # expm1 keeps the digits of 1 − p for confident examples; the clamp only bounds log(0).
        rest = (-torch.expm1(-loss)).clamp_min(torch.finfo(loss.dtype).tiny)
        return -loss - rest.log(), rest.detach()
