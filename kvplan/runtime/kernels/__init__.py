"""Attention over a pool."""
