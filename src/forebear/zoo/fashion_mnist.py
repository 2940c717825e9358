"""Fashion-MNIST: clothes in 28 × 28 pixels (Xiao, Rasul & Vollgraf 2017), as Debian packages it."""

import gzip
import zlib
from pathlib import Path

import numpy as np
from torch import nn

from forebear.errors import FormatError, MissingDependencyError
from forebear.tasks import losses
from forebear.training.recipe import Recipe
from forebear.zoo.images import Images, split_images

FOLDER = Path("/usr/share/datasets/fashion-mnist")

CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)

REMEDY = "apt-get install dataset-fashion-mnist, or name a folder with the four *-ubyte.gz files"


def load(
    *, train: int = 4000, queries: int = 100, seed: int = 0, folder: str | Path = FOLDER
) -> Images:
    """A random part of the training images, and all test images.

    Raises:
        MissingDependencyError: a file is not there.
        FormatError: a file is damaged.
    """
    folder = Path(folder)
    images, labels = read_pair(folder, "train")
    test_images, test_labels = read_pair(folder, "t10k")
    return split_images(
        "fashion_mnist",
        images,
        labels,
        CLASSES,
        train=train,
        queries=queries,
        seed=seed,
        test_images=test_images,
        test_labels=test_labels,
    )


def available(folder: str | Path = FOLDER) -> bool:
    """Whether the files are there."""
    return all((Path(folder) / f"{split}-images-idx3-ubyte.gz").is_file() for split in _SPLITS)


def build() -> nn.Module:
    """An untrained network 784-128-64-10."""
    return nn.Sequential(
        nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def recipe(*, epochs: int = 20) -> Recipe:
    """How the network is trained."""
    return Recipe(
        build,
        losses.cross_entropy,
        learning_rate=0.05,
        momentum=0.9,
        weight_decay=1e-2,
        epochs=epochs,
        batch_size=128,
        schedule="cosine",
    )


_SPLITS = ("train", "t10k")


def read_pair(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images `[n, 28, 28]` and labels `[n]` of `"train"` or `"t10k"`.

    Raises:
        MissingDependencyError: a file is not there.
        FormatError: a file is damaged, or they do not belong together.
    """
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise FormatError(
            f"{folder}: the {split} images have shape {images.shape} and the labels "
            f"{labels.shape}; they do not belong together: {REMEDY}"
        )
    return images, labels


def read_idx(path: Path) -> np.ndarray:
    """A gzipped file of unsigned bytes in the IDX format of MNIST.

    Its header is two zero bytes, the type (8 is unsigned byte), the number of dimensions, and each
    dimension as a big-endian 32-bit integer.

    Raises:
        MissingDependencyError: the file is not there.
        FormatError: it is damaged.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise MissingDependencyError(f"{path} does not exist: {REMEDY}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(f"{path} is damaged: {error}; {REMEDY}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise FormatError(f"{path} is not an IDX file of unsigned bytes: {REMEDY}")
    rank = content[3]
    header = 4 + 4 * rank
    shape = tuple(np.frombuffer(content, ">u4", rank, 4).tolist()) if len(content) >= header else ()
    if len(shape) != rank or len(content) - header != np.prod(shape, dtype=np.int64):
        raise FormatError(
            f"{path} is damaged: {len(content) - header} bytes of data for shape {shape}; {REMEDY}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
