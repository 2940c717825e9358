import os

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # small problems are faster without a pool, and rounding is repeatable

# The same examples in every run, and no judgement of how fast a busy machine makes them.
settings.register_profile(
    "suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")

# A cluster of the tests is the tests' own. Ray keeps a token in the home folder, which two
# processes that begin at the same time would both make.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
