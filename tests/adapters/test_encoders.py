"""Encoders of images against the models they wrap."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from forebear.adapters import encoders
from forebear.errors import DataError, FormatError

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=12,
    )
    folder = tmp_path_factory.mktemp("clip")
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def test_clip_gives_the_features_of_its_model(clip_folder: Path) -> None:
    pixels = torch.rand(5, 3, 32, 32)
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(clip_folder).eval()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        expected = model(pixel_values=(pixels - mean) / deviation).image_embeds
    found = encoders.clip(clip_folder)(2 * pixels - 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_grey_images_are_seen_in_three_colours(clip_folder: Path) -> None:
    encode = encoders.clip(clip_folder)
    grey = 2 * torch.rand(4, 1, 14, 14) - 1
    torch.testing.assert_close(encode(grey), encode(grey.expand(-1, 3, -1, -1)))


def test_an_image_is_no_distance_from_itself(clip_folder: Path) -> None:
    encode = encoders.clip(clip_folder)
    images = 2 * torch.rand(4, 3, 20, 30) - 1
    np.testing.assert_allclose(encode.distance(images, images), 0, atol=1e-6)
    assert (encode.distance(images, images.flip(0)) > 0).all()


def test_dino_gives_its_first_token(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=56
    )
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    pixels = torch.rand(2, 3, 224, 224)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        expected = model(pixel_values=(pixels - mean) / deviation).last_hidden_state[:, 0]
    found = encoders.dino(tmp_path)(2 * pixels - 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_scaling_is_that_of_pillow() -> None:
    seen = encoders.Encoder(nn.Identity(), 16, (0, 0, 0), (1, 1, 1))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((24, 16), Image.Resampling.BICUBIC)
    expected = np.asarray(picture)[:, 4:20] / 255
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    found = seen(image)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, expected, atol=2 / 255)


def test_torchscript_is_a_file(tmp_path: Path) -> None:
    torch.jit.script(nn.Sequential(nn.AvgPool2d(8), nn.Flatten())).save(tmp_path / "model.pt")
    found = encoders.torchscript(tmp_path / "model.pt", size=16)(torch.zeros(3, 3, 8, 8))
    assert found.shape == (3, 12)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"config\.json"):
        encoders.clip(tmp_path)
    with pytest.raises(FormatError, match="no TorchScript"):
        encoders.torchscript(tmp_path / "none.pt", size=16)
    with pytest.raises(DataError, match=r"\(2, 4, 8, 8\)"):
        encoders.Encoder(nn.Identity(), 16)(torch.zeros(2, 4, 8, 8))
