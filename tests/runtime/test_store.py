"""Captured tensors beyond the memory limit lie in files, of which nothing is left."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from kvplan.errors import KVPlanError
from kvplan.runtime import store as module
from kvplan.runtime.store import Store, free_bytes
from tests.rooms import room


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_what_does_not_fit_is_read_back_from_a_file(tmp_path: Path, dtype: torch.dtype) -> None:
    store = Store(0)
    x = (torch.randn(3, 5, 7) * 3).to(dtype).transpose(0, 2)[1:]
    kept = store.keep(x)
    assert kept.dtype == dtype and torch.equal(kept, x) and kept.data_ptr() != x.data_ptr()
    assert store.file_bytes == x.numel() * x.element_size()
    assert files(tmp_path) == []
    store.close()
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(kept, x)


def test_what_fits_stays_as_it_is_and_makes_room_when_it_is_dropped(tmp_path: Path) -> None:
    store = Store(100)
    first = store.keep(torch.zeros(20))
    assert store.file_bytes == 0
    store.keep(torch.zeros(20))
    assert store.file_bytes == 80
    del first
    gc.collect()
    again = torch.ones(25)
    assert store.keep(again) is again and store.file_bytes == 80


def test_a_full_disk_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = Store(0)
    store.keep(torch.zeros(1024))
    monkeypatch.setattr(module, "open", full, raising=False)
    with pytest.raises(KVPlanError, match=r"kvplan-replay-.*beside 4.00 KiB.*No space left on device.*TMPDIR"):
        store.keep(torch.zeros(4))


def test_a_disk_that_is_really_full_is_the_same_error_and_no_signal() -> None:
    store = Store(0)
    kept = store.keep(torch.arange(1024))
    with room(4096), pytest.raises(KVPlanError, match=r"kvplan-replay-.*beside 8.00 KiB.*File too large.*TMPDIR"):
        store.keep(torch.zeros(4096))
    assert torch.equal(kept, torch.arange(1024))


def test_a_temporary_folder_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    with pytest.raises(KVPlanError, match="/no/such/folder.*No such file"):
        Store(0).keep(torch.zeros(4))


SCRIPT = """
import os, signal, torch
from kvplan.runtime.store import Store
store = Store(0)
kept = [store.keep(torch.ones(1000)) for _ in range(3)]
assert sum(x.sum().item() for x in kept) == 3000
{end}
"""


@pytest.mark.parametrize(
    "end", ["", "raise KeyboardInterrupt", "raise ValueError", "os.kill(os.getpid(), signal.SIGKILL)"]
)
def test_no_file_outlives_its_process(tmp_path: Path, end: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(end=end)],
        env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "AssertionError" not in run.stderr
    assert files(tmp_path) == []
    if run.returncode != -signal.SIGKILL:
        assert list(tmp_path.iterdir()) == []


def test_free_memory_is_told() -> None:
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50
