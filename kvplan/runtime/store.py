"""Store: tensors that stay for long, in memory up to a limit and in memory-mapped files beyond."""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from kvplan.errors import KVPlanError
from kvplan.units import format_bytes


class Store:
    """Keeps tensors; what no longer fits in memory lies in files of a temporary folder.

    A file is unlinked as soon as it is mapped, so nothing is left behind however the process ends; where a mapped
    file cannot be unlinked (Windows) the folder goes with the store. Files lie where `TMPDIR` says.

    Args:
        memory_bytes: Most bytes kept in memory, on the device that the tensors are on.
    """

    def __init__(self, memory_bytes: int) -> None:
        self._left = memory_bytes
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0
        self.file_bytes = 0

    def has_room(self, size: int) -> bool:
        """Whether so many bytes more stay in memory."""
        return size <= self._left

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor itself, or a copy on the CPU whose bytes are in a file.

        Raises:
            KVPlanError: the files cannot be written.
        """
        size = tensor.numel() * tensor.element_size()
        if size <= self._left:
            self._left -= size
            weakref.finalize(tensor, self._give_back, size).atexit = False
            return tensor
        return self._mapped(tensor, size)

    def _give_back(self, size: int) -> None:
        self._left += size

    def _mapped(self, tensor: Tensor, size: int) -> Tensor:
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="kvplan-replay-", ignore_cleanup_errors=True)
            path = Path(self._folder.name) / str(self._files)
            # Written, not filled through the map: a full disk is then an error and not a signal.
            with open(path, "xb") as file:
                file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        except OSError as error:
            where = tempfile.gettempdir() if self._folder is None else self._folder.name
            raise KVPlanError(
                f"{where}: cannot keep captured prompts there beside {format_bytes(self.file_bytes)} of them "
                f"({error.strerror}); free some space, set TMPDIR to another disk, or run fewer or shorter prompts"
            ) from error
        mapped = torch.from_file(str(path), shared=False, size=tensor.numel(), dtype=tensor.dtype)
        with contextlib.suppress(OSError):
            path.unlink()
        self._files += 1
        self.file_bytes += size
        return mapped.view(tensor.shape)

    def close(self) -> None:
        """Remove the folder; tensors in use stay readable until they are dropped."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def free_bytes(device: torch.device) -> int:
    """Memory that can be taken on a device without pushing anybody out."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [_available()]
    with contextlib.suppress(OSError, ValueError, KeyError):
        group = Path("/sys/fs/cgroup")  # what a container may take; "max" where it is not limited
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free.append(limit - used + int(counts["inactive_file"]))  # cached files go when memory is wanted
    return max(0, min(free))


def _available() -> int:
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        told = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(told.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):
        return 4 * 2**30
