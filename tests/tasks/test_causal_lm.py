"""Causal language models: which tokens are predicted, and how their losses are put together."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import forebear as fb

WORDS = 5
MEAN, SUM = fb.losses.causal_lm, fb.losses.CausalLM(reduction="sum")
IDS = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])


class Bigram(nn.Module):
    """Next-word scores that depend on the last word alone; answers as transformers' models do."""

    def __init__(self, bare: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(WORDS, WORDS).double()
        self.bare = bare
        self.seen: set[str] = set()

    def forward(self, input_ids: Tensor, **others: Any) -> Any:
        self.seen = {"input_ids", *others}
        logits = self.table(input_ids)
        return logits if self.bare else SimpleNamespace(logits=logits)


def surprise(model: Bigram, words: list[int]) -> list[float]:
    """Minus the log-probability of each word after the first."""
    table = model.table.weight.detach().log_softmax(1)
    return [-table[a, b].item() for a, b in pairwise(words)]


@pytest.mark.parametrize("bare", [False, True])
def test_every_word_after_the_first_is_predicted(bare: bool) -> None:
    model = Bigram(bare)
    expected = [surprise(model, row) for row in IDS.tolist()]
    assert SUM(model, {"input_ids": IDS}).tolist() == pytest.approx([sum(r) for r in expected])
    assert MEAN(model, {"input_ids": IDS}).tolist() == pytest.approx([sum(r) / 3 for r in expected])


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_not_predicted_and_nothing_is_predicted_from_it(side: str) -> None:
    model = Bigram()
    words = torch.tensor([[1, 2, 3]])
    padding, ones = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 3, dtype=torch.long)
    order = (words, padding), (ones, padding)
    ids, mask = (torch.cat(pair if side == "right" else pair[::-1], 1) for pair in order)
    batch = {"input_ids": ids, "attention_mask": mask}
    expected = surprise(model, [1, 2, 3])
    assert SUM(model, batch).item() == pytest.approx(sum(expected))
    assert MEAN(model, batch).item() == pytest.approx(sum(expected) / 2)
    assert model.seen == {"input_ids", "attention_mask"}


def test_labels_choose_the_words_and_stay_out_of_the_model() -> None:
    model = Bigram()
    labels = IDS.clone()
    labels[0, :3] = -100
    labels[1, 3] = -100
    loss = MEAN(model, {"input_ids": IDS, "labels": labels})
    first, second = (surprise(model, row) for row in IDS.tolist())
    assert loss.tolist() == pytest.approx([first[2], sum(second[:2]) / 2])
    assert model.seen == {"input_ids"}


def test_a_sequence_with_nothing_to_predict_costs_nothing() -> None:
    batch = {"input_ids": IDS[:1], "labels": torch.full((1, 4), -100)}
    for loss in (MEAN, SUM):
        assert loss(Bigram(), batch).tolist() == [0.0]


def test_the_batch_is_left_as_it_was() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    batch = {"input_ids": IDS.clone(), "attention_mask": mask.clone()}
    model = Bigram()
    logits = MEAN.outputs(model, batch)
    MEAN.loss(logits, batch)
    MEAN.sample(logits, batch, torch.Generator().manual_seed(0))
    assert torch.equal(batch["input_ids"], IDS)
    assert torch.equal(batch["attention_mask"], mask)
    labelled = {**batch, "labels": IDS.clone()}
    MEAN.sample(logits, labelled, torch.Generator().manual_seed(0))
    assert torch.equal(labelled["labels"], IDS)


def test_sampled_words_and_weights_stand_for_the_prediction() -> None:
    """Squared weights make up for words drawn from another distribution than the model's."""
    draws, model = 20_000, Bigram()
    ids = IDS[:1].expand(draws, 4)
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0]]).expand(draws, 4)}
    generator = torch.Generator().manual_seed(0)
    words, weights = MEAN.sample(MEAN.outputs(model, batch), batch, generator)
    assert (words[:, 2] == -100).all()  # padding is not predicted here either
    for position in (0, 1):
        p = model.table.weight[IDS[0, position]].detach().softmax(0)
        drawn = nn.functional.one_hot(words[:, position], WORDS)
        counted = weights[:, position].square()[:, None] * drawn
        allowed = 5 * counted.std(0) / draws**0.5
        assert ((counted.mean(0) - p).abs() < allowed).all()


@pytest.mark.parametrize("loss", [MEAN, SUM], ids=["mean", "sum"])
def test_sampled_losses_have_the_fisher_matrix_of_all_positions(loss: Any) -> None:
    """Mean squared gradients in the logits: `diag(p) − p pᵀ` a position, none between two."""
    draws, model = 20_000, Bigram()
    ids = IDS[:1, :3].expand(draws, 3)
    logits = model.table(ids).detach().requires_grad_()

    class Given(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return logits

    losses = loss.sampled(Given(), {"input_ids": ids}, torch.Generator().manual_seed(0))
    (g,) = torch.autograd.grad(losses.sum(), logits)
    assert (g[:, 2] == 0).all()  # nothing follows the last word
    g = g[:, :2] * (2 if loss is MEAN else 1)
    for one in (0, 1):
        p = logits[0, one].detach().softmax(0)
        for other in (0, 1):
            expected = (torch.diag(p) - torch.outer(p, p)) * (one == other)
            assert torch.allclose(g[:, one].T @ g[:, other] / draws, expected, atol=0.02)


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(fb.errors.TaskError, match="reduction is 'none': use 'mean' or 'sum'"):
        fb.losses.CausalLM(reduction="none")
