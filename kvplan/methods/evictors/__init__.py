"""Evictors. A new one is a file here and an import line below."""

from kvplan.methods.evictors import h2o, key_norm, sliding, snapkv, streaming, tova
from kvplan.methods.evictors.base import Evictor, PromptView, Signal, evictors

__all__ = ["Evictor", "PromptView", "Signal", "evictors", "h2o", "key_norm", "sliding", "snapkv", "streaming", "tova"]
