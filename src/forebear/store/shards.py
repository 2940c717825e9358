"""One shard: a safetensors file of some rows, with a hash of its content in its header.

Tensors of a shard of b rows: `values` `[b, k]`, `norms` `[b]` of the rows before rounding, `ids`,
`scales` (int8 only: `[b, g]` one for each 16 columns, or `[b]` one a row), `weights` `[b]` (for
weighted stores) and `column.NAME`. Strings are UTF-8 bytes one after the other, with `NAME.ends`
`[b]`.
"""

import ctypes
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebear.errors import FormatError
from forebear.store.files import write_whole
from forebear.store.manifest import Manifest

SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH = {name: dtype for dtype, name in SAFETENSORS.items()}
KEY = "forebear"
LARGEST_HEADER = 10_000_000
POPULATE_READ = 22  # MADV_POPULATE_READ of Linux, which Python has no name for


def path_of(folder: Path, shard: int) -> Path:
    """Where a shard is."""
    return folder / f"shard-{shard:06d}.safetensors"


def write_shard(folder: Path, shard: int, tensors: Mapping[str, Tensor]) -> None:
    """Write a shard, whole or not at all; the same content always gives the same bytes.

    The file is put together here and not by safetensors, which orders metadata at random.
    """
    # Larger items first, as safetensors does: every tensor is then aligned to its items.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {}
    pieces, offset = [], 0
    for name, tensor in ordered:
        piece = _bytes(tensor)
        header[name] = {
            "dtype": SAFETENSORS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(piece)],
        }
        pieces.append(piece)
        offset += len(piece)
    facts = json.dumps({"sha256": _digest(shard, header, pieces), "shard": shard})
    text = json.dumps({"__metadata__": {KEY: facts}, **header}).encode()
    text += b" " * (-len(text) % 64)
    write_whole(path_of(folder, shard), [len(text).to_bytes(8, "little"), text, *pieces])


