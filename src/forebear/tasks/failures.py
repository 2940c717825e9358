"""Why a denoising network failed, in words that a person can act on."""

from typing import Any

from torch import Tensor, nn

from forebear.tasks.images import name_of

OF_SHAPES = ("channels", "cannot be multiplied", "must match", "size of tensor", "invalid for")
"""What torch says of images or conditions that a layer cannot take."""


def why_failed(error: Exception, model: nn.Module, noisy: Tensor, condition: Any) -> str | None:
    """The mistake that most likely made a network fail; None where it shows none."""
    own = next((p.dtype for p in model.parameters()), noisy.dtype)
    told = condition if isinstance(condition, Tensor) else None
    if isinstance(error, IndexError):
        if told is None or told.is_floating_point():
            return None
        return f"the network does not know all classes of 'condition'{_range(told)}: correct them"
    if isinstance(error, RuntimeError):
        if "vmap" in str(error):  # it may work one example at a time
            return None
        if told is not None and told.is_floating_point() and "Long" in str(error):
            return (
                f"'condition' is {name_of(told)} and the network wants whole numbers: give it "
                "classes, as condition.long()"
            )
        if own != noisy.dtype and "type" in str(error):
            mine, theirs = name_of(noisy), str(own).removeprefix("torch.")
            return f"images are {mine} and the network {theirs}: convert them to {theirs}"
        if any(sign in str(error) for sign in OF_SHAPES):
            beside = "" if told is None else f" with conditions of shape {tuple(told.shape[1:])}"
            return (
                f"the network does not take images of shape {tuple(noisy.shape[1:])}{beside}: "
                "prepare them as in training"
            )
        return None
    if condition is not None:
        return None
    return (
        "the network failed, and the examples have no 'condition' to tell it: if it is told one, "
        "make the dataset with forebear.tasks.diffusion.images(pixels, condition)"
    )


def _range(classes: Tensor) -> str:
    """From which class to which, where numbers are known."""
    try:
        return f", which go from {classes.min().item()} to {classes.max().item()}"
    except RuntimeError:
        return ""  # inside torch.func.vmap or a trace
