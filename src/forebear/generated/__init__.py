"""Which training images made these images: several methods side by side, and a page of it."""

from forebear.generated.attributing import attribute_images
from forebear.generated.counterfactual import Counterfactual

__all__ = ["Counterfactual", "attribute_images"]