@dataclass(frozen=True)
class Shard:
    """A shard in mapped memory: its tensors are views, read from the disk when touched."""

    path: Path
    tensors: Mapping[str, Tensor]
    sha256: str
    number: int

    @classmethod
    def open(cls, folder: Path, shard: int, manifest: Manifest) -> "Shard":
        """Map a shard and compare its header with the manifest.

        Raises:
            FormatError: it is missing, truncated, damaged or of another store.
        """
        path = path_of(folder, shard)
        try:
            opened = cls._mapped(path)
        except FileNotFoundError:
            raise FormatError(
                f"{path} does not exist: build the store again to fill it in"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise FormatError(f"{path} is damaged ({error}): {REMEDY}") from error
        opened._require_fits(shard, manifest)
        return opened

    @classmethod
    def _mapped(cls, path: Path) -> "Shard":
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(LARGEST_HEADER, size):
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        facts = json.loads(header.pop("__metadata__")[KEY])
        end = max(about["data_offsets"][1] for about in header.values())
        if size != 8 + length + end:
            raise ValueError(f"it has {size} bytes in place of {8 + length + end}")
        # Neither copies nor keeps the file open: a process may map more shards than it may open.
        content: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
        whole = torch.empty(0, dtype=torch.uint8).set_(content)
        tensors = {}
        for name, about in header.items():
            start, stop = (8 + length + place for place in about["data_offsets"])
            dtype, shape = TORCH[about["dtype"]], about["shape"]
            if stop - start != int(np.prod(shape)) * dtype.itemsize or start % dtype.itemsize:
                raise ValueError(f"tensor {name} has a wrong size or place")
            tensors[name] = whole[start:stop].view(dtype).view(shape)
        return cls(path, tensors, str(facts["sha256"]), int(facts["shard"]))

    def _require_fits(self, shard: int, manifest: Manifest) -> None:
        expected = dict(layout(manifest, shard))
        found = {
            name: (tensor.dtype, None if expected.get(name, (0, 0))[1] is None else tensor.shape)
            for name, tensor in self.tensors.items()
        }
        for name in expected.keys() | found.keys():
            if expected.get(name) != found.get(name):
                raise FormatError(
                    f"{self.path} does not fit the manifest: {name} is {found.get(name)} in place "
                    f"of {expected.get(name)}; {REMEDY}"
                )
        if self.number != shard:
            raise FormatError(f"{self.path} is shard {self.number} under another name: {REMEDY}")

    def populate(self) -> None:
        """Have the kernel map all pages at once: a fault for each would take longer than reading.

        A hint: where the kernel does not know it (Linux before 5.14), pages come one by one.
        """
        storage = next(iter(self.tensors.values())).untyped_storage()
        advise = _madvise()
        if advise is not None:
            advise(storage.data_ptr(), storage.nbytes(), POPULATE_READ)

    @property
    def intact(self) -> bool:
        """Whether the content has the hash it was written with."""
        self.populate()
        header = {
            name: {"dtype": SAFETENSORS[tensor.dtype], "shape": list(tensor.shape)}
            for name, tensor in self.tensors.items()
        }
        pieces = [_bytes(tensor) for tensor in self.tensors.values()]
        return _digest(self.number, header, pieces) == self.sha256

    def strings(self, name: str) -> list[str]:
        """A tensor of strings."""
        content = self.tensors[name].numpy().tobytes()
        ends = self.tensors[f"{name}.ends"].tolist()
        starts = [0, *ends[:-1]]
        return [content[a:b].decode() for a, b in zip(starts, ends, strict=True)]


REMEDY = "'forebear store verify --repair' removes it, and building again makes it anew"


def layout(manifest: Manifest, shard: int) -> Iterator[tuple[str, tuple[torch.dtype, Any]]]:
    """Names, types and shapes that a shard must have; strings are of any length (None)."""
    rows = manifest.rows_of(shard)
    size = rows.stop - rows.start
    one = torch.Size([size])
    dtype = getattr(torch, manifest.dtype)
    yield "values", (dtype, torch.Size([size, manifest.dimension]))
    yield "norms", (torch.float32, one)
    if manifest.dtype == "int8":
        yield "scales", _scales(manifest, size)
    if manifest.weighted:
        yield "weights", (torch.float32, one)
    kinds = {"ids": ("int64" if manifest.ids == "integer" else "string", ())}
    kinds |= {f"column.{name}": (c.dtype, c.shape) for name, c in manifest.columns.items()}
    for name, (kind, shape) in kinds.items():
        if kind == "string":
            yield name, (torch.uint8, None)
            yield f"{name}.ends", (torch.int64, one)
        else:
            yield name, (getattr(torch, kind), torch.Size([size, *shape]))


def _scales(manifest: Manifest, size: int) -> tuple[torch.dtype, torch.Size]:
    if not manifest.scale_columns:
        return torch.float32, torch.Size([size])
    return torch.bfloat16, torch.Size([size, -(-manifest.dimension // manifest.scale_columns)])


def packed(name: str, values: np.ndarray, dtype: str) -> dict[str, Tensor]:
    """Ids or a column as tensors of a shard."""
    if dtype != "string":
        return {name: torch.from_numpy(np.array(values, dtype=dtype))}
    encoded = [str(value).encode() for value in values]
    ends = torch.tensor([len(text) for text in encoded], dtype=torch.int64).cumsum(0)
    content = np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()
    return {name: torch.from_numpy(content), f"{name}.ends": ends}


@cache
def _madvise() -> Any:
    """The system's function, None where there is none; Python's own serves its own maps alone."""
    advise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    if advise is not None:
        advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise


def _bytes(tensor: Tensor) -> memoryview:
    content: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(content)


def _digest(shard: int, header: Mapping[str, Any], pieces: list[memoryview]) -> str:
    """SHA-256 of names, types, shapes and content, in the order of the file."""
    digest = hashlib.sha256(f"{shard}".encode())
    for (name, about), piece in zip(header.items(), pieces, strict=True):
        digest.update(json.dumps([name, about["dtype"], about["shape"]]).encode())
        digest.update(piece)
    return digest.hexdigest()
