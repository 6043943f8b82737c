"""The GPU benchmark runs from end to end; what it measures here means nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.skipif(not SCRIPT.exists(), reason="the benchmarks are not in this copy")
def test_the_smoke_run_fills_every_section(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = subprocess.run([sys.executable, str(SCRIPT), "--smoke", "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["smoke"]
    assert all(check["passed"] for check in result["Correctness"])
    caches = {row["cache"] for row in result["Decode"]}
    assert {"DynamicCache, full", "kvplan, full", "kvplan 25 %, streaming", "kvplan 25 %, h2o"} <= caches
    for section in ("Decode kernels", "Quantized decode kernels", "Column sums of one layer", "Prompt to first token"):
        assert all(row["ms"] > 0 for row in result[section])
    assert len(result["Targets"]) >= 2
    # Nothing failed on the way, beyond what this machine or version does not have.
    expected = ("no Triton kernels on this device", "captured decode steps: this version", "does not fit")
    assert [note for note in result["notes"] if not any(part in note for part in expected)] == []
    assert "## Targets" in out.with_suffix(".md").read_text()
