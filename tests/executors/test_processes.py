"""Workers that die, drivers that die, and what workers hold in memory."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

import forebear as fb
from forebear.errors import ForebearError, UnknownNameError
from forebear.executors import available, forks, get, results
from forebear.executors.interrupts import held

PIECES = 6


@dataclass(frozen=True)
class Deadly:
    """Pieces that write who did them; one of them kills its worker some times."""

    folder: Path
    piece: int
    times: int
    signal: int = signal.SIGKILL
    child: bool = False
    after: bool = False
    description: str = "deadly work"

    def __len__(self) -> int:
        return PIECES

    def done(self, piece: int) -> bool:
        return (self.folder / str(piece)).exists()

    def do(self, piece: int) -> None:
        deaths = self.folder / "deaths"
        before = len(deaths.read_text()) if deaths.exists() else 0
        with open(self.folder / "lines", "a") as file:
            file.write(f"{piece}\n")
        if self.after:
            (self.folder / str(piece)).touch()
        if piece == self.piece and before < self.times:
            deaths.write_text("x" * (before + 1))
            if self.child and os.fork() == 0:  # it keeps the worker's connection open
                time.sleep(8.0)
                os._exit(0)
            os.kill(os.getpid(), self.signal)
        (self.folder / str(piece)).touch()

    @property
    def lines(self) -> list[int]:
        return sorted(map(int, (self.folder / "lines").read_text().split()))


def test_a_killed_worker_loses_its_piece_alone(tmp_path: Path) -> None:
    work = Deadly(tmp_path, piece=2, times=2)
    fb.Processes(workers=2).run(work)
    assert work.lines == [0, 1, 2, 2, 2, 3, 4, 5]


def test_a_killed_worker_is_missed_although_its_own_child_lives(tmp_path: Path) -> None:
    work = Deadly(tmp_path, piece=2, times=1, child=True)
    fb.Processes(workers=1).run(work)
    assert work.lines == [0, 1, 2, 2, 3, 4, 5]


def test_a_piece_that_was_done_before_its_worker_died_is_not_done_again(tmp_path: Path) -> None:
    work = Deadly(tmp_path, piece=2, times=1, after=True)
    fb.Processes(workers=1, attempts=1).run(work)
    assert work.lines == [0, 1, 2, 3, 4, 5]


def test_a_piece_that_kills_all_its_workers_is_named(tmp_path: Path) -> None:
    work = Deadly(tmp_path, piece=1, times=9)
    with pytest.raises(
        ForebearError,
        match=r"piece 1 of deadly work was lost 2 times .*SIGKILL.*fewer workers or smaller",
    ):
        fb.Processes(workers=1, attempts=2).run(work)
    assert work.done(0)
    crashed = Deadly(tmp_path, piece=1, times=9, signal=signal.SIGSEGV)
    with pytest.raises(ForebearError, match=r"lost once with its worker \(SIGSEGV\); standard"):
        fb.Processes(workers=2, attempts=1).run(crashed)


def forked_by(piece: int) -> dict[str, torch.Tensor]:
    drawn = np.random.random()  # noqa: NPY002  forks must not all draw the same
    return {"parent": torch.tensor(os.getppid()), "drawn": torch.tensor(drawn)}


def test_workers_are_new_processes_that_know_nothing_of_those_before(tmp_path: Path) -> None:
    executor = fb.Processes(workers=1)
    first, second = (list(results(forked_by, ["a"], "forks", executor=executor)) for _ in "12")
    assert first[0]["parent"] == second[0]["parent"]
    assert first[0]["drawn"] != second[0]["drawn"]
    module = tmp_path / "changing_module.py"
    found = []
    sys.path.insert(0, str(tmp_path))
    try:
        for number in (1, 22):
            module.write_text(f"NUMBER = {number}\n")
            names = list(results(imported_number, ["a"], "numbers", executor=executor))
            found.append(int(names[0]["number"]))
    finally:
        sys.path.remove(str(tmp_path))
    assert found == [1, 22]


def imported_number(piece: int) -> dict[str, torch.Tensor]:
    import changing_module  # type: ignore[import-not-found]

    return {"number": torch.tensor(changing_module.NUMBER)}


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
def test_the_process_that_forks_may_be_killed_too() -> None:
    executor = fb.Processes(workers=1)
    (first,) = results(forked_by, ["a"], "forks", executor=executor)
    os.kill(int(first["parent"]), signal.SIGKILL)
    (second,) = results(forked_by, ["a"], "forks", executor=executor)
    assert int(first["parent"]) != int(second["parent"])


def facts(piece: int) -> dict[str, torch.Tensor]:
    ones = torch.ones(())
    return {
        "threads": torch.tensor(torch.get_num_threads()),
        "openmp": torch.tensor(int(os.environ["OMP_NUM_THREADS"])),
        "double": torch.tensor(ones.dtype == torch.float64),
    }


def test_threads_and_default_type_are_those_asked_for() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        (found,) = results(facts, ["a"], "facts", executor=fb.Processes(threads=2))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {k: int(v) for k, v in found.items()} == {"threads": 2, "openmp": 2, "double": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_share_the_pages_of_the_data() -> None:
    data = torch.zeros(400, 2**18)  # 400 MB

    def compute(piece: int) -> dict[str, torch.Tensor]:
        assert float(data.sum()) == 0.0  # every page is in memory now
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        own = next(int(line.split()[1]) for line in lines if line.startswith("Anonymous"))
        return {"megabytes": torch.tensor(own / 1024)}

    found = list(results(compute, ["a", "b"], "sums", executor=fb.Processes(workers=2)))
    assert max(float(result["megabytes"]) for result in found) < 300


DRIVER = """
import os, signal, sys, time
from pathlib import Path
# As in a terminal, whatever the runner of the tests does about Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
import torch
import forebear as fb
from forebear.executors import Pieces, results

