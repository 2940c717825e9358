"""Language models built from small configurations: nothing is downloaded."""

from typing import Any

import pytest
import torch
from oracles import gradients_one_at_a_time
from test_capture import assert_same, captured
from torch import Tensor, nn

from forebear.data import Data
from forebear.plan import make_plan
from forebear.task import Task
from forebear.tasks import losses

transformers = pytest.importorskip("transformers")


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=4, vocab_size=97, n_positions=32, use_cache=False
    )
    torch.manual_seed(0)
    return _spread(transformers.GPT2LMHeadModel(config))


def llama(norm: type[nn.Module] | None = None, tied: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, max_position_embeddings=32, use_cache=False,
        tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    if norm is not None:
        for layer in [*model.model.layers]:
            layer.input_layernorm, layer.post_attention_layernorm = norm(32), norm(32)
        model.model.norm = norm(32)
    return _spread(model)


def _spread(model: nn.Module) -> nn.Module:
    # The initialisation (biases zero, weights 0.02) would make many gradients tiny or equal.
    for p in model.parameters():
        nn.init.normal_(p, 0.1 if p.ndim == 1 else 0.0, 0.3)
    return model.double().eval()


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 97, (4, 9))}


@pytest.mark.parametrize(
    "build", [gpt2, lambda: llama(nn.RMSNorm), lambda: llama(nn.RMSNorm, tied=True)]
)
def test_language_models_are_covered_whole_and_exactly(build: Any) -> None:
    model, batch = build(), tokens()
    task = Task(model, losses.causal_lm)
    plan = make_plan(task, Data(batch))
    assert plan.coverage == 1.0
    assert plan.fallback == ()
    assert plan.unseen == ()
    assert_same(captured(task, batch), gradients_one_at_a_time(model, losses.causal_lm, batch))


def test_llama_with_its_own_norm_which_rounds_to_float32() -> None:
    model, batch = llama(), tokens()
    task = Task(model, losses.causal_lm)
    plan = make_plan(task, Data(batch))
    assert plan.coverage == 1.0
    assert plan.fallback == ()
    expected = gradients_one_at_a_time(model, losses.causal_lm, batch)
    assert_same(captured(task, batch), expected, rtol=1e-5)


@pytest.mark.parametrize("build", [gpt2, lambda: llama(nn.RMSNorm)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_no_gradient(build: Any, side: str) -> None:
    model, ids = build(), torch.randint(0, 97, (4, 8))
    lengths = torch.tensor([8, 3, 5, 2])
    count = torch.arange(8)
    real = count < lengths[:, None] if side == "right" else count >= 8 - lengths[:, None]
    first = real & (real.cumsum(1) == 1)  # nothing comes before it that could predict it
    batch = {
        "input_ids": torch.where(real, ids, 0),
        "labels": torch.where(real & ~first, ids, -100),
        "attention_mask": real.long(),
        "position_ids": (real.long().cumsum(1) - 1).clamp_min(0),
    }
    task = Task(model, losses.causal_lm)
    together = captured(task, batch)
    for i in range(4):
        alone = {"input_ids": ids[i][real[i]][None]}
        expected = gradients_one_at_a_time(model, losses.causal_lm, alone)
        assert_same({n: g[i : i + 1] for n, g in together.items()}, expected)


def test_bfloat16_language_model_is_covered_by_rules() -> None:
    model = gpt2().bfloat16()
    plan = make_plan(Task(model, losses.causal_lm), Data(tokens()))
    assert plan.fallback == ()
    assert plan.coverage == 1.0
