"""Sliding window: the most recent tokens, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvplan.methods.evictors.base import evictors
from kvplan.methods.evictors.streaming import Streaming


@evictors.register("sliding")
@dataclass(frozen=True, kw_only=True)
class Sliding(Streaming):
    """Keep the last `slots` tokens, the current one included; sinks are not protected.

    Jiang et al. 2023 (Mistral), arXiv:2310.06825. A lower bound on models trained with full attention.
    """

    keeps_sinks: ClassVar[bool] = False
