"""Mergers. A new one is a file here and an import line below."""

from kvplan.methods.mergers import cam, kvmerger
from kvplan.methods.mergers.base import Merged, Merger, hand_over, mergers

__all__ = ["Merged", "Merger", "cam", "hand_over", "kvmerger", "mergers"]
