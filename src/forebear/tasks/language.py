"""Causal language modelling: next-token cross-entropy over the tokens of a sequence."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forebear.errors import TaskError
from forebear.tasks.objective import Objective

IGNORED = -100


class CausalLM(Objective):
    """Next-token cross-entropy of a model in the style of transformers.

    The batch is a dict with `input_ids` `[b, t]` and, when needed, `attention_mask` and `labels`
    (`-100` is left out; without labels every attended token after the first is predicted).

    Args:
        reduction: `"mean"` over the predicted tokens of each sequence, or their `"sum"`.
    """

    name = "causal_lm"

    def __init__(self, reduction: str = "mean") -> None:
        if reduction not in ("mean", "sum"):
            raise TaskError(f"reduction is {reduction!r}: use 'mean' or 'sum'")
        self.reduction = reduction

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Logits `[b, t, v]`."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        result = model(**inputs)
        return result if isinstance(result, Tensor) else result.logits

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Mean or summed cross-entropy of each sequence, `[b]`."""
        labels = _labels(batch)[:, 1:]
        tokens = F.cross_entropy(
            outputs[:, :-1].transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )  # [b, t - 1]
        total = tokens.sum(-1)
        if self.reduction == "sum":
            return total
        return total / (labels != IGNORED).sum(-1).clamp_min(1)

    def sample(self, outputs: Tensor, batch: Any, generator: torch.Generator) -> Any:
        """Next tokens drawn from the model at every predicted position."""
        labels = _labels(batch).clone()
        probabilities = outputs[:, :-1].float().softmax(-1)
        drawn = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator)
        drawn = drawn.view(labels.shape[0], -1)
        labels[:, 1:] = torch.where(labels[:, 1:] == IGNORED, IGNORED, drawn)
        return {**batch, "labels": labels}


def _labels(batch: Any) -> Tensor:
    if "labels" in batch:
        return batch["labels"]
    labels = batch["input_ids"]
    mask = batch.get("attention_mask")
    if mask is None:
        return labels
    labels = labels.masked_fill(mask == 0, IGNORED)
    labels[:, 1:].masked_fill_(mask[:, :-1] == 0, IGNORED)  # nothing before it to predict it from
    return labels
