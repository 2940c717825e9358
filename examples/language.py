"""Which lines of the Zen of Python taught a tiny language model to finish a sentence.

    forebear attribute examples/language.py --method ekfac --out runs/zen
    forebear top runs/zen --query 0 --k 5

Trains a GPT-2 of two layers on the words of `import this`, in seconds. Needs transformers; nothing
is downloaded.
"""

import codecs
import io
import re
from contextlib import redirect_stdout
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import forebear as fb

with redirect_stdout(io.StringIO()):  # it prints itself when imported
    import this

LINES = [line for line in codecs.decode(this.s, "rot13").splitlines()[2:] if line]
QUESTIONS = ["Beautiful is better than", "Now is better than", "Errors should never"]
ANSWERS = ["ugly", "never", "pass"]


def split(text: str) -> list[str]:
    return re.findall(r"[\w'-]+|[^\w\s]", text.lower())


WORDS = sorted({word for line in LINES for word in split(line)})
NUMBER = {word: i + 2 for i, word in enumerate(WORDS)}  # 0 pads, 1 begins a line


def numbers(text: str) -> torch.Tensor:
    return torch.tensor([1, *(NUMBER[word] for word in split(text))])


def padded(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of sequences of different lengths; what is -100 in the labels is not predicted."""

    def column(name: str, filler: int) -> torch.Tensor:
        rows = [example[name] for example in examples]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)

    ids = [torch.ones_like(example["input_ids"]) for example in examples]
    return {
        "input_ids": column("input_ids", 0),
        "attention_mask": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "labels": column("labels", -100),
    }


def task() -> fb.Task:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS) + 2,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=1,
        eos_token_id=1,
    )
    model, batch = GPT2LMHeadModel(config), padded(train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(50):
        optimizer.zero_grad()
        fb.losses.causal_lm(model, batch).mean().backward()
        optimizer.step()
    return fb.Task(model.eval(), fb.losses.causal_lm, collate=padded)


def train() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": numbers(line), "labels": numbers(line)} for line in LINES]


def queries() -> list[dict[str, torch.Tensor]]:
    """Sentences of which only the last word is asked about."""
    asked = []
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        ids = numbers(f"{question} {answer}")
        labels = torch.full_like(ids, -100)
        labels[-1] = ids[-1]
        asked.append({"input_ids": ids, "labels": labels})
    return asked


def examples() -> dict[str, dict[int, Any]]:
    texts = [f"{q} … {a}" for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    return {"train": dict(enumerate(LINES)), "queries": dict(enumerate(texts))}
