"""Your own model and data: a small network that tells three kinds of wine apart.

    forebear attribute examples/own_model.py --method exact --out runs/wine
    forebear top runs/wine --query 0

Replace the model, the data and the training loop with yours. Needs scikit-learn, for the data.
"""

import torch
from sklearn.datasets import load_wine
from torch import nn

import forebear as fb

# Any map-style dataset will do; a tuple of tensors is the fastest.
measured, kinds = load_wine(return_X_y=True)
x = torch.tensor((measured - measured.mean(0)) / measured.std(0), dtype=torch.float32)
y = torch.tensor(kinds)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
kept, held_out = order[:150], order[150:]


class Network(nn.Module):
    """Whatever you have: forebear looks at its layers, not at how they are put together."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(13, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.hidden(x).tanh())


def task() -> fb.Task:
    # It must be the same model every time, or a second method would describe another one:
    # fix the seed, or load a checkpoint here.
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[kept]), y[kept]).backward()
        optimizer.step()
    # The loss says what was trained. measure= would say what is asked about a query, for example
    # one logit; left out, it is minus the loss.
    return fb.Task(model.eval(), loss=fb.losses.cross_entropy)


def train() -> fb.Data:
    # ids are what results are called; positions, when left out.
    return fb.Data((x[kept], y[kept]), ids=[f"bottle {i}" for i in kept.tolist()])


def queries() -> tuple[torch.Tensor, torch.Tensor]:
    return x[held_out], y[held_out]
