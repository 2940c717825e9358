"""Images as a pipeline's network sees them: encoded images and embedded texts."""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forebear.adapters.diffusers.folders import Folder
from forebear.data import Data
from forebear.errors import DataError, ForebearWarning, TaskError
from forebear.progress import track
from forebear.task import state_hash
from forebear.types import partial_path, read_tensors


@dataclass(frozen=True, eq=False)
class Latents:
    """Examples whose images are read from a folder of encoded ones.

    Attributes:
        rest: an example without its image, by position.
        root: of encoded images.
        hashes: of each image with the encoder.
    """

    rest: Callable[[int], dict[str, Tensor]]
    root: Path
    hashes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.hashes)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        stored = read_tensors(encoded_path(self.root, self.hashes[i]))
        return {"image": stored["image"], **self.rest(i)}


def latents(pipeline: Any, data: Data, *, cache: str | Path, batch_size: int = 8) -> Data:
    """The same dataset with images as the pipeline's autoencoder encodes them.

    Every image is encoded once, to the mean of its code, and kept in a file under a hash of its
    pixels and the encoder: stopped halfway, the same call goes on, and new images add files.

    Args:
        pipeline: with a `vae`.
        data: as of `folder`, at the size of images, from -1 to 1.
        cache: folder of encoded images, made where it is missing.
        batch_size: images to encode at a time.

    Raises:
        TaskError: the pipeline has no autoencoder.
    """
    vae, root = _vae(pipeline), Path(cache)
    encoder = f"{state_hash(vae.state_dict())} {_scaling(vae)}"
    rest = _rest_of(data)
    hashes: list[str] = []
    steps = -(-len(data) // batch_size)
    for _, batch in track(data.batches(batch_size), "encoding images", total=steps):
        own = [_hash(encoder, image) for image in batch["image"]]
        missing = [i for i, h in enumerate(own) if not encoded_path(root, h).is_file()]
        if missing:
            for i, code in zip(missing, encode(pipeline, batch["image"][missing]), strict=True):
                _write(encoded_path(root, own[i]), code)
        hashes += own
    return Data(Latents(rest, root, tuple(hashes)), ids=data.ids)


@torch.no_grad()
def encode(pipeline: Any, images: Tensor) -> Tensor:
    """Images `[n, c, h, w]` from -1 to 1 as the network sees them: scaled means of their codes."""
    vae = _vae(pipeline)
    shift, scale = _scaling(vae)
    weight = next(vae.parameters())
    said = vae.encode(images.to(weight))
    codes = said.latent_dist.mode() if hasattr(said, "latent_dist") else said.latents
    return ((codes - shift) * scale).float().cpu()


@torch.no_grad()
def decode(pipeline: Any, images: Tensor) -> Tensor:
    """What the network makes as pictures `[n, c, h, w]` from -1 to 1.

    Args:
        pipeline: with an autoencoder or without, where it only bounds them.
        images: `[n, ...]` as the network makes them.
    """
    if getattr(pipeline, "vae", None) is None:
        return images.clamp(-1, 1)
    vae = _vae(pipeline)
    shift, scale = _scaling(vae)
    codes = (images / scale + shift).to(next(vae.parameters()))
    return vae.decode(codes).sample.float().clamp(-1, 1).cpu()


@torch.no_grad()
def embed(pipeline: Any, texts: Sequence[str], *, batch_size: int = 32) -> Tensor:
    """Texts as the pipeline tells its network, `[n, tokens, width]`.

    Texts that are longer than the text encoder reads are cut, with a warning.

    Raises:
        TaskError: the pipeline has no text encoder, or it returns more than one embedding.
    """
    if getattr(pipeline, "text_encoder", None) is None or not hasattr(pipeline, "encode_prompt"):
        raise TaskError(f"{type(pipeline).__name__} has no text encoder: pass condition= instead")
    if isinstance(texts, str) or not len(texts):
        raise DataError("texts must be a list of at least one")
    _warn_of_long(pipeline.tokenizer, texts)
    found = []
    for start in range(0, len(texts), batch_size):
        some = list(texts[start : start + batch_size])
        device = next(pipeline.text_encoder.parameters()).device
        said = pipeline.encode_prompt(
            some, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if not isinstance(said, tuple) or len(said) != 2:
            raise TaskError(
                f"{type(pipeline).__name__} tells its network more than embedded texts, which is "
                "not supported"
            )
        found.append(said[0].detach().cpu())
    return torch.cat(found)


def encoded_path(root: Path, digest: str) -> Path:
    """Where an encoded image is kept."""
    return root / digest[:2] / f"{digest}.safetensors"


def _vae(pipeline: Any) -> Any:
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        raise TaskError(f"{type(pipeline).__name__} has no vae: its network sees the images")
    return vae


def _rest_of(data: Data) -> Callable[[int], dict[str, Tensor]]:
    """What an example is besides its image, without reading the image."""
    if isinstance(data.dataset, Folder):
        return data.dataset.rest
    columns = data.columns
    if not isinstance(columns, dict) or not {"image", "key"} <= set(columns):
        raise DataError(
            "latents are made of a folder(...) or of a dict dataset of forebear.tasks.diffusion."
            "images(...)"
        )
    return lambda i: {name: column[i] for name, column in columns.items() if name != "image"}


def _scaling(vae: Any) -> tuple[float, float]:
    """Shift and scale of codes."""
    config = vae.config
    return float(config.get("shift_factor") or 0.0), float(config.get("scaling_factor") or 1.0)


def _hash(encoder: str, image: Tensor) -> str:
    digest = hashlib.sha256(f"{encoder} {tuple(image.shape)}".encode())
    digest.update(image.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _write(path: Path, code: Tensor) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    save_file({"image": code.contiguous()}, partial)
    partial.replace(path)


def _warn_of_long(tokenizer: Any, texts: Sequence[str]) -> None:
    most = tokenizer.model_max_length
    long = [text for text in texts if len(tokenizer(text).input_ids) > most]
    if long:
        warnings.warn(
            f"{len(long)} of {len(texts)} texts have more than the {most} tokens that the text "
            f"encoder reads and are cut, such as {long[0][:60]!r}",
            ForebearWarning,
            stacklevel=3,
        )
