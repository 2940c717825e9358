"""Regression with squared error."""

from typing import Any

import torch
from torch import Tensor, nn

from forebear.errors import TaskError
from forebear.tasks.objective import Objective


class SquaredError(Objective):
    """Half the squared error of `model(x) -> [b]` or `[b, c]`, summed over outputs; batch `(x, y)`.

    The half makes it the negative log-likelihood of a Gaussian with unit variance, so that the
    Fisher matrix from sampled targets is the Gauss-Newton matrix.
    """

    name = "squared_error"

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Predictions `[b, c]`."""
        return model(batch[0]).reshape(len(batch[0]), -1)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Half the squared error of each example, `[b]`."""
        return 0.5 * (outputs - _targets(outputs, batch)).square().sum(-1)

    def sample(
        self, outputs: Tensor, batch: Any, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Targets `[b, c]` from a Gaussian of unit variance around the prediction; weights one."""
        noise = torch.randn(outputs.shape, generator=generator, device=outputs.device)
        return outputs + noise.to(outputs.dtype), outputs.new_ones(len(outputs))

    def loss_at(self, outputs: Tensor, batch: Any, targets: Tensor, weights: Tensor) -> Tensor:
        """Weighted half squared error of each example at other targets, `[b]`."""
        return weights * 0.5 * (outputs - targets).square().sum(-1)

    def link(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """The prediction along the residual and the residual's length.

        With one output this is the prediction itself up to sign; `∇ℓ = −weight · ∇f` exactly.
        """
        outputs = self.outputs(model, batch)
        residual = (_targets(outputs, batch) - outputs).detach()  # [b, c]
        weight = torch.linalg.vector_norm(residual, dim=-1)
        tiny = torch.finfo(weight.dtype).tiny
        return (outputs * residual).sum(-1) / weight.clamp_min(tiny), weight


def _targets(outputs: Tensor, batch: Any) -> Tensor:
    targets = batch[1].reshape(len(batch[1]), -1)
    if targets.shape != outputs.shape:
        raise TaskError(
            f"predictions have shape {tuple(outputs.shape)} and targets {tuple(targets.shape)}: "
            "they must agree, for nothing is broadcast"
        )
    return targets.to(outputs.dtype)
