"""Stores whose making was killed, by the script that does it fifty times."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "store_crashes.py"


def test_a_store_that_was_killed_and_resumed_is_the_same_bytes() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--trials", "6", "--shards", "30"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["identical"] == 6
    assert report["kills_between_shards"] + report["kills_inside_a_write"] > 0
