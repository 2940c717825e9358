"""Long work in a folder of pieces: what is there is not done again."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from forebear.errors import FormatError, MismatchError
from forebear.types import read_json, read_tensors, write_json


class Pieces:
    """A folder that belongs to one piece of work, described by facts.

    Args:
        folder: made when missing; None keeps nothing.
        facts: what the work is, ready for JSON.
        noun: what messages call its results.

    Raises:
        MismatchError: the folder belongs to other work; the message names the fact that differs.
    """

    def __init__(self, folder: str | Path | None, facts: dict[str, Any], noun: str) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = json.loads(json.dumps(facts))  # as they will be read: lists, not tuples
        path = self.folder / "work.json"
        if not path.exists():
            write_json(path, facts)
            return
        stored = read_json(path)
        for name, value in facts.items():
            if stored.get(name) != value:
                raise MismatchError(
                    f"{name} differs: {self.folder} holds {noun} with {stored.get(name)!r} and "
                    f"this is {value!r}; choose another folder or delete that one"
                )

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """The outcomes of a piece, None where it was not done.

        Raises:
            FormatError: the file is damaged.
        """
        path = None if self.folder is None else self.folder / f"{name}.safetensors"
        if path is None or not path.is_file():
            return None
        outcomes = read_tensors(path).get("outcomes")
        if outcomes is None or tuple(outcomes.shape) != shape:
            raise FormatError(f"{path} is damaged: delete it and it is made again")
        return outcomes

    def write(self, name: str, outcomes: Tensor) -> None:
        """Keep the outcomes of a piece."""
        if self.folder is not None:
            write_tensors(self.folder / f"{name}.safetensors", {"outcomes": outcomes})


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file through a temporary name, so that it is whole or absent."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    partial.replace(path)
