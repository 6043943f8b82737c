"""Codecs. A new one is a file here and an import line below."""

from kvplan.methods.codecs import dense, fp8, int8, kivi, turboquant
from kvplan.methods.codecs.base import Codec, Codes, Field, codecs

__all__ = ["Codec", "Codes", "Field", "codecs", "dense", "fp8", "int8", "kivi", "turboquant"]
