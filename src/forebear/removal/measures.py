"""What may be asked of a linear model's outputs: the measurements whose change is estimated."""

from typing import Literal, get_args

import torch
from torch import Tensor

from forebear.errors import DataError, unknown_name
from forebear.removal.families import Family, Softmax, Squared

Measure = Literal["loss", "prediction", "margin"]
MEASURES: tuple[Measure, ...] = get_args(Measure)


def measurement(family: Family, z: Tensor, y: Tensor, measure: str) -> Tensor:
    """Measurement of outputs `[..., q, c]` at targets, `[..., q]`; higher = more of the behaviour.

    `"loss"` is minus the loss. `"prediction"` is the predicted number, or the probability of the
    label y. `"margin"` is the log odds of the label y.

    Raises:
        DataError: the measurement has no meaning for the family.
        UnknownNameError: there is no such measurement.
    """
    if measure not in MEASURES:
        raise unknown_name("measure", str(measure), MEASURES)
    if measure == "loss":
        return -family.loss(z, y)
    if isinstance(family, Squared):
        if measure == "margin" or z.shape[-1] > 1:
            raise DataError(
                f"measure={measure!r} needs a classifier or a single target: use 'loss'"
            )
        return z[..., 0]
    if measure == "prediction":
        return (-family.loss(z, y)).exp()
    return log_odds(family, z, y)


def log_odds(family: Family, z: Tensor, y: Tensor) -> Tensor:
    """`log(p_y / (1 − p_y))`, `[..., q]`."""
    if isinstance(family, Softmax):
        labels = y[:, None].expand(*z.shape[:-1], 1)
        others = z.scatter(-1, labels, -torch.inf)
        return z.gather(-1, labels)[..., 0] - others.logsumexp(-1)
    return ((2 * y - 1) * z)[..., 0]


def slope(family: Family, z: Tensor, y: Tensor, measure: str) -> Tensor:
    """Derivative of the measurement in the outputs, `[q, c]`."""
    with torch.enable_grad():
        point = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(measurement(family, point, y, measure).sum(), point)
    return gradient


def needs_targets(family: Family, measure: str) -> bool:
    """Whether queries must come with targets; otherwise the predicted ones are meant."""
    return measure == "loss" or (isinstance(family, Squared) and measure != "prediction")


def predicted(family: Family, z: Tensor) -> Tensor:
    """Targets that the model predicts, in the family's form."""
    if isinstance(family, Squared):
        return z
    return z.argmax(-1) if isinstance(family, Softmax) else (z > 0).to(z.dtype)
