"""Layer rules: pure functions of (layer, input, output gradient), one file a layer type.

`RULES` maps the class name of a layer (with its module where the name alone is ambiguous) to the
file whose `rule(layer)` gives its per-example gradients. Every rule is checked against autograd on
the first examples of each fit, so a class that has a familiar name but computes something else
falls back to the general path instead of giving wrong gradients.
"""

from importlib import import_module

from torch import nn

from forebear.layers.rule import (
    Factors,
    MatrixRule,
    VectorRule,
    is_one,
    is_written,
    vector,
    written_out,
)

RULES = {
    "Linear": "linear",
    "transformers.pytorch_utils.Conv1D": "linear",
    "Conv1d": "conv",
    "Conv2d": "conv",
    "Conv3d": "conv",
    "Embedding": "embedding",
    "LayerNorm": "norm",
    "GroupNorm": "norm",
    "RMSNorm": "norm",
    "T5LayerNorm": "norm",
    "BatchNorm1d": "norm",
    "BatchNorm2d": "norm",
}


def rule_for(layer: nn.Module) -> MatrixRule | VectorRule | None:
    """The rule of a layer's class or of the nearest class it derives from; None if there is none.

    Families whose members share a formula under many names (`LlamaRMSNorm`, `Qwen2RMSNorm`,
    `MT5LayerNorm`) are found by the end of the name.
    """
    for cls in type(layer).__mro__:
        name = cls.__qualname__
        module = RULES.get(f"{cls.__module__}.{name}") or RULES.get(name)
        if module is None and name.endswith(("RMSNorm", "T5LayerNorm")):
            module = RULES["RMSNorm"]
        if module is not None:
            return import_module(f"forebear.layers.{module}").rule(layer)
    return None


__all__ = [
    "RULES",
    "Factors",
    "MatrixRule",
    "VectorRule",
    "is_one",
    "is_written",
    "rule_for",
    "vector",
    "written_out",
]
