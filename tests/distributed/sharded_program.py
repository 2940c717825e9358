"""A model sharded over two processes (FSDP2): what `test_sharded.py` starts and compares with."""

import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import forebear as fb
from forebear import stream
from forebear.methods.features import build_store

METHODS: dict[str, Any] = {
    "graddot": fb.GradDot(),
    "tracin": fb.TracIn(),
    "kfac": fb.KFAC(),
    "ekfac": fb.EKFAC(),
    "mean": fb.Influence(curvature=fb.EKFAC().curvature, checkpoints="mean"),
    "every output": fb.EKFAC(targets="exact"),
    "trak": fb.TRAK(dimension=16),
    "similarity": fb.Similarity(layer="4"),
}
N, BATCH, PIECE = 37, 8, 16  # pieces of 2, 2 and 1 batches, the last of 5 examples


class Scaled(nn.Module):
    """A parameter that no layer rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.scale)


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)]
    return nn.Sequential(*layers).eval()


def gpt() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 50}
    sizes |= {"n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def points(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return x, torch.randint(3, (n,), generator=generator)


def texts(n: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(50, (n, 12), generator=generator)}


def checkpoints() -> list[fb.Checkpoint]:
    """Whole weights, as training on one device leaves them."""
    return [fb.Checkpoint(mlp(seed).state_dict(), 0.1) for seed in (1, 2)]


def found(folder: Path, sharded: bool, executor: Any) -> dict[str, Tensor]:
    """Scores, stores and hashes of both models, sharded or not."""
    stream.PIECE = PIECE
    train, queries = points(N, 0), points(5, 1)
    network, language = mlp(), gpt()
    if sharded:
        for layer in network:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        for block in language.transformer.h:
            fully_shard(block)
        fully_shard(network)
        fully_shard(language)
    task = fb.Task(network, fb.losses.cross_entropy, checkpoints=checkpoints())
    fitted = {
        name: method.fit(task, train, batch_size=BATCH, executor=executor)
        for name, method in METHODS.items()
    }
    tensors = {f"mlp {name}": one.score(queries).values for name, one in fitted.items()}
    tensors["mlp top"] = fitted["ekfac"].top(queries, k=4).values
    tensors["mlp self"] = fitted["ekfac"].self_influence()
    kept = partial(build_store, dtype="float32", shard_rows=10, batch_size=BATCH, executor=executor)
    store = kept(fb.TRAK(dimension=16), task, train, folder / "store")
    tensors["mlp rows"] = store.rows(torch.arange(N).numpy())
    words = fb.Task(language, fb.losses.causal_lm)
    for name in ("graddot", "ekfac", "trak"):
        one = METHODS[name].fit(words, texts(21, 0), batch_size=4, executor=executor)
        tensors[f"gpt {name}"] = one.score(texts(3, 1)).values
    rows = kept(METHODS["trak"], words, texts(21, 0), folder / "texts").rows(range(21))
    tensors["gpt rows"] = rows
    hashes = f"{task.model_hash()} {words.model_hash()}"
    tensors["hashes"] = torch.tensor(list(hashes.encode()))
    tensors["trainable"] = torch.tensor([p.requires_grad for p in network.parameters()])
    return tensors


def resident(model: nn.Module) -> int:
    """Numbers of parameters that this process holds."""
    return sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())


def memory() -> dict[str, Tensor]:
    """What stays of the parameters in this process, and the most that a pass makes whole."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(16)]
    model = nn.Sequential(*blocks, nn.Linear(64, 3)).eval()
    whole = sum(p.numel() for p in model.parameters())
    for block in model:
        fully_shard(block)
    fully_shard(model)
    most = 0

    def look(*_: Any) -> None:
        nonlocal most
        most = max(most, resident(model))

    def inside(_: nn.Module, inputs: Any, output: Tensor) -> None:
        look()
        if output.requires_grad:
            output.register_hook(look)

    for layer in model.modules():
        if isinstance(layer, nn.Tanh):  # at work, the layers around it are whole
            layer.register_forward_hook(inside)
    x, y = torch.randn(20, 64), torch.arange(20) % 3
    task = fb.Task(model, fb.losses.cross_entropy)
    fb.GradDot().fit(task, (x, y), batch_size=4).score((x[:2], y[:2]))
    return {"sizes": torch.tensor([whole, resident(model), most])}


def errors(executor: Any) -> list[str]:
    """What is refused, and what comes of an example that only one process meets."""
    scaled = fully_shard(Scaled())
    texts = []
    task = fb.Task(scaled, fb.losses.cross_entropy)
    for method in (fb.GradDot(), fb.Exact(layers=("linear",))):
        try:
            method.fit(task, points(N, 0))
        except fb.ForebearError as error:
            texts.append(f"{type(error).__name__}: {error}")
    x, y = points(N, 0)
    x[20] = torch.nan  # in the second piece, which belongs to the second process
    network = fully_shard(mlp())
    task = fb.Task(network, fb.losses.cross_entropy)
    try:
        fb.KFAC().fit(task, (x, y), batch_size=BATCH, executor=executor)
    except fb.ForebearError as error:
        texts.append(f"{type(error).__name__}: {error}")
    fb.KFAC().fit(task, points(N, 0), batch_size=BATCH, executor=executor)  # still in step
    nn.functional.cross_entropy(network(x[:9]), y[:9]).backward()  # and can be trained
    texts.append(str(all(p.grad is not None for p in network.parameters())))
    return texts


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, executor = Path(sys.argv[1]), fb.Torchrun()
    warnings.simplefilter("error", fb.errors.ForebearWarning)
    rank = 0 if executor.leads else 1
    spread = found(folder / "spread", True, executor)
    save_file({name: t.contiguous() for name, t in spread.items()}, folder / f"spread-{rank}")
    alike = found(folder / f"alike-{rank}", True, None)
    save_file({name: t.contiguous() for name, t in alike.items()}, folder / f"alike-{rank}.rows")
    save_file(memory(), folder / f"memory-{rank}")
    (folder / f"errors-{rank}").write_text("\n".join(errors(executor)))
