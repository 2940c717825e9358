"""Attribution of what a Python file defines: a run folder, of generated images with their page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forebear import methods as registry
from forebear.data import Data
from forebear.generated import attribute_images
from forebear.generated.pictures import is_picture
from forebear.pipeline import attribute_defined
from forebear.run import Run
from forebear.task_file import defined
from forebear.tasks.diffusion import Denoising

IMAGES_ONLY = ("concepts", "counterfactual", "decode")
"""What a file may define for generated images, beside `examples()`."""


def attribute_from_file(path: Path, methods: Mapping[str, Mapping[str, Any]], out: Path) -> Run:
    """Attribute what a Python file defines by several methods, and write or extend a run folder.

    The file defines `task()`, `train()` and `queries()`, and may define `examples()`, texts by id.
    Where the task is a diffusion model of pictures, the page is that of generated images, and the
    file may also define `concepts()`, `counterfactual()` and `decode()`, which return what
    `forebear.attribute_images` takes under these names.

    Args:
        path: of the file; it is run as a program.
        methods: options of each method, by name.
        out: folder to write.

    Raises:
        MismatchError: the folder holds a run of another model or data set.
    """
    configured = [registry.get(name, **options) for name, options in methods.items()]
    found = defined(path, ("task", "train", "queries"), ("examples", *IMAGES_ONLY))
    if not _shows_pictures(found):
        return attribute_defined(found, path.stem, configured, out)
    return attribute_images(
        found["task"],
        found["train"],
        found["queries"],
        methods=configured,
        out=out,
        texts=found.get("examples"),
        title=path.stem.replace("_", " "),
        **{name: found[name] for name in IMAGES_ONLY if name in found},
    )


def _shows_pictures(found: Mapping[str, Any]) -> bool:
    """Whether the task is a diffusion model whose images can be shown."""
    task = found["task"]
    if not isinstance(task.loss, Denoising):
        return False
    one = Data.of(found["queries"], collate=task.collate).batch(slice(0, 1))
    return "decode" in found or is_picture(one.get("image"))
