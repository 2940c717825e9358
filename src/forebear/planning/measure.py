"""Timed runs of growing size, and what they take of memory and disk."""

import gc
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

FIRST_QUERIES = 8
"""Queries of the first runs."""


def ladder(
    run: Callable[[int, int], float],
    first: int,
    most: int,
    queries: int,
    left: Callable[[], float],
    power: int,
) -> None:
    """Call `run(n, q)` with growing n and q while another run should fit into what is left.

    The first size runs twice: what the first run takes longer is paid once in every process.
    """
    q = min(queries, FIRST_QUERIES)
    run(first, q)
    taken = run(first, q)
    if q < queries:
        # All queries if they fit, otherwise as many as leave time for more examples.
        affordable = int(q * 0.3 * max(left(), 0.0) / max(taken, 1e-6))
        # Costs that do not grow with queries are in `taken` too: it is rarely as bad as that.
        affordable = queries if queries <= 3 * affordable else affordable
        if affordable >= 2 * q:
            q = min(queries, affordable)
            taken = run(first, q)
    n = first
    grown = 0
    while n < most:
        step = 4 if taken * 4**power < 0.1 * left() else 2
        larger = min(most, step * n)
        expected = taken * (larger / n) ** power
        # One more size says more than all repeats: it may take as long again as was meant.
        if expected > max(left(), 0.0) and (grown or expected > left() + taken * 8):
            break
        n, grown = larger, grown + 1
        taken = run(n, q)
        if grown == 1 and q > FIRST_QUERIES:
            run(n, FIRST_QUERIES)  # tells what grows with queries from what grows with pairs


def measured(work: Callable[[Path], None], share: float) -> dict[str, float]:
    """Seconds, processor seconds, highest memory and bytes written of `work(folder)`."""
    folder = Path(tempfile.mkdtemp(prefix="forebear-plan-"))
    try:
        with sharing_limits(share):
            forget_peak()
            started, processor = time.perf_counter(), time.process_time()
            work(folder)
            seconds, spent = time.perf_counter() - started, time.process_time() - processor
            memory = peak()
        written = sum(p.stat().st_size for p in (folder / "out").rglob("*") if p.is_file())
        return {"seconds": seconds, "processor": spent, "memory": memory, "disk": written}
    finally:
        shutil.rmtree(folder)


@contextmanager
def sharing_limits(share: float) -> Iterator[None]:
    """Inside the block, limits that the training set fills are those of a part of it."""
    from forebear.planning.terms import SCALED

    before = {}
    try:
        for module, name in SCALED.items():
            loaded = import_module(module)
            before[module] = getattr(loaded, name)
            setattr(loaded, name, int(before[module] * share))
        yield
    finally:
        for module, value in before.items():
            setattr(import_module(module), SCALED[module], value)


def product_seconds(dtype: str) -> float:
    """Time of a product of two matrices with a thousand rows and columns."""
    import torch

    a = torch.ones(1024, 1024, dtype=getattr(torch, dtype))
    torch.mm(a, a)
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        torch.mm(a, a)
        taken.append(time.perf_counter() - started)
    return min(taken)


def forget_peak() -> None:
    """Make the highest memory so far that of now, where the system can."""
    gc.collect()
    try:
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)  # what earlier samples freed is not this one's
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        pass


def peak() -> int:
    """Highest resident bytes of this process."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
