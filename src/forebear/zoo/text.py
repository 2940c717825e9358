"""Text that every Python has: its own help topics, and a small model of their characters."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from forebear.data import Data
from forebear.errors import DataError
from forebear.tasks import losses
from forebear.training.recipe import Recipe

ALPHABET = "\nabcdefghijklmnopqrstuvwxyz0123456789 .,:;()[]{}=*'\"-_`/|<>~"
"""Characters that are told apart; every other one is `~`."""

CONTEXT = 8


@dataclass(frozen=True, kw_only=True)
class Text:
    """A language-modelling task: windows of text.

    Attributes:
        train: `{"input_ids": [n, t]}`.
        queries: `{"input_ids": [q, t]}`.
        test: windows of which the queries are the beginning.
    """

    name: str
    train: Data
    queries: Data
    test: Data

    def texts(self, data: Data) -> list[str]:
        """The windows as people read them."""
        rows = data.batch(slice(None))["input_ids"].tolist()
        return ["".join(ALPHABET[i] for i in row) for row in rows]


def load(*, train: int = 900, queries: int = 60, length: int = 32, seed: int = 0) -> Text:
    """Windows of Python's help topics that do not overlap, in random order.

    Args:
        train: windows to train on; a tenth as many, but no fewer than `queries`, are for testing.
        queries: test windows to ask about.
        length: characters of a window.
        seed: of the order.

    Raises:
        DataError: there is not so much text.
    """
    windows = _windows(length)
    held_out = max(queries, train // 9)
    if train + held_out > len(windows):
        raise DataError(
            f"{train + held_out} windows of {length} characters were asked for: there are "
            f"{len(windows)}"
        )
    order = np.random.default_rng(seed).permutation(len(windows))
    chosen = windows[torch.from_numpy(order)]
    rest = chosen[train : train + held_out]
    return Text(
        name="text",
        train=Data({"input_ids": chosen[:train]}),
        queries=Data({"input_ids": rest[:queries]}),
        test=Data({"input_ids": rest}),
    )


class CharacterModel(nn.Module):
    """Predicts each character from the embeddings of the ones before it, by a hidden layer."""

    def __init__(self, *, context: int = CONTEXT, embedding: int = 6, hidden: int = 16) -> None:
        super().__init__()
        self.context = context
        self.embed = nn.Embedding(len(ALPHABET), embedding)
        self.hidden = nn.Linear(context * embedding, hidden)
        self.head = nn.Linear(hidden, len(ALPHABET))

    def forward(self, input_ids: Tensor, **ignored: Any) -> Tensor:
        """Logits of the next character at every position, `[b, t, v]`."""
        length = input_ids.shape[1]
        padded = nn.functional.pad(input_ids, (self.context - 1, 0))  # a new line before it all
        embedded = self.embed(padded)  # [b, context - 1 + t, e]
        # Shifted copies, for the backward pass of unfold cannot be vmapped.
        near = torch.cat([embedded[:, k : k + length] for k in range(self.context)], -1)
        return self.head(torch.tanh(self.hidden(near)))


def build() -> nn.Module:
    """An untrained character model of eight characters before, 16 hidden units."""
    return CharacterModel()


def recipe(*, epochs: int = 60) -> Recipe:
    """How the model is trained."""
    return Recipe(build, losses.causal_lm, learning_rate=0.5, epochs=epochs, batch_size=64)


def _windows(length: int) -> Tensor:
    from pydoc_data.topics import topics

    text = "\n".join(" ".join(topics[name].lower().split()) for name in sorted(topics))
    known = {character: number for number, character in enumerate(ALPHABET)}
    codes = torch.tensor([known.get(character, len(ALPHABET) - 1) for character in text])
    return codes[: len(codes) // length * length].reshape(-1, length)
