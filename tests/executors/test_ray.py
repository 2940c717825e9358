"""A cluster of this machine and one by address, workers that die, folders that are not shared."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import forebear as fb
from forebear.errors import ForebearError
from forebear.executors import results
from tests.executors.test_processes import Deadly, facts

pytest.importorskip("ray")
RAY = fb.Ray(workers=2)


def test_a_killed_worker_loses_its_piece_alone(tmp_path: Path) -> None:
    work = Deadly(tmp_path, piece=2, times=1)
    RAY.run(work)
    assert work.lines == [0, 1, 2, 2, 3, 4, 5]


def test_a_piece_that_kills_all_its_workers_is_named(tmp_path: Path) -> None:
    with pytest.raises(ForebearError, match="piece 1 of deadly work was lost 3 times with its"):
        RAY.run(Deadly(tmp_path, piece=1, times=9))


def test_threads_and_default_type_are_those_asked_for() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        (found,) = results(facts, ["a"], "facts", executor=fb.Ray(workers=2, threads=2))
    finally:
        torch.set_default_dtype(torch.float32)
    assert (int(found["threads"]), int(found["double"])) == (2, 1)


def test_more_threads_than_any_machine_has_are_refused(tmp_path: Path) -> None:
    work = Deadly(tmp_path, piece=0, times=0)
    with pytest.raises(ForebearError, match="threads is 9999 and no machine of the cluster"):
        fb.Ray(threads=9999).run(work)


def test_a_model_can_be_written_to_and_large_data_is_not_copied() -> None:
    model, data = torch.nn.Linear(300, 300), torch.ones(5000, 4000)  # 80 MB

    def compute(piece: int) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            model.weight.fill_(2.0)
        return {"sum": model.weight.sum() + data.sum(), **memory(piece)}

    before = list(results(memory, ["a"], "nothing", executor=RAY))
    found = list(results(compute, ["a", "b"], "sums", executor=RAY))
    for result in found:
        assert float(result["sum"]) == 300 * 300 * 2.0 + 5000 * 4000
        assert float(result["own"] - before[0]["own"]) < 60


def memory(piece: int) -> dict[str, torch.Tensor]:
    """Megabytes of this process that no file stands behind."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    own = next(int(line.split()[1]) for line in lines if line.startswith("Anonymous"))
    return {"own": torch.tensor(own / 1024)}


@dataclass(frozen=True)
class Elsewhere:
    """Work whose markers never come into sight, as on machines that share no folder."""

    description: str = "work elsewhere"

    def __len__(self) -> int:
        return 1

    def done(self, piece: int) -> bool:
        return False

    def do(self, piece: int) -> None:
        pass


def test_folders_that_workers_do_not_share_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebear.executors.ray.SEEN_AFTER", 0.3)
    with pytest.raises(ForebearError, match=r"piece 0 of work elsewhere .* scratch_folder="):
        RAY.run(Elsewhere())


def test_an_address_where_nothing_answers_is_refused(tmp_path: Path) -> None:
    program = (
        "import forebear as fb\n"
        "from forebear.executors import results\n"
        "list(results(lambda i: {}, ['a'], 'work', executor=fb.Ray(address='127.0.0.1:9')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ForebearError: no Ray cluster answers at 127.0.0.1:9" in done.stderr


def free_ports(count: int) -> list[int]:
    """Those above the ports of Ray's workers and below those that the kernel gives by itself."""
    low, high = 20_000, 30_000
    first = low + 7 * os.getpid() % (high - low)
    found: list[int] = []
    for port in [*range(first, high), *range(low, first)]:
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("", port))
            found.append(port)
        if len(found) == count:
            break
    return found


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster that was started by somebody else."""
    port, clients = free_ports(2)
    folder = Path(f"/tmp/forebear-ray-{port}")  # pytest's are too long for the names of sockets
    head = subprocess.Popen(
        [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
            f"--port={port}", "--num-cpus=2", "--include-dashboard=false",
            # A head whose server for clients finds its port taken ends; 10001 would be any head's.
            f"--ray-client-server-port={clients}",
            "--disable-usage-stats", f"--temp-dir={folder}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    yield f"127.0.0.1:{port}"
    os.killpg(head.pid, signal.SIGKILL)
    head.wait()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_cluster_by_address(address: str, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "import os, sys, torch\n"
        "import forebear as fb\n"
        "from forebear.executors import get, results\n"
        "shift = torch.arange(3.0)\n"
        "executor = fb.Ray(address=sys.argv[1], scratch_folder=sys.argv[2])\n"
        "found = results(lambda i: {'x': shift + i}, ['a', 'b'], 'work', executor=executor)\n"
        "print([result['x'].tolist() for result in found])\n"
        "import ray\n"
        "print(ray.get_runtime_context().gcs_address)\n"
        "print(ray.cluster_resources()['CPU'])\n"
        "try:\n"
        "    list(results(str, ['a'], 'work', executor=get('ray:127.0.0.1:4')))\n"
        "except fb.ForebearError as error:\n"
        "    print(error)\n"
    )
    program = [sys.executable, str(script), address, str(tmp_path)]
    end = time.monotonic() + 180
    while True:  # the head takes some seconds to answer
        done = subprocess.run(program, capture_output=True, text=True, timeout=120)
        # First nothing listens, then something does that is not ready.
        waits = "no Ray cluster answers" in done.stderr or "Failed to connect" in done.stderr
        if not waits or time.monotonic() > end:
            break
        time.sleep(0.5)
    assert done.returncode == 0, done.stderr
    values, joined, processors, refused = done.stdout.splitlines()
    assert values == "[[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]]"
    assert joined.rpartition(":")[2] == address.rpartition(":")[2]
    assert float(processors) == 2
    assert "is connected to the Ray cluster at" in refused
