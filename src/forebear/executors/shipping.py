"""Work on its way to other processes: pickled once, its large arrays apart and never copied.

Functions and classes of the main program, lambdas and closures go by value (cloudpickle), and so
does what was imported from a user's FILE.py, for no other process could import it. Tensors and
arrays of the processor's memory go as they lie there, after the pickle (protocol 5 buffers).
"""

import errno
import io
import mmap
import os
import pickle
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import cloudpickle
import torch
from torch import nn

from forebear.errors import ForebearError

ALIGNMENT = 64
INSIDE = 4096
"""Buffers up to so many bytes stay in the pickle."""

OWN_MODULES = "forebear_file_"
"""How the names of modules begin that were made from a user's FILE.py."""


@dataclass(frozen=True)
class Surroundings:
    """What else the numbers of a piece depend on, and where modules are found."""

    path: tuple[str, ...]
    threads: int
    dtype: torch.dtype
    precision: str
    deterministic: bool

    @classmethod
    def here(cls, threads: int) -> "Surroundings":
        """Those of this process, but for the number of threads."""
        files = [getattr(module, "__file__", None) for module in _own_modules()]
        beside = [str(Path(file).resolve().parent) for file in files if file]
        return cls(
            path=tuple(dict.fromkeys([*(entry or os.getcwd() for entry in sys.path), *beside])),
            threads=threads,
            dtype=torch.get_default_dtype(),
            precision=torch.get_float32_matmul_precision(),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )

    def take(self) -> None:
        """Make them those of this process."""
        known = set(sys.path)
        sys.path.extend(entry for entry in self.path if entry not in known)
        torch.set_num_threads(self.threads)
        torch.set_default_dtype(self.dtype)
        torch.set_float32_matmul_precision(self.precision)
        if self.deterministic != torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(self.deterministic)  # imports half of torch


@dataclass(frozen=True)
class Shipment:
    """A pickled object.

    Attributes:
        content: the pickle.
        buffers: `uint8` arrays and views of memory that belong to it, in its order.
        written: for each buffer, whether parameters of a model lie in it, which are written to.
    """

    content: bytes
    buffers: tuple[Any, ...]
    written: tuple[bool, ...]

    @classmethod
    def of(cls, value: Any) -> "Shipment":
        """Pickle `value`; its arrays are not copied, so they must not change until it is sent.

        Raises:
            ForebearError: something in it cannot be pickled.
        """
        file = io.BytesIO()
        pickler = _Pickler(file)
        with _own_modules_by_value():
            try:
                pickler.dump(value)
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                raise ForebearError(
                    f"the work cannot be sent to other processes ({error}): keep open files, "
                    "locks, generators and connections out of the model, the data and the "
                    "functions, or open them where they are used"
                ) from error
        return cls(file.getvalue(), tuple(pickler.buffers), tuple(pickler.written))

    def unpacked(self) -> Any:
        """The object, on top of the buffers."""
        return pickle.loads(self.content, buffers=self.buffers)


def write(value: Any, threads: int) -> IO[bytes]:
    """`value` pickled into a temporary file without a name, which is gone with its last holder.

    Args:
        value: any object.
        threads: of torch where it is read.

    Raises:
        ForebearError: it cannot be pickled, or there is no room for it.
    """
    shipment = Shipment.of(value)
    places: list[tuple[int, int]] = []
    end = 0
    for buffer in shipment.buffers:
        places.append((end, end + buffer.nbytes))
        end += -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
    head = pickle.dumps((Surroundings.here(threads), shipment.content, places))
    file = tempfile.TemporaryFile(prefix="forebear-")  # noqa: SIM115  the caller closes it
    try:
        file.write(len(head).to_bytes(8, "little") + head)
        start = _start(len(head))
        for buffer, (place, _) in zip(shipment.buffers, places, strict=True):
            file.seek(start + place)
            file.write(buffer)
        file.truncate(start + end)
        file.flush()
    except OSError as error:
        file.close()
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ForebearError(
            f"{tempfile.gettempdir()} has no room for the {end:,} bytes of data and model that "
            "workers share: set TMPDIR to a folder with room"
        ) from error
    return file


def mapped(file: int) -> Any:
    """What `write` wrote, from an open file; arrays are views of pages that processes share.

    A page that is written to becomes the process's own. Surroundings are taken on.
    """
    pages = mmap.mmap(file, 0, access=mmap.ACCESS_COPY)
    length = int.from_bytes(pages[:8], "little")
    surroundings, content, places = pickle.loads(pages[8 : 8 + length])
    surroundings.take()
    whole, start = memoryview(pages), _start(length)
    return pickle.loads(content, buffers=[whole[start + a : start + b] for a, b in places])


class _Pickler(cloudpickle.Pickler):
    """Tensors of the processor's memory as buffers; what shares a storage goes on sharing it."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, protocol=5, buffer_callback=self._kept_inside)
        self.buffers: list[Any] = []
        self.written: list[bool] = []
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._parameters: set[int] = set()

    def reducer_override(self, obj: Any) -> Any:
        """How storages are taken apart; all else as usual."""
        if isinstance(obj, nn.Parameter) and obj.device.type == "cpu" and not _is_subclass(obj):
            self._parameters.add(obj.untyped_storage()._cdata)
        if isinstance(obj, torch.storage.TypedStorage):
            untyped = obj._untyped_storage
            if untyped.device.type == "cpu":
                # Typed ones are made anew at every look; pickle's memo needs one object a storage.
                return _typed, (self._storages.setdefault(untyped._cdata, untyped), obj.dtype)
        if isinstance(obj, torch.UntypedStorage) and obj.device.type == "cpu":
            self._parameter = obj._cdata in self._parameters
            return _storage, (pickle.PickleBuffer(_content(obj)),)
        return super().reducer_override(obj)

    _parameter = False

    def _kept_inside(self, buffer: pickle.PickleBuffer) -> bool:
        written, self._parameter = self._parameter, False
        view = buffer.raw()
        if view.nbytes <= INSIDE:
            return True
        self.buffers.append(view)
        self.written.append(written)
        return False


def _is_subclass(parameter: nn.Parameter) -> bool:
    return type(parameter.data) is not torch.Tensor


def _content(storage: torch.UntypedStorage) -> Any:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()  # type: ignore[call-overload]


def _typed(storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.storage.TypedStorage:
    return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def _storage(buffer: Any) -> torch.UntypedStorage:
    view = memoryview(buffer)
    if not view.nbytes:
        return torch.UntypedStorage(0)
    return torch.frombuffer(view, dtype=torch.uint8).untyped_storage()


def _start(length: int) -> int:
    """Where buffers begin after a head of so many bytes."""
    return -(-(8 + length) // ALIGNMENT) * ALIGNMENT


def _own_modules() -> list[Any]:
    return [m for name, m in list(sys.modules.items()) if name.startswith(OWN_MODULES)]


@contextmanager
def _own_modules_by_value() -> Iterator[None]:
    modules = _own_modules()
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)
