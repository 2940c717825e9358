import pytest
import torch

torch.set_num_threads(1)  # small problems are faster without a pool, and rounding is repeatable


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
