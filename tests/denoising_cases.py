"""A small denoising task, and its features one example and one level at a time."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

import forebear as fb
from forebear.tasks.diffusion import images

LEVELS, DRAWS = (100, 500, 900), 2
N, Q = 14, 4


class Net(nn.Module):
    """Three pixels squared in and out; the level is one more input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 6)
        self.last = nn.Linear(6, 9)

    def forward(self, noisy: Tensor, levels: Tensor) -> Tensor:
        told = torch.cat([noisy.flatten(1), levels[:, None].to(noisy) / 1000], 1)
        return self.last(torch.tanh(self.first(told))).view(noisy.shape)


def case(seed: int = 0, **settings: object) -> tuple[fb.Task, dict, dict]:
    """A task, training images and queries, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = Net().double()
    loss = fb.losses.Denoising(levels=LEVELS, draws=DRAWS, **settings)  # type: ignore[arg-type]
    pixels = torch.rand(N + Q, 1, 3, 3, generator=generator, dtype=torch.float64) * 2 - 1
    return fb.Task(model, loss), images(pixels[:N]), images(pixels[N:], keys=range(50, 50 + Q))


class Told(nn.Module):
    """The same, told a condition of two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 6)
        self.last = nn.Linear(6, 9)

    def forward(self, noisy: Tensor, levels: Tensor, condition: Tensor) -> Tensor:
        told = torch.cat([noisy.flatten(1), levels[:, None].to(noisy) / 1000, condition], 1)
        return self.last(torch.tanh(self.first(told))).view(noisy.shape)


def told_case(seed: int = 0) -> tuple[fb.Task, dict, dict]:
    """A conditional task, training images and queries, in double precision."""
    task, train, queries = case(seed)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    for data in (train, queries):
        data["condition"] = torch.randn(len(data["key"]), 2, generator=generator).double()
    return fb.Task(Told().double(), task.loss), train, queries


Scalar = Callable[[Tensor, Tensor], Tensor]
"""From a prediction and the noise, both flat, to a number."""

SCALARS: dict[str, Scalar] = {
    "loss": lambda said, noise: ((said - noise) ** 2).mean(),
    "square_norm": lambda said, noise: (said**2).mean(),
    "mean": lambda said, noise: said.mean(),
    "absolute": lambda said, noise: said.abs().mean(),
}


def features(task: fb.Task, data: dict, scalar: Scalar, *, unit: bool = False) -> Tensor:
    """Means over levels and draws of gradients, `[m, P]`, by autograd, with betas 1e-4 to 0.02."""
    model, loss = task.model, task.objective
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = torch.cumprod(1 - betas, 0)
    rows = []
    for i in range(len(data["image"])):
        one = {name: column[i : i + 1] for name, column in data.items()}
        total = torch.zeros(())
        for point in loss.points:  # type: ignore[attr-defined]
            noise = loss.noise_of(one, point)  # type: ignore[attr-defined]
            share = kept[int(point.level)].item()
            noisy = math.sqrt(share) * one["image"] + math.sqrt(1 - share) * noise
            said = model(noisy, torch.tensor([point.level])).flatten()
            value = scalar(said, noise.flatten())
            found = torch.autograd.grad(value, list(model.parameters()))
            gradient = torch.cat([g.flatten() for g in found])
            total = total + (gradient / gradient.norm() if unit else gradient)
        rows.append(total / (len(LEVELS) * DRAWS))
    return torch.stack(rows)


def kernel(asked: Tensor, told: Tensor, factor: float = 1.0) -> Tensor:
    """`g_q (GᵀG / n + λI)⁻¹ g_z` with λ a multiple of the mean of n eigenvalues, `[q, n]`."""
    second = told.T @ told / len(told)
    ridge = factor * second.trace() / min(second.shape[0], len(told))
    unit = torch.eye(len(second), dtype=second.dtype)
    return asked @ torch.linalg.solve(second + ridge * unit, told.T)
