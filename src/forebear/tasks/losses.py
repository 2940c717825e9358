"""The ready losses by name, as `forebear.losses`."""

from forebear.tasks.classification import CrossEntropy
from forebear.tasks.diffusion import Denoising
from forebear.tasks.language import CausalLM
from forebear.tasks.regression import SquaredError

cross_entropy = CrossEntropy()
squared_error = SquaredError()
causal_lm = CausalLM()

__all__ = [
    "CausalLM",
    "CrossEntropy",
    "Denoising",
    "SquaredError",
    "causal_lm",
    "cross_entropy",
    "squared_error",
]
