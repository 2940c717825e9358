"""EK-FAC against an independent implementation: scores that kronfluence gave, kept in a file.

`benchmarks/kronfluence_reference.py` makes the file.
"""

from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import nn

import forebear as fb

REFERENCE = Path(__file__).with_name("kronfluence_reference.safetensors")


def test_ekfac_gives_the_scores_of_kronfluence() -> None:
    stored = load_file(REFERENCE)
    model = nn.Sequential(
        nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)
    )
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in stored.items() if k.startswith("model.")}
    )
    x, y = stored["x"], stored["y"]
    task = fb.Task(model.eval(), fb.losses.cross_entropy)
    method = fb.EKFAC(targets="empirical", rank=None)
    scores = method.fit(task, (x[:200], y[:200])).score((x[200:], y[200:])).values.numpy()
    theirs = stored["scores"].numpy()
    agreement = [spearmanr(a, b).statistic for a, b in zip(scores, theirs, strict=True)]
    assert np.mean(agreement) > 0.9999
    # They leave the 1/n out.
    assert np.allclose(scores * 200, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())
