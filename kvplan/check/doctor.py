"""examine(): what this machine offers to kvplan."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from kvplan.runtime.kernels import choose

NAMES = ("kvplan", "torch", "transformers", "optuna", "datasets", "triton", "flash-attn", "psycopg", "matplotlib")


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes:
        versions: Package -> version, or None where it is not installed.
        devices: What torch can run on.
        kernels: What decodes on each device.
        slow: What costs time here, and what to do.
        problems: What is wrong and must be mended.
    """

    versions: dict[str, str | None]
    devices: tuple[str, ...]
    kernels: dict[str, str]
    slow: tuple[str, ...]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> Finding:
    """Look at versions, devices, threads and kernels; nothing is run but one small attention."""
    versions = {name: _version(name) for name in NAMES}
    versions = {"python": platform.python_version(), **versions}
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = [f"cpu ({torch.get_num_threads()} of {_cores()} cores)"]
    devices += [f"{gpu} ({torch.cuda.get_device_name(gpu)})" for gpu in gpus]
    return Finding(
        versions=versions,
        devices=tuple(devices),
        kernels={"cpu": "torch", **{gpu: _gpu_kernels(gpu) for gpu in gpus}},
        slow=tuple(_slow(versions, gpus)),
        problems=tuple(_problems()),
    )


def _slow(versions: dict[str, str | None], gpus: list[str]) -> list[str]:
    told = []
    if not gpus:
        told.append(
            "no GPU: codecs (int8, kivi, turboquant) save memory here and cost time; on a GPU the kernels decode them "
            "in place"
        )
    elif versions["triton"] is None:
        told.append("a GPU without triton: decoding uses plain torch; pip install 'kvplan[gpu]'")
    if gpus and versions["flash-attn"] is None:
        told.append("flash-attn is not installed: prefill uses torch's own flash attention, which is nearly as fast")
    if torch.get_num_threads() > 1 and os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        told.append("OMP_WAIT_POLICY is not PASSIVE: waiting threads spin, which starves other jobs on the same cores")
    if torch.get_num_threads() > _cores():
        told.append(f"{torch.get_num_threads()} threads on {_cores()} cores: lower OMP_NUM_THREADS")
    return told


def _problems() -> list[str]:
    checks: tuple[Callable[[], str | None], ...] = (_transformers_range, _kernel_setting, _attention)
    return [told for check in checks if (told := check()) is not None]


def _transformers_range() -> str | None:
    """What pyproject asks for, as it was installed."""
    from packaging.requirements import Requirement

    for text in metadata.requires("kvplan") or []:
        wanted = Requirement(text)
        have = _version(wanted.name) if wanted.marker is None else None
        if have is not None and not wanted.specifier.contains(have, prereleases=True):
            return f"{wanted.name} is {have}; kvplan needs {wanted.specifier}"
    return None


def _kernel_setting() -> str | None:
    try:
        choose.setting()
    except ValueError as error:
        return str(error)
    return None


def _attention() -> str | None:
    """A layer of 4 slots against plain attention."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 4, 8, generator=generator) for heads in (4, 2, 2))
    found = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    wanted = (q @ k.mT / 8**0.5).softmax(-1) @ v
    if torch.allclose(found, wanted, atol=1e-5):
        return None
    return "torch's attention gives wrong results on this machine; reinstall torch"


def _gpu_kernels(gpu: str) -> str:
    probe = torch.empty(0, device=gpu, dtype=torch.bfloat16)
    return "triton" if choose.available(probe) else "torch"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(name: str) -> str | None:
    try:
        return metadata.version(re.sub("_", "-", name))
    except metadata.PackageNotFoundError:
        return None
