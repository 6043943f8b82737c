"""Evictors. A new one is a file here and an import line below."""

from kvplan.methods.evictors import (
    corm,
    expected,
    h2o,
    key_norm,
    keydiff,
    lagkv,
    scissorhands,
    sliding,
    snapkv,
    streaming,
    tova,
)
from kvplan.methods.evictors.base import Evictor, PromptView, Signal, Step, evictors

__all__ = [
    "Evictor", "PromptView", "Signal", "Step", "corm", "evictors", "expected", "h2o", "key_norm", "keydiff", "lagkv",
    "scissorhands", "sliding", "snapkv", "streaming", "tova",
]  # fmt: skip
