"""Values that travel between rooms: scores and top-k lists."""

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from forebear.descriptions import same, shown
from forebear.errors import DataError, FormatError, MismatchError, TaskError, unknown_name

FORMAT = 1

UNSIGNED = "scores are not signed: high ones matter, low ones do not, and none are opponents"
"""The sign of methods that square."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where scores come from; two things may be compared only when these agree.

    `units` is `"removal"` (the measurement with the example minus without it, 1/n included) or
    `"ranking"` (only the order counts). `coverage` is the share of the trainable parameters seen;
    None for methods that use no gradients. `loss` and `measure` describe what was trained and what
    is asked, or are None where that was not recorded: they are compared where both are known.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    units: str = "ranking"
    coverage: float | None = None
    model: str = ""
    train: str = ""
    queries: str = ""
    seed: int | None = None
    version: str = ""
    sign: str = "positive scores are proponents"
    loss: Any = None
    measure: Any = None

    def require_same(self, other: "Provenance", fields: tuple[str, ...]) -> None:
        """Raise `MismatchError` naming the first of `fields` that differs."""
        for name in fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            unknown = name in ("loss", "measure") and (mine is None or theirs is None)
            if not (unknown or same(mine, theirs)):
                raise MismatchError(
                    f"{name} differs: {shown(mine, theirs)} against {shown(theirs, mine)}; these "
                    f"belong to another "
                    f"{_NOUNS.get(name, name)} and must not be mixed"
                )


_NOUNS = {"train": "training set", "queries": "set of queries", "model": "model"}


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The strongest examples of each query, strongest first.

    Attributes:
        ids: `[q, k]` ids of training examples.
        values: `[q, k]` their scores.
        query_ids: `[q]`.
        opponents: whether these are the lowest scores instead of the highest.
    """

    ids: np.ndarray
    values: Tensor
    query_ids: np.ndarray
    opponents: bool = False
    provenance: Provenance

    def to_parquet(self, path: str | Path) -> None:
        """One row a (query, rank): `query, rank, example, score`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        queries, k = self.ids.shape
        table = pa.table(
            {
                "query": np.repeat(self.query_ids, k),
                "rank": np.tile(np.arange(1, k + 1), queries),
                "example": self.ids.reshape(-1),
                "score": self.values.double().numpy().reshape(-1),
            }
        )
        pq.write_table(table, path)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How much each query owes to each training example.

    Attributes:
        values: `[query, train]`; positive = proponent.
        query_ids: `[q]`.
        train_ids: `[n]`.
        provenance: method, settings, units, coverage and fingerprints.
    """

    values: Tensor
    query_ids: np.ndarray
    train_ids: np.ndarray
    provenance: Provenance

    def __post_init__(self) -> None:
        expected = (len(self.query_ids), len(self.train_ids))
        if tuple(self.values.shape) != expected:
            raise DataError(
                f"scores have shape {tuple(self.values.shape)} for {expected[0]} queries and "
                f"{expected[1]} examples: orientation is [query, train]"
            )

    def __repr__(self) -> str:
        queries, train = self.values.shape
        about = self.provenance
        seen = "" if about.coverage is None else f", coverage {about.coverage:.0%}"
        return (
            f"Scores({about.method}: {queries} queries × {train} examples, "
            f"{about.units} units{seen})"
        )

    def top(self, k: int = 10, *, opponents: bool = False) -> TopK:
        """The `k` strongest proponents of each query, or opponents.

        Raises:
            DataError: `k` is below one or above the number of training examples.
            TaskError: opponents were asked for of scores that have no sign.
        """
        check_k(k, len(self.train_ids))
        if opponents and self.provenance.sign == UNSIGNED:
            raise TaskError(
                f"{self.provenance.method} squares its scores, so there are no opponents among "
                "them: ask a method whose scores have a sign, such as dtrak or trak"
            )
        # A stable sort makes ties fall to the earlier example, as the streamed top-k does.
        order = torch.argsort(self.values, dim=1, descending=not opponents, stable=True)[:, :k]
        return TopK(
            ids=self.train_ids[order.numpy()],
            values=self.values.gather(1, order),
            query_ids=self.query_ids,
            opponents=opponents,
            provenance=self.provenance,
        )

    def save(self, folder: str | Path) -> None:
        """Write `scores.safetensors` and `scores.json` into `folder`."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"values": self.values.contiguous()}, folder / "scores.safetensors")
        write_json(
            folder / "scores.json",
            {
                "provenance": asdict(self.provenance),
                "query_ids": self.query_ids.tolist(),
                "train_ids": self.train_ids.tolist(),
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> "Scores":
        """Read what `save` wrote.

        Raises:
            FormatError: a file is missing, damaged or from a newer version.
        """
        path = Path(folder) / "scores.json"
        about = read_json(path)
        values = read_tensors(path.with_suffix(".safetensors"))
        try:
            return cls(
                values=values["values"],
                query_ids=np.asarray(about["query_ids"]),
                train_ids=np.asarray(about["train_ids"]),
                provenance=Provenance(**about["provenance"]),
            )
        except (KeyError, TypeError) as error:
            raise FormatError(f"{path} is damaged: {error}") from error

    def with_provenance(self, **changes: Any) -> "Scores":
        """The same values with other facts about them."""
        return replace(self, provenance=replace(self.provenance, **changes))


def check_k(k: int, size: int) -> None:
    """Raise `DataError` unless `1 <= k <= size`."""
    if not 1 <= k <= size:
        raise DataError(f"k is {k} and there are {size} training examples: choose 1 to {size}")


def require_choices(configuration: Any) -> None:
    """Raise `UnknownNameError` when a field of a dataclass is none of its `Literal` choices."""
    for name, hint in get_type_hints(type(configuration)).items():
        value = getattr(configuration, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise unknown_name(
                f"{name} of {type(configuration).__name__}", str(value), get_args(hint)
            )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` with the format number, through a temporary name so it is whole or absent."""
    partial = partial_path(path)
    partial.write_text(json.dumps({"format": FORMAT, **content}, indent=1) + "\n")
    partial.replace(path)


def partial_path(path: Path) -> Path:
    """A temporary name beside `path` that no other process uses, on this machine or another."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


def read_json(path: Path, newest: int = FORMAT) -> dict[str, Any]:
    """Read what `write_json` wrote, in formats up to `newest`.

    Raises:
        FormatError: the file is missing, damaged or from a newer version.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is damaged: {error}") from error
    version = content.get("format", 0) if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise FormatError(f"{path} is damaged: it is not an object with a format number")
    if version > newest:
        raise FormatError(
            f"{path} has format {version} and this version reads up to {newest}: upgrade forebear"
        )
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name.

    Raises:
        FormatError: the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is damaged: {error}") from error
