"""Files that are whole or absent: temporary name, fsync, rename."""

import errno
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from forebear.types import partial_path

PARTIAL = ".partial"


def write_whole(path: Path, pieces: Sequence[bytes | memoryview]) -> None:
    """Write `pieces` one after the other; after a crash the file is the old, the new or absent.

    Raises:
        OSError: the folder is read-only or the disk full; nothing is left behind, and the message
            says what was needed.
    """
    size = sum(len(piece) for piece in pieces)
    partial = partial_path(path)
    try:
        with open(partial, "wb", buffering=0) as file:
            if hasattr(os, "posix_fallocate") and size:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is found out at once
            for piece in pieces:
                rest = memoryview(piece)
                while len(rest):  # the kernel writes at most 2 GB at a time
                    rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise explained(error, path, size) from error


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut; without it files may be absent, not damaged."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def explained(error: OSError, path: Path, size: int = 0) -> OSError:
    """The error with what to do about it, where a person can do something."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(path.parent).free
        reason = (
            f"{path} needs {size:,} bytes and {free:,} are free: make room and run the same again, "
            "which writes only what is missing"
        )
        return OSError(error.errno, reason)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason = f"{path.parent} cannot be written to: choose another folder or change its rights"
        return OSError(error.errno, reason)
    return error
