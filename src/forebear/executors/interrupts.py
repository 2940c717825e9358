"""Ctrl-C between two steps rather than in the middle of one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block; a second one at once.

    For short steps that would leave something behind when they end half-way: a process that nobody
    knows of, an answer that nobody has read. Python gives Ctrl-C to the main thread alone, so
    elsewhere there is nothing to hold.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    seen: list[FrameType | None] = []

    def hold(number: int, frame: FrameType | None) -> None:
        seen.append(frame)
        if len(seen) > 1:
            before(number, frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if len(seen) == 1:
            before(signal.SIGINT, seen[0])
