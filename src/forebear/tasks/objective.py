"""What a ready task knows about its loss beyond the value."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from forebear.data import require_finite
from forebear.errors import unknown_name

SUMMARIES: dict[str, Callable[[Tensor], Tensor]] = {
    "square_norm": torch.square,
    "mean": torch.clone,
    "absolute": torch.abs,
}
"""Functions of single outputs, whose mean is a summary of what the model says."""


def draw_classes(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Classes `[m]` drawn for the Fisher matrix of a softmax, with weights `√(p / q)` `[m]`.

    The gradient at class c is `e_c − p`, of squared length `1 − 2 p_c + Σ p²`. A confident model
    almost always draws the class whose gradient is nearly zero, and the rare other one carries
    the whole matrix. Drawing from q ∝ p · length² instead gives every draw the same length, the
    expected one, so that the trace has no noise at all.
    """
    p = logits.softmax(-1).double()
    squares = p.square().sum(-1, keepdim=True)
    lengths = (1 - 2 * p + squares).clamp_min(0)
    mass = p * lengths  # sums to 1 − Σ p²
    # A prediction that is certain to rounding has no gradient: any draw will do, with weight zero.
    q = torch.where(mass.sum(-1, keepdim=True) > 0, mass, p)
    drawn = torch.multinomial(q, 1, generator=generator)
    length = lengths.gather(-1, drawn).clamp_min(torch.finfo(torch.float64).tiny)
    weights = (mass.sum(-1, keepdim=True) / length).sqrt()
    return drawn[..., 0], weights[..., 0].to(logits.dtype)


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

    def sample(
        self, outputs: Tensor, batch: Any, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Targets drawn from the model's own prediction, and a weight for the gradient of each.

        With weights `±√(p / q)` targets may come from another distribution q than the model's p:
        the second moments of the gradients are those under p, with less noise.
        """
        raise NotImplementedError

    def loss_at(self, outputs: Tensor, batch: Any, targets: Tensor, weights: Tensor) -> Tensor:
        """Weighted loss of each example at other targets, `[b]`."""
        raise NotImplementedError

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss of each example, `[b]`."""
        return self.loss(self.outputs(model, batch), batch)

    def sampled(self, model: nn.Module, batch: Any, generator: torch.Generator) -> Tensor:
        """Loss `[b]` at drawn targets: its gradients have the true Fisher matrix as moments."""
        outputs = self.outputs(model, batch)
        require_finite(outputs.detach(), "model's output")
        return self.loss_at(outputs, batch, *self.sample(outputs.detach(), batch, generator))

    def link(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """TRAK's model output `f` `[b]` and its weight `−dℓ/df` `[b]`.

        For a negative log-likelihood ℓ = −log p the output is the log odds `log(p / (1 − p))`
        and the weight is `1 − p` (Park et al. 2023, section 3).
        """
        loss = self(model, batch)
        # expm1 keeps the digits of 1 − p for confident examples; the clamp only bounds log(0).
        rest = (-torch.expm1(-loss)).clamp_min(torch.finfo(loss.dtype).tiny)
        return -loss - rest.log(), rest.detach()

    def summarised(self, model: nn.Module, batch: Any) -> Tensor:
        """What `function` summarises, `[b, ...]`: the model's outputs."""
        return self.outputs(model, batch)

    def function(self, name: str) -> "Summary":
        """A scalar of what the model says, without any target: `function(model, batch) -> [b]`.

        Args:
            name: `"square_norm"`, the mean of the squares; `"mean"`; or `"absolute"`, the mean of
                the absolute values.

        Raises:
            UnknownNameError: there is no such function.
        """
        if name not in SUMMARIES:
            raise unknown_name("function of a model's outputs", name, SUMMARIES)
        return Summary(self, name)

    @property
    def parts(self) -> tuple["Objective", ...]:
        """Losses whose mean is this one, and whose functions have those of this one as means.

        Losses that average over levels of noise have one for each; others are one themselves.
        """
        return (self,)


@dataclass(frozen=True)
class Summary:
    """A mean over what the model says of each example.

    Attributes:
        objective: what the model is asked.
        name: of `SUMMARIES`.
    """

    objective: Objective
    name: str

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """`[b]`."""
        said = self.objective.summarised(model, batch)
        return SUMMARIES[self.name](said).flatten(1).mean(1)

    @property
    def parts(self) -> tuple["Summary", ...]:
        """Functions whose mean is this one, one for each part of the objective."""
        return tuple(replace(self, objective=part) for part in self.objective.parts)
