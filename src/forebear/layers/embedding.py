"""`torch.nn.Embedding`: a linear layer whose inputs are one-hot, kept as integers."""

from typing import Any

from torch import Tensor, nn

from forebear.layers.rule import Factors


class EmbeddingRule:
    """`y = W[index]`; the gradient adds `g_t` to the row that was looked up."""

    def factors(self, layer: nn.Module, a: Tensor, g: Tensor, *, bias: bool = False) -> Factors:
        """`left` are indices `[b, t]`, `right` are output gradients `[b, t, d]`; never a bias."""
        embedding: Any = layer
        size = len(g)
        left = a.reshape(size, -1)
        right = g.reshape(size, -1, g.shape[-1])
        if embedding.padding_idx is not None:  # the row of the padding index is never trained
            right = right.masked_fill((left == embedding.padding_idx)[..., None], 0)
        return Factors(left.long(), right)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """`[rows, d]` as it is."""
        return weight

    def from_matrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """`[rows, d]` as it is."""
        return matrix


def rule(layer: nn.Module) -> EmbeddingRule | None:
    """The rule; None with `scale_grad_by_freq`, where gradients depend on the batch."""
    return None if layer.scale_grad_by_freq else EmbeddingRule()
