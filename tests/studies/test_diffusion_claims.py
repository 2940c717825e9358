"""What is said of MUCS and NDA on digits, as far as a small network shows it.

Claims that need the real networks and retrainings are findings of the study itself.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import forebear as fb
from forebear.tasks.diffusion import images
from forebear.tasks.noise import gaussian
from forebear.tasks.schedules import Discrete
from forebear.zoo import digits_diffusion
from forebear.zoo.pictures import Pictures

LEVEL, SIDE = 50, 5


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return digits_diffusion.load(train=120, queries=4)


@pytest.fixture(scope="module")
def network(pictures: Pictures) -> nn.Module:
    return digits_diffusion.recipe("x0", epochs=60).train(pictures.train, seed=0)


def test_skew_is_bounded_and_forgetting_ends_at_the_bound(
    pictures: Pictures, network: nn.Module
) -> None:
    task = fb.Task(network, digits_diffusion.loss("x0"))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    method = fb.MUCS(learning_rate=3e-4, layers=("hidden.*",))
    fitted = method.fit(task, pictures.train)
    scores = fitted.score(pictures.queries)
    assert scores.values.abs().max() < 1
    assert scores.values.std(1).min() > 0
    run = fitted.unlearn(pictures.queries)
    assert run.converged.all()
    assert (run.forgotten >= method.stop * fitted.null).all()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


def test_weights_of_all_images_at_a_pixel_add_up_to_one(
    pictures: Pictures,
) -> None:
    method = fb.NDA(patch=SIDE, timesteps=(LEVEL,), keep=None, dtype="float64")
    fitted = method.fit(None, pictures.train)
    found = fitted.maps(pictures.queries, len(pictures.train))
    assert (found.values.double().sum(1) - 1).abs().max() < 1e-9


def test_with_much_noise_a_copy_is_not_found(pictures: Pictures) -> None:
    image = pictures.train.batch(slice(None))["image"]
    queries = images(image[:30], keys=torch.arange(1000, 1030))
    hits = {}
    for level in (50, 400):
        ids = fb.NDA(timesteps=(level,)).fit(None, pictures.train).top(queries, 1).ids[:, 0]
        hits[level] = sum(int(one) == i for i, one in enumerate(ids))
    assert hits[50] == 30
    assert hits[400] < 20


def test_a_large_constant_beyond_the_frame_ruins_float32(
    pictures: Pictures,
) -> None:
    """Why patches are grouped by how they are cut off, and not filled up with a constant."""
    image = pictures.train.batch(slice(0, 40))["image"]
    query = pictures.queries.batch(slice(0, 1))["image"]
    found = [filled(query, image, dtype) for dtype in (torch.float32, torch.float64)]
    assert (found[0].double() - found[1]).abs().max() > 0.1
    pair = [
        fb.NDA(patch=SIDE, timesteps=(LEVEL,), keep=None, dtype=dtype)
        .fit(None, images(image.double()))
        .score(images(query.double()))
        .values.double()
        for dtype in ("float32", "float64")
    ]
    assert (pair[0] - pair[1]).abs().max() < 64 * 1e-4
    assert (pair[1] - found[1].sum(0)).abs().max() < 1e-6  # of the expansion


def filled(query: Tensor, train: Tensor, dtype: torch.dtype, fill: float = 1000.0) -> Tensor:
    """Weights `[u, n]` with `|x|² + |y|² − 2xy` over patches that a constant completes."""
    signal, strength = Discrete.linear().at(LEVEL)
    noise = gaussian(torch.zeros(1).long(), (1, 8, 8), 0, LEVEL, 0, dtype=torch.double)
    noisy = signal * query.double() + strength * noise
    margin = (SIDE - 1) // 2

    def patches(pixels: Tensor) -> Tensor:
        return F.unfold(F.pad(pixels, (margin,) * 4, value=fill), SIDE).transpose(1, 2).to(dtype)

    x, y = patches(noisy)[0], patches(signal * train.double())
    products = torch.einsum("ud,nvd->unv", x, y)
    squares = x.square().sum(-1)[:, None, None] + y.square().sum(-1) - 2 * products
    return (-squares / (2 * strength**2)).flatten(1).softmax(1).view_as(squares).sum(-1)
