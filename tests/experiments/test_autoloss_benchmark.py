"""The benchmark of learned schedules at its smallest, on two devices of the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.sections_throughput import throughput


@pytest.mark.slow
def test_runs_over_two_devices_are_rows_beside_those_of_one(tmp_path):
    """In a process of its own: devices are asked for before JAX begins."""
    flags = ["--quick", "--devices", "2", "--out", str(tmp_path / "out")]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.autoloss", *flags],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    found = [(row["runs"], row["devices"]) for row in summary["throughput"]]
    assert found == [(1, 1), (2, 1), (2, 2)] * 3
    assert summary["device"]["count"] == 2
    text = "\n".join(throughput(summary))
    assert "| regression | 2 | 2 |" in text
    assert "over devices of" in text
