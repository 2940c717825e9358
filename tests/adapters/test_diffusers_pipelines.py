"""Whole pipelines: a folder of images, images that were made, and who is behind them."""

import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import forebear as fb
from forebear.adapters.diffusers.latents import encode, encoded_path
from forebear.errors import (
    DataError,
    ForebearWarning,
    FormatError,
    MissingDependencyError,
    TaskError,
)
from forebear.methods.concept_trak import concepts
from forebear.tasks.sampling import Sampler

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tests.diffusers_cases import (  # noqa: E402
    encoder,
    plain,
    text_pipeline,
    transformer,
    write_pictures,
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return text_pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "photos", 6)
    return tmp_path / "photos"


def test_texts_are_embedded_as_the_pipeline_does(pipeline: Any) -> None:
    found = fb.diffusers.embed(pipeline, ["cat", "dog", ""], batch_size=2)
    ids = pipeline.tokenizer(
        ["cat", "dog", ""], padding="max_length", max_length=9, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        expected = pipeline.text_encoder(ids)[0]
    torch.testing.assert_close(found, expected)
    with pytest.warns(ForebearWarning, match="1 of 2 texts have more than the 9 tokens"):
        fb.diffusers.embed(pipeline, ["cat", "a very long text indeed"])
    with pytest.raises(TaskError, match="has no text encoder"):
        fb.diffusers.embed(diffusers.DDPMPipeline(plain(), diffusers.DDPMScheduler()), ["cat"])
    with pytest.raises(DataError, match="list of at least one"):
        fb.diffusers.embed(pipeline, "cat")


def test_images_are_encoded_once_and_cached_by_content(
    pipeline: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    data = fb.diffusers.images(pipeline, photos, cache=cache, batch_size=4)
    pixels = fb.diffusers.folder(photos, size=16).batch(slice(None))["image"]
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels).latent_dist.mode() * 0.5
    batch = data.batch(slice(None))
    torch.testing.assert_close(batch["image"], expected)
    told = fb.diffusers.embed(pipeline, ["cat", "dog"])
    torch.testing.assert_close(batch["condition"], told[[0, 0, 0, 1, 1, 1]])
    assert data.ids[0] == "a/picture0.png"

    asked: list[int] = []
    real = type(pipeline.vae).encode

    def counted(self: Any, x: Any, **settings: Any) -> Any:
        asked.append(len(x))
        return real(self, x, **settings)

    monkeypatch.setattr(type(pipeline.vae), "encode", counted)
    again = fb.diffusers.images(pipeline, photos, cache=cache)
    assert asked == []
    assert again.fingerprint == data.fingerprint
    (photos / "a/picture0.png").rename(photos / "a/renamed.png")
    (photos / "a/picture0.txt").rename(photos / "a/renamed.txt")
    (photos / "b/picture1.png").write_bytes((photos / "a/picture2.png").read_bytes())
    encoded_path(cache, data.dataset.hashes[0]).unlink()
    fb.diffusers.images(pipeline, photos, cache=cache)
    assert sum(asked) == 1  # a new name, and a file that is a copy, need nothing
    pipeline.vae.decoder.conv_out.bias.data += 1
    fb.diffusers.images(pipeline, photos, cache=cache)
    assert sum(asked) == 7  # another encoder
    with pytest.raises(TaskError, match="pass cache="):
        fb.diffusers.images(pipeline, photos)


def test_codes_and_pictures_lead_back_and_forth(pipeline: Any) -> None:
    vae = encoder()
    vae.register_to_config(scaling_factor=0.25, shift_factor=0.3)
    fake = copy.copy(pipeline)
    fake.vae = vae
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        code = vae.encode(pictures).latent_dist.mode()
        expected = vae.decode(code).sample.clamp(-1, 1)
    made = encode(fake, pictures)
    torch.testing.assert_close(made, (code - 0.3) * 0.25)
    torch.testing.assert_close(fb.diffusers.decode(fake, made), expected, atol=1e-5, rtol=1e-5)
    bare = diffusers.DDPMPipeline(plain(), diffusers.DDPMScheduler())
    assert torch.equal(fb.diffusers.decode(bare, 3 * pictures), (3 * pictures).clamp(-1, 1))


def test_what_is_generated_is_what_the_pipeline_makes_from_that_noise(pipeline: Any) -> None:
    queries = fb.diffusers.generated(
        pipeline, (4, 9), prompts=["cat", "dog"], guidance=3.0, sampler=10, batch_size=1
    )
    start = Sampler().start(fb.diffusers.task(pipeline).loss, torch.tensor([4, 9]), (4, 8, 8))  # type: ignore[arg-type]
    expected = pipeline(
        ["cat", "dog"],
        latents=start,
        guidance_scale=3.0,
        num_inference_steps=10,
        output_type="latent",
    ).images
    batch = queries.batch(slice(None))
    error = (batch["image"] - expected).abs().max() / expected.abs().max()
    assert error < 1e-5
    assert batch["key"].tolist() == [4, 9]
    assert queries.ids.tolist() == ["key 4", "key 9"]
    alone = fb.diffusers.generated(pipeline, [9], prompts="dog", guidance=3.0, sampler=10)
    scale = batch["image"].abs().max().item()
    torch.testing.assert_close(
        alone.batch(slice(None))["image"], batch["image"][1:], rtol=1e-4, atol=1e-5 * scale
    )


def test_classes_are_generated_with_the_empty_one_for_guidance() -> None:
    model = transformer()
    pipeline = diffusers.DiTPipeline(
        transformer=model, vae=encoder(), scheduler=diffusers.DDIMScheduler(clip_sample=False)
    )
    told = torch.tensor([1, 2])
    plainly = fb.diffusers.generated(pipeline, (0, 1), condition=told, sampler=5)
    guided = fb.diffusers.generated(pipeline, (0, 1), condition=told, sampler=5, guidance=2.0)
    by_hand = fb.diffusers.generated(
        pipeline, (0, 1), condition=told, sampler=5, guidance=2.0, without=torch.tensor([5])
    )
    a, b, c = (data.batch(slice(None))["image"] for data in (plainly, guided, by_hand))
    assert torch.equal(b, c)
    assert not torch.allclose(a, b)
    with pytest.raises(DataError, match="is told a class label"):
        fb.diffusers.generated(pipeline, (0, 1))
    with pytest.raises(DataError, match="1 conditions for 2 keys"):
        fb.diffusers.generated(pipeline, (0, 1), condition=told[:1])
    with pytest.raises(DataError, match="keys is empty"):
        fb.diffusers.generated(pipeline, ())


def test_a_pipeline_is_left_as_it_was(pipeline: Any, photos: Path, tmp_path: Path) -> None:
    pipeline.unet.train()
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    train = fb.diffusers.images(pipeline, photos, cache=tmp_path / "cache")
    made = fb.diffusers.generated(pipeline, [1], prompts="cat", sampler=3).batch(slice(None))
    task = fb.diffusers.task(pipeline, layers=fb.diffusers.cross_attention(pipeline), levels=2)
    queries = {**made, "image": made["image"].clamp(-1, 1)}  # an untrained network leads astray
    fb.GradDot().fit(task, train).score(queries)
    assert pipeline.unet.training
    pipeline.unet.eval()
    after = pipeline.unet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad for p in pipeline.unet.parameters())


