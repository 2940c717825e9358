"""One builder at a time: a lock on a file that says who holds it."""

import json
import os
import socket
from pathlib import Path

from forebear.errors import ForebearError
from forebear.store.files import explained

NAME = "build.lock"


class Lock:
    """The right to write into a folder, held from `take` to `release`.

    The kernel lets go of the lock when its holder dies, so one that was killed on this machine
    never stands in the way. What the file says is for people, and for file systems that do not
    carry locks from one machine to another.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._file: int | None = None

    def take(self) -> None:
        """Take the lock.

        Raises:
            ForebearError: another process builds here; the message names it.
            OSError: the folder cannot be written to.
        """
        import fcntl

        while True:
            try:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise explained(error, self.path) from error
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = _holder(handle)
                os.close(handle)
                raise ForebearError(
                    f"{self.path.parent} is being built by {_words(holder)}: wait for it, or stop "
                    "it first"
                ) from None
            if self._still_there(handle):
                break
            os.close(handle)  # its last holder removed it between our opening and our locking
        holder = _holder(handle)
        host = socket.gethostname()
        if holder.get("host", host) != host:
            os.close(handle)
            raise ForebearError(
                f"{self.path.parent} is being built by {_words(holder)}: if that one has died, "
                f"delete {self.path}"
            )
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": host}).encode(), 0)
        self._file = handle

    def release(self) -> None:
        """Let go; doing it twice is fine."""
        if self._file is None:
            return
        self.path.unlink(missing_ok=True)  # while it is still held
        os.close(self._file)
        self._file = None

    def _still_there(self, handle: int) -> bool:
        try:
            return os.fstat(handle).st_ino == self.path.stat().st_ino
        except FileNotFoundError:
            return False


def _holder(handle: int) -> dict[str, object]:
    try:
        content = json.loads(os.pread(handle, 4096, 0) or b"{}")
    except ValueError:  # it died while it wrote
        return {}
    return content if isinstance(content, dict) else {}


def _words(holder: dict[str, object]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'this machine')}"
