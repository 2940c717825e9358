"""Workers and drivers that are killed at random moments, by the script that does it fifty times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "executor_crashes.py"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_work_that_was_killed_and_resumed_gives_the_same_bits() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--trials", "3", "--kills", "1", "--pieces", "8"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["identical"] == 3
    assert report["kills_of_drivers"] + report["kills_of_workers"] > 0
