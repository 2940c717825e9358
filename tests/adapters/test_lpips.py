"""LPIPS against networks of torch.nn with the layers of AlexNet and VGG-16, on random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from forebear.adapters.lpips import lpips
from forebear.errors import DataError, FormatError


def alexnet() -> tuple[nn.Sequential, list[int]]:
    """Layers, and numbers of the ReLUs that are compared."""
    layers = [
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
    ]
    return nn.Sequential(*layers), [1, 4, 7, 9, 11]


def vgg() -> tuple[nn.Sequential, list[int]]:
    layers: list[nn.Module] = []
    width, taps = 3, []
    for group in ([64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3):
        for wide in group:
            layers += [nn.Conv2d(width, wide, 3, padding=1), nn.ReLU()]
            width = wide
        taps.append(len(layers) - 1)
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers), taps


NETWORKS = {"alexnet": alexnet, "vgg": vgg}


def saved(folder: Path, name: str) -> tuple[nn.Sequential, list[int], list[Tensor]]:
    """The files of a network as torchvision and LPIPS write them."""
    torch.manual_seed(0)
    network, taps = NETWORKS[name]()
    state = {f"features.{key}": value for key, value in network.state_dict().items()}
    torch.save({**state, "classifier.1.weight": torch.zeros(2, 2)}, folder / f"{name}.pth")
    widths = [len(state[f"features.{tap - 1}.weight"]) for tap in taps]
    linear = [torch.rand(1, wide, 1, 1) for wide in widths]
    named = {f"lin{i}.model.1.weight": one for i, one in enumerate(linear)}
    torch.save(named, folder / f"{name}-linear.pth")
    return network, taps, linear


@pytest.mark.parametrize("name", NETWORKS)
def test_distances_are_those_of_the_layers(tmp_path: Path, name: str) -> None:
    network, taps, linear = saved(tmp_path, name)
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    images, others = (2 * torch.rand(3, 3, 70, 66) - 1 for _ in range(2))
    expected = np.zeros(3)
    with torch.no_grad():
        mine, theirs = ((x - shift) / scale for x in (images, others))
        for place, layer in enumerate(network):
            mine, theirs = layer(mine), layer(theirs)
            if place in taps:
                a, b = (x.double().numpy() for x in (mine, theirs))
                a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
                weights = linear[taps.index(place)].double().numpy()
                expected += (weights * (a - b) ** 2).sum(1).mean((1, 2))
    found = lpips(tmp_path / f"{name}.pth", tmp_path / f"{name}-linear.pth")
    np.testing.assert_allclose(found.distance(images, others), expected, rtol=1e-4)


def test_small_grey_images_are_enlarged(tmp_path: Path) -> None:
    saved(tmp_path, "alexnet")
    found = lpips(tmp_path / "alexnet.pth", tmp_path / "alexnet-linear.pth")
    images = 2 * torch.rand(40, 1, 14, 14) - 1
    np.testing.assert_allclose(found.distance(images, images), 0, atol=1e-6)
    away = found.distance(images, images.flip(0))
    assert (away > 0).all()
    np.testing.assert_allclose(away, away[::-1], rtol=1e-4)  # of the pair, whichever is first


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    saved(tmp_path, "alexnet")
    saved(tmp_path, "vgg")
    with pytest.raises(FormatError, match=r"vgg-linear\.pth has no 192 linear weights for layer 3"):
        lpips(tmp_path / "alexnet.pth", tmp_path / "vgg-linear.pth")
    with pytest.raises(FormatError, match="neither AlexNet nor VGG-16"):
        lpips(tmp_path / "alexnet-linear.pth", tmp_path / "alexnet-linear.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("text.pth", "absent.pth"):
        with pytest.raises(FormatError, match=f"{name} holds no weights"):
            lpips(tmp_path / name, tmp_path / "alexnet-linear.pth")
    found = lpips(tmp_path / "alexnet.pth", tmp_path / "alexnet-linear.pth")
    with pytest.raises(DataError, match="decode latents first"):
        found.distance(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))
