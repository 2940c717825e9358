"""Tiny pipelines of diffusers with random weights, made by hand: nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor, nn

from forebear.data import Data

TOKENS, WIDTH, CLASSES = 5, 12, 5
UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


def spread(model: nn.Module, deviation: float = 0.15) -> Any:
    """Weights that no initialisation makes zero or equal, in double precision."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        start = 0.1 if p.ndim == 1 else 0.0
        p.data.normal_(start, deviation, generator=generator)
    return model.double().eval()


def plain(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        **UNET,
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return spread(diffusers.UNet2DModel(**(settings | changes)))


def conditional(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        **UNET,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH,
    }
    return spread(diffusers.UNet2DConditionModel(**(settings | changes)))


def transformer(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 8,
        "num_embeds_ada_norm": CLASSES,
    }
    return spread(diffusers.DiTTransformer2DModel(**(settings | changes)))


def encoder() -> Any:
    return diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=16,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.5,
    ).eval()


def text_pipeline(folder: Path) -> Any:
    """In the manner of Stable Diffusion, with a tokenizer of letters."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=9
    )
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=9,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    torch.manual_seed(0)
    return diffusers.StableDiffusionPipeline(
        vae=encoder(),
        text_encoder=CLIPTextModel(config).eval(),
        tokenizer=tokenizer,
        unet=conditional().float(),
        scheduler=diffusers.DDIMScheduler(
            clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def conditions(model: Any, count: int, seed: int = 1) -> Tensor | None:
    """What a network is told."""
    generator = torch.Generator().manual_seed(seed)
    kind = type(model).__name__
    if kind == "UNet2DConditionModel":
        return torch.randn(count, TOKENS, WIDTH, generator=generator).double()
    if kind == "DiTTransformer2DModel":
        return torch.arange(count) % CLASSES
    return None


def pictures(model: Any, count: int = 6, seed: int = 0) -> Data:
    """A training set for a network, in double precision."""
    from forebear.tasks.diffusion import images

    generator = torch.Generator().manual_seed(seed)
    shape = (count, model.config["in_channels"], 8, 8)
    pixels = torch.randn(*shape, generator=generator).double().clamp(-3, 3)
    return Data(images(pixels, conditions(model, count), keys=torch.arange(count) * 7))


def write_pictures(folder: Path, count: int = 4, size: tuple[int, int] = (20, 16)) -> list[str]:
    """Coloured PNG files with captions beside them."""
    generator = torch.Generator().manual_seed(3)
    names = []
    for i in range(count):
        name = f"{'ab'[i % 2]}/picture{i}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"{['cat', 'dog'][i % 2]}\n")
        names.append(name)
    return sorted(names)