folder = Path(sys.argv[1])

def compute(piece):  # of the main program, which has no guard
    (folder / f"pid-{os.getpid()}").touch()
    if not (folder / "quick").exists():
        time.sleep(0.1 if piece == 0 else 600)
    return {"x": torch.tensor(piece)}

found = list(results(
    compute, [str(i) for i in range(4)], "slow", pieces=Pieces(folder / "kept"),
    executor=fb.Processes(workers=2),
))
print(sum(int(result["x"]) for result in found))
"""


def started(folder: Path) -> "subprocess.Popen[str]":
    script = folder / "driver.py"
    script.write_text(DRIVER)
    return subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def until(condition: Any, what: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_driver_and_what_is_done_stays(number: int, tmp_path: Path) -> None:
    driver = started(tmp_path)
    try:
        kept = tmp_path / "kept" / "0.safetensors"
        until(kept.exists, "the first piece was never done")
        until(lambda: len(list(tmp_path.glob("pid-*"))) >= 2, "no second worker")
        pids = [int(path.name[4:]) for path in tmp_path.glob("pid-*")]
        if number == signal.SIGINT:
            os.killpg(driver.pid, number)  # as Ctrl-C does
        else:
            os.kill(driver.pid, number)
        _, errors = driver.communicate(timeout=60)
        until(lambda: not any(map(alive, pids)), "workers live on", 5.0)
    finally:
        driver.kill()
    if number == signal.SIGINT:
        assert errors.count("KeyboardInterrupt") == 1
        return
    written = kept.stat().st_mtime_ns
    (tmp_path / "quick").touch()
    again = started(tmp_path)
    output, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert output == "6\n"
    assert kept.stat().st_mtime_ns == written


STEPS = [str(Path(forks.__file__).parent / f"{name}.py") for name in ("forks", "processes")]
EVERY = 7
"""Of how many lines Ctrl-C comes at one; with 1 the test takes minutes."""


class Interrupted:
    """Ctrl-C comes at a line of the files that deal with workers, counted as they are run."""

    def __init__(self, line: int) -> None:
        self.line = line
        self.seen = 0

    def __enter__(self) -> "Interrupted":
        self.before = signal.signal(signal.SIGINT, signal.default_int_handler), sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before[1])
        signal.signal(signal.SIGINT, self.before[0])

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in STEPS:
            return None
        if event == "line":
            self.seen += 1
            if self.seen == self.line:
                signal.raise_signal(signal.SIGINT)
        return self.trace


def squares(names: str) -> list[int]:
    def square(piece: int) -> dict[str, torch.Tensor]:  # goes by value, so workers import no tests
        return {"square": torch.tensor(piece**2)}

    found = results(square, list(names), "squares", executor=fb.Processes(workers=2))
    return [int(one["square"]) for one in found]


def grandchildren() -> list[int]:
    """Workers of this process that have not ended, or that nobody has asked for their end."""

    def children(process: int) -> list[int]:
        tasks = Path(f"/proc/{process}/task").glob("*/children")
        return [int(child) for path in tasks for child in path.read_text().split()]

    return [worker for child in children(os.getpid()) for worker in children(child)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_at_any_line_leaves_no_worker_and_nothing_that_confuses_the_next_run() -> None:
    def run() -> None:
        assert squares("abc") == [0, 1, 4]

    run()
    before = grandchildren()
    for line in range(3, 10_000, EVERY):
        try:
            with Interrupted(line) as interrupted:
                run()
        except KeyboardInterrupt:
            assert grandchildren() == before, line
            run()
        else:
            assert interrupted.seen < line, f"Ctrl-C at line {line} was lost"
            return


def test_ctrl_c_is_held_until_the_end_of_a_step() -> None:
    steps: list[str] = []

    def nested() -> None:
        with held():
            with held():
                signal.raise_signal(signal.SIGINT)
                steps.append("inner")
            steps.append("outer")
        steps.append("after")

    def twice() -> None:
        with held():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            steps.append("after a second one")

    with Interrupted(-1):  # as in a terminal, whatever the runner of the tests does about Ctrl-C
        for interrupted in (nested, twice):
            with pytest.raises(KeyboardInterrupt):
                interrupted()
            assert steps == ["inner", "outer"]
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with held():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_two_threads_may_have_workers_at_the_same_time() -> None:
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(squares, ["abcdef"] * 12)) == [[0, 1, 4, 9, 16, 25]] * 12


def test_executors_by_name() -> None:
    assert get("in-process") == fb.InProcess()
    assert get("processes") == fb.Processes()
    assert get("processes:4") == fb.Processes(workers=4)
    assert get("ray") == fb.Ray()
    assert get("ray:ray://head:10001") == fb.Ray(address="ray://head:10001")
    assert set(available()) == {"in-process", "processes", "ray", "torchrun"}
    with pytest.raises(UnknownNameError, match="unknown executor 'processs': did you mean"):
        get("processs")
    with pytest.raises(ForebearError, match="'many' is no number of workers"):
        get("processes:many")
    with pytest.raises(ForebearError, match="nothing may stand after 'in-process'"):
        get("in-process:2")
    with pytest.raises(ForebearError, match="workers is 0: it must be at least 1"):
        get("processes:0")