def test_concepts_are_asked_of_a_text_pipeline(pipeline: Any, photos: Path, tmp_path: Path) -> None:
    train = fb.diffusers.images(pipeline, photos, cache=tmp_path / "cache")
    layers = fb.diffusers.cross_attention(pipeline)
    task = fb.diffusers.task(pipeline, levels=2)
    told, untold = fb.diffusers.embed(pipeline, ["cat", ""]).split(1)
    method = fb.ConceptTRAK(
        scope="local", sampler=Sampler(steps=10), draws=9, dimension=64, layers=layers
    )
    fitted = method.fit(task, train)
    scores = fitted.score(concepts(told, untold, keys=[4]))
    assert torch.isfinite(scores.values).all()
    assert fitted.details()["normalised"]  # as for texts
    assert scores.train_ids[0] == "a/picture0.png"


def test_pipelines_are_loaded_from_disk_alone(pipeline: Any, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = fb.diffusers.load(tmp_path / "saved", safety_checker=None)
    assert fb.diffusers.task(loaded).model_hash() == fb.diffusers.task(pipeline).model_hash()
    assert next(loaded.unet.parameters()).dtype == torch.float32
    with pytest.raises(FormatError, match="holds no pipeline"):
        fb.diffusers.load("someone/some-model")


def test_without_diffusers_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers"]:
        monkeypatch.setitem(sys.modules, name, None)
    importlib.reload(importlib.import_module("forebear.adapters.diffusers.pipelines"))
    with pytest.raises(MissingDependencyError, match=r"pip install 'forebear\[diffusers\]'"):
        fb.diffusers.load(tmp_path)


def test_an_unconditional_pipeline_and_a_folder_give_the_images_behind_one(
    photos: Path, tmp_path: Path
) -> None:
    model = plain(in_channels=3, out_channels=3).float()
    pipeline = diffusers.DDPMPipeline(unet=model, scheduler=diffusers.DDPMScheduler())
    pipeline.save_pretrained(tmp_path / "saved")
    pipeline = fb.diffusers.load(tmp_path / "saved")
    train = fb.diffusers.images(pipeline, photos)
    assert train.batch(slice(0, 2))["image"].shape == (2, 3, 8, 8)
    queries = fb.diffusers.generated(pipeline, range(2), sampler=5)
    scores = fb.DAS().fit(fb.diffusers.task(pipeline), train).score(queries)
    assert scores.values.shape == (2, 6)
    assert set(scores.top(6).ids[0]) == set(train.ids)
    assert np.isfinite(scores.values.numpy()).all()
    with pytest.raises(TaskError, match="channels"):
        fb.diffusers.images(transformer(), photos, condition="folder")
    with pytest.raises(DataError, match="condition='folder'"):
        fb.diffusers.images(
            diffusers.DiTPipeline(
                transformer=transformer(), vae=encoder(), scheduler=diffusers.DDIMScheduler()
            ),
            photos,
            cache=tmp_path / "cache",
        )


def test_networks_are_retrained_together_on_parts_of_a_folder(photos: Path) -> None:
    model = plain(in_channels=3, out_channels=3).float()
    pipeline = diffusers.DDPMPipeline(unet=model, scheduler=diffusers.DDPMScheduler())
    files, task = fb.diffusers.images(pipeline, photos), fb.diffusers.task(pipeline)
    train = fb.Data(files.batch(slice(None)), ids=files.ids)  # tensors can be trained on together
    recipe = fb.Recipe(
        lambda: type(model).from_config(model.config).double(),
        task.loss.training(),  # type: ignore[attr-defined]
        optimizer="adamw",
        learning_rate=1e-3,
        epochs=2,
        batch_size=4,
    )
    masks = torch.tensor([[1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 0, 1]]).bool()
    together = recipe.train_many(train, masks, [0, 0])
    alone = recipe.train(train, masks[1], seed=0).state_dict()
    for name, value in alone.items():
        torch.testing.assert_close(together.state[name][1], value, rtol=1e-6, atol=1e-9)


def test_the_example_runs_with_less_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    path = Path(__file__).parents[2] / "examples" / "diffusers_folder.py"
    about = importlib.util.spec_from_file_location("diffusers_folder", path)
    assert about is not None
    assert about.loader is not None
    example = importlib.util.module_from_spec(about)
    about.loader.exec_module(example)
    monkeypatch.setattr(example, "COUNT", 30)
    monkeypatch.setattr(example, "STEPS", 2)
    example.main(tmp_path)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "-0000.png" in page  # a file name under its picture
