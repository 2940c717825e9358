"""Language models: a small GPT-2 from a configuration, padded sequences, tied embeddings."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import forebear as fb
from tests.oracles import gradients_one_at_a_time

transformers = pytest.importorskip("transformers")

WORDS, LENGTH, N, Q = 23, 9, 14, 4
LOSS = fb.losses.causal_lm
METHODS: dict[str, dict[str, Any]] = {
    "graddot": {},
    "gradcos": {},
    "tracin": {},
    "kfac": {},
    "ekfac": {},
    "trak": {"dimension": 64, "damping": 0.1},
    "similarity": {},
}


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).double().eval()
    for parameter in model.parameters():  # the initialisation is too small to tell things apart
        nn.init.normal_(parameter, 0.3 if parameter.ndim == 1 else 0.0, 0.3)
    return model


def sequences(count: int, seed: int) -> list[Tensor]:
    """Token ids of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, LENGTH + 1, (count,), generator=generator).tolist()
    return [torch.randint(1, WORDS, (n,), generator=generator) for n in lengths]


def padded(texts: list[Tensor], to: int = LENGTH) -> dict[str, Tensor]:
    """Right-padded ids with their mask."""
    ids = torch.zeros(len(texts), to, dtype=torch.long)
    mask = torch.zeros(len(texts), to, dtype=torch.long)
    for i, text in enumerate(texts):
        ids[i, : len(text)], mask[i, : len(text)] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def together(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A collate function: pads to the longest of the batch."""
    texts = [example["input_ids"] for example in examples]
    return padded(texts, max(map(len, texts)))


MODEL = gpt2()
TRAIN, QUERIES = sequences(N, 1), sequences(Q, 2)


def flat(texts: list[Tensor]) -> Tensor:
    """Loss gradients `[b, P]`, each sequence alone and without padding."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["ids"]).logits
        return nn.functional.cross_entropy(logits[0, :-1], batch["ids"][0, 1:])[None]

    rows = []
    for text in texts:
        grads = gradients_one_at_a_time(MODEL, loss, {"ids": text[None]})
        rows.append(torch.cat([g.flatten() for g in grads.values()]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_covers_all_of_gpt2(name: str) -> None:
    fitted = fb.get(name, **METHODS[name]).fit(fb.Task(MODEL, LOSS), padded(TRAIN))
    scores = fitted.score(padded(QUERIES))
    assert scores.values.shape == (Q, N)
    assert scores.values.std() > 0
    assert fitted.coverage == (None if name == "similarity" else 1.0)
    assert fitted.self_influence().shape == (N,)


def test_rules_see_all_of_gpt2_and_the_tied_matrix_counts_once() -> None:
    plan = fb.GradDot().fit(fb.Task(MODEL, LOSS), padded(TRAIN)).plan
    assert plan.fallback == ()
    assert sum(block.size for block in plan.blocks.values()) == sum(
        p.numel() for p in MODEL.parameters()
    )
    assert MODEL.lm_head.weight is MODEL.transformer.wte.weight
    uses = [use.module for use in plan.uses if use.block == "transformer.wte.weight"]
    assert sorted(uses) == ["lm_head", "transformer.wte"]


def test_graddot_is_the_product_of_gradients_of_unpadded_sequences() -> None:
    expected = flat(QUERIES) @ flat(TRAIN).T
    scores = fb.GradDot().fit(fb.Task(MODEL, LOSS), padded(TRAIN)).score(padded(QUERIES))
    assert torch.allclose(scores.values, expected, rtol=1e-9, atol=1e-12)


def deterministic(name: str) -> Any:
    return fb.get(name, **METHODS[name], **({"targets": "empirical"} if "fac" in name else {}))


@pytest.mark.parametrize("name", METHODS)
def test_batch_size_changes_no_score(name: str) -> None:
    task = fb.Task(MODEL, LOSS)
    whole = deterministic(name).fit(task, padded(TRAIN)).score(padded(QUERIES)).values
    small = deterministic(name).fit(task, padded(TRAIN), batch_size=3)
    assert torch.allclose(small.score(padded(QUERIES)).values, whole, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "similarity"])
def test_padding_changes_no_score(name: str) -> None:
    task = fb.Task(MODEL, LOSS)
    method = deterministic(name)
    if "fac" in name:
        method = fb.get(name, targets="empirical", rank=None)
    short = method.fit(task, padded(TRAIN))
    long = method.fit(task, padded(TRAIN, LENGTH + 6))
    expected = short.score(padded(QUERIES)).values
    for to in (LENGTH, LENGTH + 6):
        found = long.score(padded(QUERIES, to)).values
        assert torch.allclose(found, expected, rtol=1e-7, atol=1e-10)
    assert torch.allclose(long.self_influence(), short.self_influence(), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", ["graddot", "ekfac", "kfac", "trak"])
def test_lists_of_sequences_are_collated_batch_by_batch(name: str) -> None:
    train = [{"input_ids": text} for text in TRAIN]
    queries = [{"input_ids": text} for text in QUERIES]
    task = fb.Task(MODEL, LOSS, collate=together)
    method = deterministic(name)
    expected = method.fit(fb.Task(MODEL, LOSS), padded(TRAIN)).score(padded(QUERIES)).values
    for size in (256, 4, 1):  # batches of one have no padding at all
        scores = method.fit(task, train, batch_size=size).score(queries).values
        assert torch.allclose(scores, expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("name", ["graddot", "ekfac", "kfac"])
def test_self_influence_is_the_diagonal(name: str) -> None:
    method = fb.get(name, **({"rank": None} if "fac" in name else {}))
    fitted = method.fit(fb.Task(MODEL, LOSS), padded(TRAIN))
    diagonal = fitted.score(padded(TRAIN)).values.diagonal()
    assert torch.allclose(fitted.self_influence(), diagonal, rtol=1e-9)


def test_labels_choose_what_is_attributed() -> None:
    """Only the last word of each query counts: its gradient is that of its own loss."""
    task = fb.Task(MODEL, LOSS)
    batch = padded(QUERIES)
    labels = torch.full_like(batch["input_ids"], -100)
    for i, text in enumerate(QUERIES):
        labels[i, len(text) - 1] = text[-1]
    scores = fb.GradDot().fit(task, padded(TRAIN)).score({**batch, "labels": labels}).values

    def last(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["ids"]).logits[:, -2]
        return nn.functional.cross_entropy(logits, batch["ids"][:, -1], reduction="none")

    rows = [gradients_one_at_a_time(MODEL, last, {"ids": text[None]}) for text in QUERIES]
    of_last = torch.stack([torch.cat([g.flatten() for g in row.values()]) for row in rows])
    assert torch.allclose(scores, of_last @ flat(TRAIN).T, rtol=1e-9, atol=1e-12)
