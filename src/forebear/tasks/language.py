"""Causal language modelling: next-token cross-entropy over the tokens of a sequence."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forebear.errors import TaskError
from forebear.tasks.objective import Objective, draw_classes

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
        return self._reduced(_token_losses(outputs, labels), labels)

    def sample(
        self, outputs: Tensor, batch: Any, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Next tokens `[b, t - 1]` and weights; see `draw_classes`.

        Weighted gradients do not average to zero as those under the model do; random signs make
        them, so that products of different positions vanish in expectation.
        """
        labels = _labels(batch)[:, 1:]
        drawn, weights = draw_classes(outputs[:, :-1].flatten(0, 1), generator)
        signs = torch.randint(0, 2, weights.shape, generator=generator, device=weights.device)
        weights = weights * (2 * signs - 1)
        return torch.where(labels == IGNORED, IGNORED, drawn.view_as(labels)), weights.view(
            labels.shape
        )

    def loss_at(self, outputs: Tensor, batch: Any, targets: Tensor, weights: Tensor) -> Tensor:
        """Weighted loss of each sequence at other next tokens, `[b]`."""
        return self._reduced(weights * _token_losses(outputs, targets), targets)

    def _reduced(self, tokens: Tensor, labels: Tensor) -> Tensor:
        total = tokens.sum(-1)
        if self.reduction == "sum":
            return total
        return total / (labels != IGNORED).sum(-1).clamp_min(1)


def _token_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each next token, `[b, t - 1]`; zero where it is left out."""
    logits = outputs[:, :-1].transpose(1, 2)
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")


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
